"""Where a run begins: a base model's weights, or a fresh network."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Literal

import jax

import longjax
from longjax import types
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import (
    architecture,
    huggingface,
    huggingface_config,
    induction,
    transformer,
)
from longjax.parallel import rules as rules_lib

Initialization = Literal['random', 'induction']

# Of a checkout: configs/ stands beside longjax/.
_CHECKOUT = pathlib.Path(longjax.__file__).parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initial:
  """What a run begins with.

  Attributes:
    load: makes or reads the parameters, on the mesh; a resumed run has no
      need of them.
    model: sizes of the network.
    tokenizer: of the model.
    tokenizer_directory: where its files are.
  """

  load: Callable[[], types.Params]
  model: architecture.ModelConfig
  tokenizer: tokenizer_lib.Tokenizer
  tokenizer_directory: pathlib.Path


def find(path: str) -> pathlib.Path:
  """Where a relative path of a config leads.

  The working directory comes first, then the checkout: the configs that ship
  with longjax work from anywhere.

  Raises:
    UserError: it is in neither.
  """
  places = [pathlib.Path(path).expanduser(), _CHECKOUT / path]
  for place in places:
    if place.exists():
      return place
  raise types.UserError(
      f'init_from={path!r} does not exist, neither in {pathlib.Path.cwd()} '
      f'nor in {_CHECKOUT}; give a directory with config.json, '
      'model.safetensors and a tokenizer.')


def from_base(path: str, *, rules: rules_lib.Rules) -> Initial:
  """Weights and tokenizer of a Hugging Face directory; see `find`."""
  directory = find(path)
  model = huggingface_config.load(directory)
  tokenizer = tokenizer_lib.load(directory)
  if tokenizer.vocab_size > model.vocab_size:
    raise types.UserError(
        f'init_from={path!r}: its tokenizer has {tokenizer.vocab_size} ids, '
        f'its config.json vocab_size={model.vocab_size}; they do not belong '
        'together.')
  return Initial(
      load=lambda: huggingface.load(directory, rules=rules)[0],
      model=model, tokenizer=tokenizer, tokenizer_directory=directory)


def from_scratch(
    model: architecture.ModelConfig,
    *,
    initialization: Initialization,
    seed: int,
    directory: pathlib.Path,
    texts: Callable[[], Iterable[str]],
    rules: rules_lib.Rules,
) -> Initial:
  """A fresh network, and a tokenizer trained when the run first starts.

  Args:
    model: sizes; `vocab_size` is also the tokenizer's.
    initialization: 'random', or near an induction circuit: `model.induction`.
    seed: of the initial parameters.
    directory: where the tokenizer is kept; one that is there is used.
    texts: makes the texts a tokenizer is trained on.
    rules: logical axes to mesh axes.
  """
  if all((directory / name).exists() for name in (
      tokenizer_lib.MODEL_FILE, tokenizer_lib.CONFIG_FILE)):
    tokenizer = tokenizer_lib.load(directory)
  else:
    tokenizer = tokenizer_lib.train(
        texts(), vocab_size=model.vocab_size, directory=directory)
  # A small corpus gives fewer pieces than asked for.
  model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)

  def load():
    where = rules.tree_shardings(
        transformer.parameter_axes(model), transformer.abstract(model))
    # One program on any mesh: the same seed gives the same parameters.
    params = jax.jit(lambda key: transformer.init(model, key))(
        jax.random.key(seed))
    if initialization == 'induction':
      params = induction.initialise(params, model, seed=seed)
    return jax.device_put(params, where)

  return Initial(
      load=load, model=model, tokenizer=tokenizer,
      tokenizer_directory=directory)

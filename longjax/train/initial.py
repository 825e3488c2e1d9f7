"""Where a run begins: a base model's weights, or a fresh network."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Literal

import jax
from etils import epath

import longjax
from longjax import types
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import (
    architecture,
    huggingface,
    huggingface_config,
    induction,
    parameters,
)
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib
from longjax.train import mirror

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
  with longjax work from anywhere. From a URL a local copy is made. A work
  directory leads to the model its run exported.

  Raises:
    UserError: it is in neither.
  """
  places = [pathlib.Path(path).expanduser(), _CHECKOUT / path]
  tried = f', neither in {pathlib.Path.cwd()} nor in {_CHECKOUT}'
  if mirror.is_remote(path):
    places, tried = [epath.Path(path)], ''
  for place in places:
    with mirror.reporting(place):
      if (place / 'model' / 'config.json').is_file():
        return mirror.fetched(place / 'model')  # Of a run that is finished.
      if place.exists():
        return mirror.fetched(place)
  raise types.UserError(
      f'init_from={path!r} does not exist{tried}; give a directory with '
      'config.json, model.safetensors and a tokenizer.')


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
    publish: Callable[[], None] = lambda: None,
) -> Initial:
  """A fresh network, and a tokenizer trained when the run first starts.

  Args:
    model: sizes; `vocab_size` is also the tokenizer's.
    initialization: 'random', or near an induction circuit: `model.induction`.
    seed: of the initial parameters.
    directory: where the tokenizer is kept; one that is there is used.
    texts: makes the texts a tokenizer is trained on.
    rules: logical axes to mesh axes.
    publish: called when the tokenizer is there, see `mirror`.
  """

  def train_once() -> None:
    if not all((directory / name).exists() for name in (
        tokenizer_lib.MODEL_FILE, tokenizer_lib.CONFIG_FILE)):
      tokenizer_lib.train(
          texts(), vocab_size=model.vocab_size, directory=directory)

  multihost.on_primary(train_once)
  publish()
  tokenizer = tokenizer_lib.load(directory)
  # A small corpus gives fewer pieces than asked for.
  model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)

  def load():
    where = rules.tree_shardings(
        parameters.axes(model), parameters.abstract(model))
    # One program on any mesh: the same seed gives the same parameters.
    params = jax.jit(lambda key: parameters.init(model, key))(
        jax.random.key(seed))
    if initialization == 'induction':
      params = induction.initialise(params, model, seed=seed)
    return multihost.put(params, where)

  return Initial(
      load=load, model=model, tokenizer=tokenizer,
      tokenizer_directory=directory)

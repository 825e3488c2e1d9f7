"""`job=convert`: what a run trained, as files that other programs read.

  a work directory (its newest checkpoint), --.
  one of its checkpoints,                  ----> a Hugging Face directory
  another Hugging Face directory           --'

The other way needs no job: `init_from` reads a Hugging Face directory.

The model lies on the devices of the mesh, in the dtype it is written in; the
host holds one layer of one parameter. Optimizer moments are not read.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from longjax import config as config_lib
from longjax import types
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import (
    architecture,
    huggingface,
    huggingface_config,
    parameters,
)
from longjax.parallel import mesh as mesh_lib
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib
from longjax.train import initial, manifest, mirror


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
  """A conversion.

  Attributes:
    source: work directory of a run, one of its checkpoints
      (WORKDIR/checkpoints/STEP), or a Hugging Face directory.
    output: directory to write; it must not hold anything yet.
    dtype: of the tensors; 'source' is that of the source's tensors, or of
      the base model if a run began with one, else float32.
    max_file_bytes: more are split over several files.
    cpu_devices: see `recipe.RunConfig`.
    mesh: devices the model lies on meanwhile.
  """

  job: Literal['convert'] = 'convert'
  source: str = ''
  output: str = ''
  dtype: Literal['source', 'float32', 'bfloat16', 'float16'] = 'source'
  max_file_bytes: int = 4_000_000_000
  cpu_devices: int = 0
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig(data=1, fsdp=-1)

  def __post_init__(self):
    if self.max_file_bytes < 1:
      raise types.UserError(
          f'max_file_bytes={self.max_file_bytes} must be >= 1.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
  """A model to convert.

  Attributes:
    model: its sizes.
    dtype: it is written in if no other is asked for.
    load: (rules, dtype) -> parameters.
    directory: of its tokenizer and, if it began as one, Hugging Face model.
    name: for the log.
    stop_ids: see `huggingface.save`.
    pad_id: likewise.
  """

  model: architecture.ModelConfig
  dtype: np.dtype
  load: Callable[[rules_lib.Rules, np.dtype], types.Params]
  directory: pathlib.Path
  name: str
  stop_ids: tuple[int, ...] = ()
  pad_id: int | None = None


def run(config: ConvertConfig) -> int:
  """Converts; returns the exit code.

  Raises:
    UserError: the source cannot be read, or the output not be written.
  """
  for name in ('source', 'output'):
    if not getattr(config, name):
      raise types.UserError(
          f'{name} is empty; set --config.{name}=DIRECTORY.')
  if config.cpu_devices:
    mesh_lib.split_cpu(config.cpu_devices)
  if mirror.is_remote(config.output):
    raise types.UserError(
        f'output={config.output} is no directory on a disk; write to one, and '
        'copy it from there.')
  output = pathlib.Path(config.output).expanduser()
  multihost.on_primary(lambda: _check_free(output))
  source = _find(config.source)
  dtype = source.dtype if config.dtype == 'source' else jnp.dtype(config.dtype)
  rules = rules_lib.Rules(mesh_lib.make(config.mesh))
  params = source.load(rules, dtype)
  huggingface.save(
      output, params, source.model, source=source.directory, dtype=dtype,
      stop_ids=source.stop_ids, pad_id=source.pad_id,
      max_file_bytes=config.max_file_bytes)
  count = sum(x.size for x in jax.tree.leaves(params))
  logging.info(
      '%s is now %s: %s parameters in %s.', source.name, output,
      f'{count:,}', dtype.name)
  return 0


def _check_free(output: pathlib.Path) -> None:
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise types.UserError(
        f'output={output} is not empty; choose another directory.')


def _find(name: str) -> _Source:
  """Looks at what `source` leads to."""
  path = mirror.absolute(
      name if mirror.is_remote(name) else pathlib.Path(name).expanduser())
  step = None
  if path.name.isdecimal() and path.parent.name == 'checkpoints':
    path, step = path.parent.parent, int(path.name)
  try:
    with mirror.reporting(path):
      text = (path / 'config.json').read_text()
    content = json.loads(text)
  except (OSError, ValueError) as error:
    raise types.UserError(
        f'source={name} holds no readable config.json ({error}); give a work '
        'directory, one of its checkpoints or a Hugging Face directory.'
    ) from error
  if not isinstance(content, dict):
    content = {}
  if 'model_type' in content:
    return _model(initial.find(name))
  if not {'recipe', 'model', 'init_from'} <= content.keys():
    raise types.UserError(
        f'{path / "config.json"} is neither the config of a run nor that of a '
        'model.')
  return _run(path, step, content)


def _model(directory: pathlib.Path) -> _Source:
  return _Source(
      model=huggingface_config.load(directory),
      dtype=huggingface.stored_dtype(directory),
      load=lambda rules, dtype: huggingface.load(
          directory, rules=rules, dtype=dtype)[0],
      directory=directory, name=str(directory))


def _run(
    workdir: epath.Path, step: int | None, content: dict[str, Any]
) -> _Source:
  """A checkpoint of a run; None is the newest."""
  if content['init_from']:
    base = _model(initial.find(content['init_from']))
    model, dtype, directory = base.model, base.dtype, base.directory
    tokenizer = tokenizer_lib.load(directory)
  else:
    # Not through a `Mirror`, whose local copy the run itself may be using.
    directory = mirror.fetched(workdir / 'tokenizer')
    tokenizer = tokenizer_lib.load(directory)
    # The corpus may have given fewer pieces than asked for.
    model = dataclasses.replace(
        config_lib.build(
            architecture.ModelConfig, content['model'], 'model'),
        vocab_size=tokenizer.vocab_size)
    dtype = np.dtype(np.float32)
  checkpoint = workdir / 'checkpoints' / str(
      multihost.on_primary(lambda: _undamaged(workdir / 'checkpoints', step)))
  return _Source(
      model=model, dtype=dtype,
      load=lambda rules, dtype: _restore(checkpoint, model, rules, dtype),
      directory=directory, name=str(checkpoint),
      stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)


def _undamaged(directory: epath.Path, step: int | None) -> int:
  """The newest step that can be read, or the one asked for.

  The directory is only looked at: a run may be writing into it.
  """
  if step is not None:
    problem = manifest.damage(directory / str(step))
    if problem:
      raise types.UserError(
          f'checkpoint {directory / str(step)} is damaged: {problem}.')
    return step
  steps = [int(path.name) for path in (
      directory.iterdir() if directory.exists() else ())
           if path.name.isdecimal()]
  for number in sorted(steps, reverse=True):
    problem = manifest.damage(directory / str(number))
    if not problem:
      return number
    logging.warning(
        'Checkpoint %s is damaged (%s).', directory / str(number), problem)
  raise types.UserError(f'{directory} holds no whole checkpoint.')


def _restore(
    checkpoint: epath.Path,
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    dtype: np.dtype,
) -> types.Params:
  """The parameters alone, cast as they are read."""
  shapes = parameters.abstract(model)
  wanted = {'train': {'params': jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(
          x.shape, dtype, sharding=sharding),
      shapes, rules.tree_shardings(parameters.axes(model), shapes))}}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    restored = checkpointer.restore(
        checkpoint / 'tree',
        args=ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True))
  return restored['train']['params']

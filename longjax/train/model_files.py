"""The models that jobs read, in whichever form they are, and where they write.

  a work directory (its newest checkpoint), --.
  one of its checkpoints,                  ----> a `Source`
  a Hugging Face directory                 --'

Optimizer moments are not read.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
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
    huggingface_layout,
    parameters,
)
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib
from longjax.train import initial, manifest, mirror

# (path of a parameter in the tree, its layout) -> the tensors it is stored as
# in a Hugging Face directory, in the order of `Layout.tensor_names`.
Reader = Callable[
    [tuple[str, ...], huggingface_layout.Layout], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A model to read.

  Attributes:
    model: its sizes.
    dtype: of its tensors, or of those of the base model if a run began with
      one, else float32.
    load: (rules, dtype) -> parameters, on devices.
    open: a reader of single tensors into host memory. UserError if one is
      missing.
    directory: of its tokenizer and, if it began as one, Hugging Face model.
    name: for messages.
    stop_ids: see `huggingface.save`.
    pad_id: likewise.
  """

  model: architecture.ModelConfig
  dtype: np.dtype
  load: Callable[[rules_lib.Rules, np.dtype], types.Params]
  open: Callable[[], Reader]
  directory: pathlib.Path
  name: str
  stop_ids: tuple[int, ...] = ()
  pad_id: int | None = None


def find(name: str, *, field: str) -> Source:
  """Looks at what a path of a config leads to; all processes call this.

  Args:
    name: work directory of a run, one of its checkpoints
      (WORKDIR/checkpoints/STEP), or a Hugging Face directory.
    field: of the config, for messages.

  Raises:
    UserError: it is none of these.
  """
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
        f'{field}={name} holds no readable config.json ({error}); give a work '
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


def new_directory(name: str | os.PathLike[str], *, field: str) -> pathlib.Path:
  """Where a job may write; all processes call this.

  Args:
    name: of a directory.
    field: of the config, for messages.

  Raises:
    UserError: it holds something, or is on no disk.
  """
  if mirror.is_remote(name):
    raise types.UserError(
        f'{field}={name} is no directory on a disk; write to one, and '
        'copy it from there.')
  directory = pathlib.Path(name).expanduser()

  def check():
    if directory.exists() and (
        not directory.is_dir() or any(directory.iterdir())):
      raise types.UserError(
          f'{field}={directory} is not empty; choose another directory.')

  multihost.on_primary(check)
  return directory


def _model(directory: pathlib.Path) -> Source:
  model = huggingface_config.load(directory)
  return Source(
      model=model,
      dtype=huggingface.stored_dtype(directory),
      load=lambda rules, dtype: huggingface.load(
          directory, rules=rules, dtype=dtype)[0],
      open=lambda: _tensors_of_files(directory, model),
      directory=directory, name=str(directory))


def _tensors_of_files(
    directory: pathlib.Path, model: architecture.ModelConfig
) -> Reader:
  found = huggingface.stored_tensors(directory, model)

  def read(_, layout):
    return (found[name].whole() for name in layout.tensor_names())

  return read


def _run(
    workdir: epath.Path, step: int | None, content: dict[str, Any]
) -> Source:
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
  return Source(
      model=model, dtype=dtype,
      load=lambda rules, dtype: _restore(checkpoint, model, rules, dtype),
      open=lambda: lambda path, layout: _tensors_of_checkpoint(
          checkpoint, path, layout),
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


def _tensors_of_checkpoint(
    checkpoint: epath.Path,
    path: tuple[str, ...],
    layout: huggingface_layout.Layout,
) -> Iterator[np.ndarray]:
  """Restores one parameter, whole; yields it as its tensors are stored.

  What is restored may be cut along any axis on disk: reading one layer of it
  would read all the same.
  """
  keys = ('train', 'params', *path)
  wanted: Any = jax.ShapeDtypeStruct(layout.shape, np.float32)
  arguments: Any = ocp.RestoreArgs(restore_type=np.ndarray)
  for key in reversed(keys):
    wanted, arguments = {key: wanted}, {key: arguments}
  # No `Checkpointer`: that would wait for other processes, which do not read.
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    restored = handler.restore(
        checkpoint / 'tree',
        args=ocp.args.PyTreeRestore(
            item=wanted, restore_args=arguments, partial_restore=True))
  for key in keys:
    restored = restored[key]
  if restored.shape != layout.shape:
    raise types.UserError(
        f'{checkpoint}: {"/".join(path)} has shape {restored.shape}, the '
        f'config asks for {layout.shape}.')
  n = layout.num_stacked
  stored = restored.transpose(layout.order)
  for index in np.ndindex(*layout.shape[:n]):
    yield np.ascontiguousarray(stored[index]).reshape(layout.tensor_shape)

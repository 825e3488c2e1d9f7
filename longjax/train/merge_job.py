"""`job=merge`: one model of what several learnt, each from the same base.

  base --------.
  expert 1 ----+--> tensor by tensor, `model.merge` --> a Hugging Face directory
  expert 2 ----'

The base is the model that RL began from, and the experts are, in the recipe,
the last full-context stage and the memory expert trained from it. With that
stage as base and the memory expert alone there would be nothing to merge:
the result would be the memory expert.

No devices are needed. Of a Hugging Face directory the host holds one tensor at
a time; of a checkpoint one parameter, all its layers. For a large model
`job=convert` makes the one of the other.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from absl import logging
from jax.typing import DTypeLike

from longjax import types
from longjax.model import (
    architecture,
    huggingface_directory,
    huggingface_layout,
    huggingface_writing,
)
from longjax.model import merge as merge_lib
from longjax.parallel import multihost
from longjax.train import mirror, model_files, progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeJobConfig:
  """A merge.

  Attributes:
    base: the model the experts were trained from: a work directory, one of
      its checkpoints or a Hugging Face directory. Its tokenizer and the
      fields of its config.json are carried along.
    experts: the models to merge, likewise.
    output: directory to write; it must not hold anything yet.
    merge: how.
    dtype: of the tensors; 'source' is that of the base, see `convert_job`.
    max_file_bytes: more are split over several files.
  """

  job: Literal['merge'] = 'merge'
  base: str = ''
  experts: tuple[str, ...] = ()
  output: str = ''
  merge: merge_lib.MergeConfig = merge_lib.MergeConfig()
  dtype: Literal['source', 'float32', 'bfloat16', 'float16'] = 'source'
  max_file_bytes: int = 4_000_000_000

  def __post_init__(self):
    if self.max_file_bytes < 1:
      raise types.UserError(
          f'max_file_bytes={self.max_file_bytes} must be >= 1.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """A merge that is done.

  Attributes:
    num_parameters: of the model.
    coefficients: of the experts, the mean over all parameters.
    dtype: of the tensors written.
  """

  num_parameters: int
  coefficients: tuple[float, ...]
  dtype: np.dtype


def run(config: MergeJobConfig) -> int:
  """Merges; returns the exit code.

  Raises:
    UserError: a model cannot be read, they do not belong together, or the
      output cannot be written.
  """
  for name, example in (
      ('base', 'DIRECTORY'), ('experts', 'DIRECTORY,DIRECTORY'),
      ('output', 'DIRECTORY')):
    if not getattr(config, name):
      raise types.UserError(f'{name} is empty; set --config.{name}={example}.')
  output = model_files.new_directory(config.output, field='output')
  summary = merge_directories(
      config.base, config.experts, output, config=config.merge,
      dtype=None if config.dtype == 'source' else config.dtype,
      max_file_bytes=config.max_file_bytes)
  logging.info(
      '%s is %s, merged from %s: %s parameters in %s, mean coefficients %s.',
      output, config.merge.method, ', '.join(config.experts),
      f'{summary.num_parameters:,}', summary.dtype.name,
      ', '.join(f'{x:.3f}' for x in summary.coefficients))
  return 0


def merge_directories(
    base: str | os.PathLike[str],
    experts: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    config: merge_lib.MergeConfig,
    dtype: DTypeLike | None = None,
    max_file_bytes: int = 4_000_000_000,
    description: str = 'merge',
) -> Summary:
  """Merges models in files into a Hugging Face directory.

  All processes call this; the primary one works.

  Args:
    base: the model the experts were trained from, in any form that
      `model_files.find` knows.
    experts: the models to merge, likewise.
    output: replaced if it exists, when the new one is complete.
    config: how.
    dtype: of the tensors; None is that of the base.
    max_file_bytes: more are split over several files.
    description: what the progress bar says.

  Raises:
    UserError: as `run`.
  """
  config.check_experts(len(experts))
  sources = [model_files.find(os.fspath(base), field='base')]
  for i, expert in enumerate(experts):
    field = f'experts.{i}'
    sources.append(model_files.find(os.fspath(expert), field=field))
    _check(sources[0], sources[-1], field, config)
  stored = sources[0].dtype if dtype is None else np.dtype(dtype)
  count, coefficients = multihost.on_primary(lambda: _write(
      sources, pathlib.Path(output).absolute(), config=config, dtype=stored,
      max_file_bytes=max_file_bytes, description=description))
  return Summary(
      num_parameters=count, coefficients=tuple(coefficients), dtype=stored)


def _check(
    base: model_files.Source,
    expert: model_files.Source,
    field: str,
    config: merge_lib.MergeConfig,
) -> None:
  """Raises UserError unless an expert may have been trained from the base."""
  for name in (f.name for f in dataclasses.fields(architecture.ModelConfig)):
    there, here = getattr(expert.model, name), getattr(base.model, name)
    if there != here:
      raise types.UserError(
          f'{field}={expert.name} has {name}={there}, but base={base.name} has '
          f'{name}={here}; only models of one architecture can be merged.')
  if config.method != 'linear' and (
      mirror.absolute(expert.name) == mirror.absolute(base.name)):
    raise types.UserError(
        f'{field}={expert.name} is the base; name as base the model that all '
        'experts were trained from.')


def _write(
    sources: Sequence[model_files.Source],
    output: pathlib.Path,
    *,
    config: merge_lib.MergeConfig,
    dtype: np.dtype,
    max_file_bytes: int,
    description: str,
) -> tuple[int, list[float]]:
  """Writes the directory; parameters, and the experts' mean coefficients."""
  model, directory = sources[0].model, sources[0].directory
  stop_ids, pad_id = _ids(sources)
  small_files = huggingface_writing.small_files(
      model, source=directory, dtype=dtype, stop_ids=stop_ids, pad_id=pad_id)
  layouts: Any = jax.tree_util.tree_leaves_with_path(
      huggingface_layout.layouts(model))
  total = sum(math.prod(layout.shape) for _, layout in layouts)
  readers = [source.open() for source in sources]
  weighted = np.zeros(len(sources) - 1)
  with progress.Progress(total, description, unit='parameter') as bar:

    def count(merged: merge_lib.Merged) -> None:
      weighted[...] += merged.coefficients * merged.value.size
      bar.advance(merged.value.size)

    huggingface_writing.write(
        output, _merged(readers, layouts, config, dtype, count), model,
        small_files=small_files, source=directory, dtype=dtype,
        max_file_bytes=max_file_bytes)
  return total, (weighted / total).tolist()


def _merged(
    readers: Sequence[model_files.Reader],
    layouts: Sequence[tuple[Any, huggingface_layout.Layout]],
    config: merge_lib.MergeConfig,
    dtype: np.dtype,
    count: Callable[[merge_lib.Merged], None],
) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor by name, parameter after parameter."""
  for path, layout in layouts:
    names = tuple(key.key for key in path)
    stored = [read(names, layout) for read in readers]
    for name in layout.tensor_names():
      # Not by `zip`, which would hold the last tensors while it reads others.
      base, *experts = map(next, stored)
      merged = merge_lib.matrix(base, experts, config=config, dtype=dtype)
      del base, experts
      if not np.isfinite(merged.value).all():
        raise types.UserError(
            f'{name} would not be finite in {dtype.name}; choose another '
            'dtype, or see which of the models to merge is damaged.')
      count(merged)
      yield name, merged.value
      del merged


def _ids(
    sources: Sequence[model_files.Source],
) -> tuple[tuple[int, ...], int | None]:
  """What ends a response of any expert, or of a base that is a run; padding.

  What the base's own files say is carried along with them.
  """
  stop_ids, pad_ids = [*sources[0].stop_ids], [sources[0].pad_id]
  for source in sources[1:]:
    ids: Any = list(source.stop_ids)
    pad_id = source.pad_id
    path = source.directory / huggingface_directory.GENERATION_FILE
    if not ids and path.is_file():
      generation = huggingface_directory.read_json(path)
      ids = generation.get('eos_token_id', [])
      pad_id = generation.get('pad_token_id')
    stop_ids += ids if isinstance(ids, list) else [ids]
    pad_ids.append(pad_id)
  return (tuple(dict.fromkeys(stop_ids)),
          next((i for i in pad_ids if i is not None), None))

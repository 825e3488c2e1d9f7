"""A checkpoint's files from its tensors, which come one at a time.

They may come in any order: layer after layer, as `huggingface.save` makes
them, or parameter after parameter. The files are the same.
"""

import math
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from longjax import types
from longjax.model import (
    architecture,
    huggingface_config,
    huggingface_directory,
    huggingface_layout,
    tensor_file,
)

_SPECIAL_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def small_files(
    config: architecture.ModelConfig,
    *,
    source: pathlib.Path | None,
    dtype: np.dtype,
    stop_ids: Sequence[int],
    pad_id: int | None,
) -> dict[str, dict[str, Any]]:
  """The content of config.json and generation_config.json, by name.

  See `huggingface.save` for what is asked and carried along.

  Raises:
    UserError: the source has no tokenizer, or no family of Hugging Face
      computes this network.
  """
  fields = huggingface_config.to_json(config) | {'torch_dtype': dtype.name}
  if stop_ids:
    fields['eos_token_id'] = stop_ids[0]
  if pad_id is not None:
    fields['pad_token_id'] = pad_id
  carried, generation = _carried(source)
  return {
      huggingface_directory.CONFIG_FILE: fields | carried,
      huggingface_directory.GENERATION_FILE: huggingface_directory.with_ids(
          generation, stop_ids=stop_ids, pad_id=pad_id)}


def write(
    directory: pathlib.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    config: architecture.ModelConfig,
    *,
    small_files: Mapping[str, Mapping[str, Any]],
    source: pathlib.Path | None,
    dtype: np.dtype,
    max_file_bytes: int,
) -> None:
  """Writes a checkpoint under a temporary name and renames it when complete.

  Args:
    directory: replaced if it exists.
    tensors: every name once, and its values of `dtype`.
    config: of the model.
    small_files: JSON files by name.
    source: directory whose tokenizer is copied; None copies none.
    dtype: of all tensors.
    max_file_bytes: more are split over several files.

  Raises:
    UserError: the directory cannot be written.
  """
  try:
    with huggingface_directory.replacing(directory) as temporary:
      for name, content in small_files.items():
        huggingface_directory.write_json(temporary / name, content)
      if source is not None:
        for path in huggingface_directory.tokenizer_files(source):
          shutil.copyfile(path, temporary / path.name)
      _write_tensors(
          temporary, tensors, huggingface_layout.layouts(config), dtype,
          max_file_bytes)
  except OSError as error:
    raise types.UserError(
        f'cannot write checkpoint {directory}: {error.strerror}.') from error


def _carried(
    source: pathlib.Path | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """What stays of config.json, and generation_config.json.

  A source without tokenizer is refused.
  """
  if source is None:
    return {}, {}
  huggingface_directory.tokenizer_files(source)
  fields = huggingface_config.harmless(source)
  path = source / huggingface_directory.GENERATION_FILE
  if path.is_file():
    return fields, huggingface_directory.read_json(path)
  return fields, {name: fields[name] for name in _SPECIAL_IDS
                  if fields.get(name) is not None}


def _write_tensors(
    directory: pathlib.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    layouts: Any,
    dtype: np.dtype,
    max_file_bytes: int,
) -> None:
  """The weights; a file is opened for its first tensor, closed by its last."""
  shapes = {
      name: layout.tensor_shape
      for _, layout, layer in huggingface_layout.in_file_order(layouts)
      for name in layout.tensor_names(layer)}
  sizes = {name: math.prod(shape) * dtype.itemsize
           for name, shape in shapes.items()}
  split = tensor_file.split(sizes.items(), max_bytes=max_file_bytes)
  files = huggingface_directory.file_names(len(split))
  names_of = dict(zip(files, split, strict=True))
  file_of = {name: file for file, names in names_of.items() for name in names}
  writers: dict[str, tensor_file.Writer] = {}
  missing = set(shapes)
  try:
    for name, array in tensors:
      file = file_of[name]
      if file not in writers:
        writers[file] = tensor_file.Writer(
            directory / file, {n: shapes[n] for n in names_of[file]}, dtype)
      writers[file].write(name, array)
      missing.remove(name)
      del array  # Before the next one is made.
      if not writers[file].missing:
        writers.pop(file).close()
  finally:
    for writer in writers.values():
      writer.abandon()
  assert not missing, missing
  if len(files) > 1:
    huggingface_directory.write_index(directory, file_of, sum(sizes.values()))

"""A model directory as Hugging Face lays it out: which files, and whose.

  config.json                   see `huggingface_config`
  model.safetensors             or several files and
  model.safetensors.index.json  tensor -> file
  generation_config.json        stop tokens and sampling, for other programs
  tokenizer.json, ...           the tokenizer, carried along unread
"""

import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from longjax import types
from longjax.model import tensor_file

CONFIG_FILE = 'config.json'
GENERATION_FILE = 'generation_config.json'
_WEIGHTS_FILE = 'model.safetensors'
_INDEX_FILE = 'model.safetensors.index.json'
_TOKENIZER_FILES = (
    'tokenizer.model', 'tokenizer.json', 'tokenizer_config.json',
    'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
    'chat_template.jinja', 'chat_template.json',
)


def is_model(directory: pathlib.Path) -> bool:
  """Whether config.json there is a model's, and not a run's or missing."""
  path = directory / CONFIG_FILE
  return path.is_file() and 'model_type' in read_json(path)


def tensors(directory: pathlib.Path) -> dict[str, tensor_file.Tensor]:
  """All tensors by name; files are checked to be whole.

  Raises:
    UserError: a file is missing or damaged, or the index does not agree with
      the files.
  """
  index = directory / _INDEX_FILE
  if not index.exists():
    return {
        tensor.name: tensor
        for tensor in tensor_file.read_header(directory / _WEIGHTS_FILE)}
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict):
    raise types.UserError(f'{index} holds no weight_map.')
  found: dict[str, tensor_file.Tensor] = {}
  for name in sorted(set(map(str, weight_map.values()))):
    if pathlib.PurePath(name).name != name:
      raise types.UserError(f'{index} names {name!r}, which is no file of it.')
    for tensor in tensor_file.read_header(directory / name):
      place = weight_map.get(tensor.name)
      if place != name:
        raise types.UserError(
            f'{index} says that {tensor.name} is in {place}, but it is in '
            f'{name}; the files do not belong together.')
      found[tensor.name] = tensor
  missing = sorted(weight_map.keys() - found.keys())
  if missing:
    raise types.UserError(
        f'{index} says that {missing[0]} is in {weight_map[missing[0]]}, but '
        'it is not; the files do not belong together.')
  return found


def file_names(count: int) -> list[str]:
  """What `count` files of weights are called."""
  if count == 1:
    return [_WEIGHTS_FILE]
  return [f'model-{i + 1:05}-of-{count:05}.safetensors' for i in range(count)]


def write_index(
    directory: pathlib.Path, weight_map: Mapping[str, str], total_size: int
) -> None:
  """Writes which tensor is in which of several files."""
  write_json(directory / _INDEX_FILE, {
      'metadata': {'total_size': total_size}, 'weight_map': weight_map})


def tokenizer_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The tokenizer's files; UserError if there are none."""
  found = [directory / name for name in _TOKENIZER_FILES
           if (directory / name).is_file()]
  if not found:
    raise types.UserError(
        f'{directory} holds no tokenizer files '
        f'({", ".join(_TOKENIZER_FILES[:3])}, ...).')
  return found


def with_ids(
    generation: Mapping[str, Any],
    *,
    stop_ids: Sequence[int],
    pad_id: int | None,
) -> dict[str, Any]:
  """The content of generation_config.json, these tokens among its own."""
  content = dict(generation)
  ids = content.get('eos_token_id')
  if not isinstance(ids, list):
    ids = [] if ids is None else [ids]
  missing = [i for i in stop_ids if i not in ids]
  if missing:
    ids = [*ids, *missing]
    content['eos_token_id'] = ids if len(ids) > 1 else ids[0]
  if pad_id is not None and content.get('pad_token_id') is None:
    content['pad_token_id'] = pad_id
  return content


@contextmanager
def replacing(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary directory that is put in place of `directory` at the end.

  After an exception everything is as it was.
  """
  temporary = directory.with_name(directory.name + '.tmp')
  old = directory.with_name(directory.name + '.old')
  shutil.rmtree(temporary, ignore_errors=True)  # Of a process that was killed.
  try:
    temporary.mkdir(parents=True)
    yield temporary
    if directory.exists():
      shutil.rmtree(old, ignore_errors=True)
      directory.rename(old)
    try:
      temporary.rename(directory)
    except OSError:
      if old.exists():
        old.rename(directory)
      raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  shutil.rmtree(old, ignore_errors=True)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; UserError names the file that has none."""
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise types.UserError(
        f'cannot read {path}: {error}; is it a Qwen checkpoint?') from error
  if not isinstance(content, dict):
    raise types.UserError(f'{path} holds no JSON object.')
  return content


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Writes a JSON object with sorted keys."""
  path.write_text(
      json.dumps(content, indent=2, sort_keys=True) + '\n', encoding='utf-8')

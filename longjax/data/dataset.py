"""Examples on disk: an ArrayRecord data set in TensorFlow Datasets' layout.

  DIRECTORY/NAME/1.0.0/dataset_info.json, features.json,
                       NAME-SPLIT.array_record-00000, ...

Any TFDS program reads it: `tfds.data_source(NAME, data_dir=DIRECTORY,
split=SPLIT)`; TensorFlow is not needed. The data set is written beside its
place and renamed when complete, so what can be read is whole.
"""

import contextlib
import itertools
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import overload

import tensorflow_datasets as tfds

from longjax import types
from longjax.data import example_records

VERSION = '1.0.0'

_INFO_FILE = 'dataset_info.json'
_MAX_EXAMPLES_PER_SHARD = 10_000
# The writer rewrites its metadata after every call.
_EXAMPLES_PER_CALL = 512


class Examples(Sequence[types.TaskExample]):
  """Examples that are read one at a time, when they are asked for."""

  def __init__(
      self, num_examples: int, read_one: Callable[[int], types.TaskExample]
  ):
    """Reads nothing yet; use `read`, `of_ids` or `of_tasks`."""
    self._num_examples = num_examples
    self._read_one = read_one

  def __len__(self) -> int:
    return self._num_examples

  @overload
  def __getitem__(self, index: int) -> types.TaskExample: ...

  @overload
  def __getitem__(self, index: slice) -> list[types.TaskExample]: ...

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    if not -len(self) <= index < len(self):
      raise IndexError(f'example {index} of {len(self)}')
    return self._read_one(int(index) % len(self))

  def __iter__(self) -> Iterator[types.TaskExample]:
    return (self[i] for i in range(len(self)))


def of_ids(
    splits: Mapping[str, Sequence[types.TaskExample]],
    chosen: Sequence[tuple[str, str]],
) -> Sequence[types.TaskExample]:
  """Examples by split and id, in this order; read when they are asked for."""
  places = {
      (name, example.id): (splits[name], i)
      for name in dict.fromkeys(split for split, _ in chosen)
      for i, example in enumerate(splits[name])}
  found = [places[one] for one in chosen]

  def read_one(index: int) -> types.TaskExample:
    examples, i = found[index]
    return examples[i]

  return Examples(len(found), read_one)


def of_tasks(
    examples: Sequence[types.TaskExample], tasks: Sequence[str]
) -> Sequence[types.TaskExample]:
  """The examples of these tasks, in order; of all tasks if none is named.

  Raises:
    UserError: a task has no examples.
  """
  if not tasks:
    return examples
  task_of = [example.task for example in examples]
  missing = [task for task in tasks if task not in task_of]
  if missing:
    raise types.UserError(
        f'tasks={tuple(tasks)}: the split has no examples of '
        f'{", ".join(missing)}, only of {", ".join(sorted(set(task_of)))}.')
  indices = [i for i, task in enumerate(task_of) if task in tasks]
  return Examples(len(indices), lambda i: examples[indices[i]])


def write(
    directory: str | os.PathLike[str],
    splits: Mapping[str, Iterable[types.TaskExample]],
    *,
    name: str = 'longjax_examples',
) -> None:
  """Writes a data set, example by example, then renames it into place.

  Args:
    directory: what to make; an interrupted attempt beside it is removed.
    splits: the examples of each split, in order; may be generators.
    name: of the data set: lower-case letters, digits and underscores.

  Raises:
    UserError: `directory` exists already, a split is empty or has a name that
      TFDS would not read back, or the disk is full.
  """
  for split in splits:
    if not re.fullmatch(r'\w+', split) or split == 'all':
      raise types.UserError(
          f'a split cannot be named {split!r}; use letters, digits and '
          "underscores, and not 'all'.")
  path = pathlib.Path(directory)
  if path.exists():
    raise types.UserError(
        f'{path} exists already; delete it to write the data set again.')
  temporary = path.with_name(f'.{path.name}.incomplete')
  shutil.rmtree(temporary, ignore_errors=True)
  version_directory = temporary / name / VERSION
  with _reporting_full_disk(path, temporary):
    version_directory.mkdir(parents=True)
  info = tfds.core.DatasetInfo(
      builder=tfds.core.DatasetIdentity(
          name=name, version=tfds.core.Version(VERSION),
          data_dir=str(version_directory), module_name=__name__),
      features=example_records.features(),
      description='Verifiable questions over documents.',
  )
  writer = tfds.core.SequentialWriter(
      info, max_examples_per_shard=_MAX_EXAMPLES_PER_SHARD,
      file_format='array_record')
  writer.initialize_splits(list(splits))
  for split, examples in splits.items():
    records = map(example_records.to_record, examples)
    num_examples = 0
    while chunk := list(itertools.islice(records, _EXAMPLES_PER_CALL)):
      with _reporting_full_disk(path, temporary):
        writer.add_examples({split: chunk})
      num_examples += len(chunk)
    with _reporting_full_disk(path, temporary):
      writer.close_splits([split])
    if not num_examples:
      raise types.UserError(
          f'split {split!r} of {path} has no examples; leave the split out or '
          'ask for more examples.')
  os.rename(temporary, path)


@contextlib.contextmanager
def _reporting_full_disk(
    path: pathlib.Path, temporary: pathlib.Path) -> Iterator[None]:
  """Frees what was written and says so in one line."""
  try:
    yield
  except (OSError, RuntimeError) as e:  # ArrayRecord raises RuntimeError.
    shutil.rmtree(temporary, ignore_errors=True)
    raise types.UserError(
        f'{path} cannot be written ({str(e).splitlines()[0]}); make room or '
        'choose another directory.') from e


def is_complete(directory: str | os.PathLike[str]) -> bool:
  """Whether `write` has finished there."""
  return bool(_version_directories(pathlib.Path(directory)))


def split_names(directory: str | os.PathLike[str]) -> list[str]:
  """The splits of a data set, sorted.

  Raises:
    UserError: there is no data set, or it is damaged.
  """
  path = pathlib.Path(directory)
  found = _find(path)
  try:
    return sorted(tfds.builder_from_directory(found).info.splits)
  except Exception as e:  # JSON, protobuf and TFDS raise types of their own.
    raise types.UserError(
        f'{path}: its {_INFO_FILE} or features.json is damaged; delete the '
        'directory and write it again.') from e


def read(directory: str | os.PathLike[str], split: str) -> Examples:
  """Opens a split for random access.

  Raises:
    UserError: there is no data set, no such split, or it is damaged.
  """
  path = pathlib.Path(directory)
  found = _find(path)
  names = split_names(path)
  if split not in names:
    raise types.UserError(
        f'{path} has no split {split!r}; it has {", ".join(names)}.')
  try:
    source = tfds.data_source(
        f'{found.parent.name}:{found.name}', data_dir=path, split=split)
  except Exception as e:  # TFDS and ArrayRecord raise types of their own.
    raise types.UserError(
        f'{path}: split {split!r} is damaged; delete the directory and write '
        'it again.') from e

  def read_one(index: int) -> types.TaskExample:
    try:
      record = source[index]
    except Exception as e:  # ArrayRecord raises types of its own.
      raise types.UserError(
          f'{path}: example {index} of split {split!r} is damaged; delete the '
          'directory and write it again.') from e
    return example_records.from_record(record)

  return Examples(len(source), read_one)


def _version_directories(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p.parent for p in path.glob(f'*/*/{_INFO_FILE}'))


def _find(path: pathlib.Path) -> pathlib.Path:
  """The one data set under a directory."""
  found = _version_directories(path)
  if len(found) != 1:
    raise types.UserError(
        f'{path} holds {len(found) or "no"} data sets; give a directory '
        'written by a synth job.')
  return found[0]

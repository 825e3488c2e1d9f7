"""Files of one JSON record a line that survive a kill at any byte.

The newline commits a record: a last line without one is torn, was never
acknowledged, and is dropped by the next reader or writer. Numbers are written
with `repr` precision, so equal files mean bit-equal numbers; NaN and infinity
are written as Python's json writes them (`NaN`, `Infinity`).
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from longjax import types

Record = dict[str, Any]


class Appender:
  """Adds records to a file, each in one write that reaches the system.

  A process killed after `append` returns has not lost the record; a power cut
  may cost the last few, never the file.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(self._path)
    self._file = open(self._path, 'ab', buffering=0)

  def append(self, record: Mapping[str, Any]) -> None:
    """Adds one record.

    Raises:
      UserError: the disk is full or the file cannot be written. The file then
        holds what it held before.
    """
    # Python strings may hold lone surrogates, which strict UTF-8 refuses.
    text = json.dumps(record, ensure_ascii=False) + '\n'
    line = text.encode('utf-8', 'surrogatepass')
    size = os.fstat(self._file.fileno()).st_size
    try:
      num_written = self._file.write(line)
      if num_written != len(line):
        raise OSError(f'{num_written} of {len(line)} bytes were accepted')
    except OSError as error:
      os.ftruncate(self._file.fileno(), size)
      raise types.UserError(
          f'cannot write to {self._path}: {error}; free some space or choose '
          'another work directory, then run the same command again.'
      ) from error

  def close(self) -> None:
    """Closes the file; call `append` no more."""
    self._file.close()


def read(path: str | os.PathLike[str]) -> list[Record]:
  """The records of a file, oldest first; none if there is no such file.

  Raises:
    UserError: a committed line is no JSON object; names file and line.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  records = []
  # Only b'\n' ends a record: text may hold other line separators.
  for number, line in enumerate(path.read_bytes().split(b'\n')[:-1], start=1):
    records.append(_parse(line, path, number))
  return records


def truncate(path: str | os.PathLike[str], *, step: int) -> None:
  """Drops the records of a file whose 'step' is greater than `step`.

  What stays keeps its bytes. The new file replaces the old one in one rename,
  so a kill leaves one of the two.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return
  temporary = path.with_name(path.name + '.tmp')
  with open(path, 'rb') as old, open(temporary, 'wb') as new:
    for number, line in enumerate(old, start=1):
      is_torn = not line.endswith(b'\n')
      if not is_torn and _parse(line, path, number)['step'] <= step:
        new.write(line)
  os.replace(temporary, path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes a whole file in one rename: readers see the old or the new one.

  Raises:
    UserError: the disk is full or the file cannot be written; an old file
      stays as it was.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + '.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(text.encode('utf-8', 'replace'))
    os.replace(temporary, path)
  except OSError as error:
    raise types.UserError(
        f'cannot write {path}: {error}; free some space or choose another '
        'work directory, then run the same command again.') from error


def _parse(line: bytes, path: pathlib.Path, number: int) -> Record:
  try:
    record = json.loads(line)
  except ValueError:
    record = None
  if not isinstance(record, dict):
    raise types.UserError(
        f'{path}:{number} is damaged: {line[:40]!r} is no JSON object; delete '
        'the line, then run the same command again.')
  return record


def _drop_torn_line(path: pathlib.Path) -> None:
  """Cuts a file after its last newline."""
  if not path.exists():
    return
  with open(path, 'r+b') as file:
    end = file.seek(0, os.SEEK_END)
    tail = b''
    while end > 0 and b'\n' not in tail:
      start = max(0, end - 65536)
      file.seek(start)
      tail = file.read(end - start)
      end = start
    file.truncate(end + tail.rfind(b'\n') + 1)

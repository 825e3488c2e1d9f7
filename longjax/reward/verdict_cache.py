"""Verdicts on disk: a run that is killed and resumed gets the same ones.

One JSON object a line, only ever appended to, so that it survives a kill at
any byte: the newline commits a verdict, and a last line without one is dropped
by the next writer. Lines that something else damaged are passed over.
"""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

from absl import logging

from longjax import types
from longjax.reward import judge

# About 200 bytes of memory each.
_MAX_ENTRIES = 1_000_000


class VerdictCache:
  """Verdicts by `judge.cache_key`, in a file and the newest in memory.

  One process writes the file; it may do so from one thread only.
  """

  def __init__(
      self,
      path: str | os.PathLike[str],
      *,
      max_entries: int = _MAX_ENTRIES,
  ):
    """Reads what there is.

    Args:
      path: of the file; it and its folder are made if they are missing.
      max_entries: verdicts held in memory. Older ones stay in the file but
        are not found.

    Raises:
      UserError: the file cannot be read or written.
    """
    self._path = pathlib.Path(path)
    self._max_entries = max_entries
    # By digest, oldest first.
    self._verdicts: dict[bytes, judge.Verdict] = {}
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._file = open(self._path, 'a+b', buffering=0)
      for key, verdict in self._committed():
        self._keep(key, verdict)
    except OSError as error:
      raise self._error(error) from error

  def __len__(self) -> int:
    return len(self._verdicts)

  def get(self, key: str) -> judge.Verdict | None:
    """The verdict of a key; None if it is not known."""
    return self._verdicts.get(bytes.fromhex(key))

  def put(self, key: str, verdict: judge.Verdict) -> None:
    """Remembers a verdict, in one write that reaches the system.

    Raises:
      UserError: the disk is full or the file cannot be written. The file then
        holds what it held before.
    """
    line = json.dumps({'key': key, 'verdict': verdict.value}) + '\n'
    size = os.fstat(self._file.fileno()).st_size
    try:
      num_written = self._file.write(line.encode())
      if num_written != len(line):
        raise OSError(f'{num_written} of {len(line)} bytes were accepted')
    except OSError as error:
      os.ftruncate(self._file.fileno(), size)
      raise self._error(error) from error
    self._keep(key, verdict)

  def close(self) -> None:
    """Closes the file; call `put` no more."""
    self._file.close()

  def _keep(self, key: str, verdict: judge.Verdict) -> None:
    self._verdicts[bytes.fromhex(key)] = verdict
    if len(self._verdicts) > self._max_entries:
      del self._verdicts[next(iter(self._verdicts))]

  def _committed(self) -> Iterator[tuple[str, judge.Verdict]]:
    """What the file holds; cuts off a torn last line."""
    end = num_damaged = 0
    for line in _lines(self._file):
      if not line.endswith(b'\n'):
        self._file.truncate(end)
        break
      end += len(line)
      try:
        record = json.loads(line)
        verdict = judge.Verdict(record['verdict'])
        bytes.fromhex(record['key'])
      except (ValueError, KeyError, TypeError, RecursionError):
        num_damaged += 1
        continue
      yield record['key'], verdict
    if num_damaged:
      logging.warning(
          '%s: %d damaged lines are passed over; their verdicts are asked '
          'for again.', self._path, num_damaged)

  def _error(self, error: OSError) -> types.UserError:
    return types.UserError(
        f'cannot use {self._path}: {error}; free some space or choose another '
        'work directory, then run the same command again.')


def _lines(file: BinaryIO) -> Iterator[bytes]:
  """The lines of an unbuffered file from its beginning, the last may be torn.

  The file's own iterator would ask the system for every byte.
  """
  file.seek(0)
  rest = b''
  while block := file.read(1 << 20):
    *whole, rest = (rest + block).split(b'\n')
    yield from (line + b'\n' for line in whole)
  if rest:
    yield rest

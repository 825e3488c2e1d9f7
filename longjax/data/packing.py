"""A stream of groups becomes batches of packed rows.

Element i of the stream is a function of i, so the state of the iterator is a
position and the positions of the few elements that were drawn but did not fit
yet. A restored iterator continues with the same bits.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import grain

from longjax import rows, types


def pack_groups(
    groups: grain.MapDataset,
    *,
    num_rows: int,
    row_len: int,
    lookahead: int = 16,
) -> grain.IterDataset:
  """Packs an endless random-access stream of `rows.Group` into batches.

  Args:
    groups: element i is a function of i alone; each fits into a row.
    num_rows: B.
    row_len: T.
    lookahead: groups drawn ahead, at most, when a batch is full.

  Returns:
    A dataset of `rows.Rows`. Responses are numbered through each batch. The
    iterator's `get_state()` is a small dict that survives JSON; `set_state`
    continues exactly, given the same data and configuration.
  """
  return _PackedDataset(
      groups, num_rows=num_rows, row_len=row_len, lookahead=lookahead)


class _PackedDataset(grain.IterDataset[rows.Rows]):
  """See `pack_groups`."""

  def __init__(
      self, parent: grain.MapDataset, *, num_rows: int, row_len: int,
      lookahead: int):
    super().__init__(parent)
    self._sizes = dict(
        num_rows=num_rows, row_len=row_len, lookahead=lookahead)

  def __iter__(self) -> '_PackedIterator':
    return _PackedIterator(self._parent, **self._sizes)

  def __str__(self) -> str:
    return f'_PackedDataset({self._sizes})'


class _PackedIterator(grain.DatasetIterator[rows.Rows]):
  """Fills rows first-fit."""

  def __init__(
      self, groups: grain.MapDataset, *, num_rows: int, row_len: int,
      lookahead: int):
    super().__init__()
    self._groups = groups
    self._num_rows = num_rows
    self._row_len = row_len
    self._lookahead = lookahead
    self._next_index = 0
    # Drawn, not yet packed, oldest first.
    self._waiting: dict[int, rows.Group] = {}

  def __next__(self) -> rows.Rows:
    used = [0] * self._num_rows
    placed: list[list[rows.Group]] = [[] for _ in used]

    def place(group: rows.Group) -> bool:
      size = group.num_tokens
      for r in range(self._num_rows):
        if used[r] + size <= self._row_len:
          used[r] += size
          placed[r].append(group)
          return True
      return False

    # Longest first leaves the least padding; the oldest goes before them
    # into an empty row, so nothing waits forever.
    order = sorted(self._waiting, key=lambda i: -self._waiting[i].num_tokens)
    oldest = min(self._waiting, default=None)
    order.sort(key=lambda i: i != oldest)
    packed = {i for i in order if place(self._waiting[i])}
    self._waiting = {
        i: g for i, g in self._waiting.items() if i not in packed}
    while len(self._waiting) < self._lookahead:
      group = self._groups[self._next_index]
      if group.num_tokens > self._row_len:
        raise types.UserError(
            f'a group of {group.num_tokens} tokens does not fit into '
            f'row_len={self._row_len}; raise it or use shorter texts.')
      if not place(group):
        self._waiting[self._next_index] = group
      self._next_index += 1
    return _to_rows(placed, row_len=self._row_len)

  def get_state(self) -> dict[str, Any]:
    return {
        'next_index': self._next_index,
        'waiting': list(self._waiting),
        'sizes': [self._num_rows, self._row_len, self._lookahead],
    }

  def set_state(self, state: dict[str, Any]) -> None:
    sizes = [self._num_rows, self._row_len, self._lookahead]
    if list(state['sizes']) != sizes:
      raise types.UserError(
          '[num_rows, row_len, lookahead] of the SFT data was '
          f'{list(state["sizes"])} when the state was saved and is {sizes} '
          'now; restore the old values or start in a new work directory.')
    self._next_index = int(state['next_index'])
    self._waiting = {int(i): self._groups[int(i)] for i in state['waiting']}


def _to_rows(
    placed: Sequence[Sequence[rows.Group]], *, row_len: int) -> rows.Rows:
  """Writes groups into the rows they were given; [len(placed), row_len]."""
  numbers = itertools.count()
  return rows.write([
      [dataclasses.replace(group, branches=[
          dataclasses.replace(branch, trajectory=next(numbers))
          for branch in group.branches]) for group in row_groups]
      for row_groups in placed], row_len=row_len)

"""Which row each group of a batch stands in; lengths only, no tokens.

The update computes micro-batches of `num_rows` rows, each of one of a few row
lengths T_1 < .. < T_K, and compiles one program for each length. A row holds
several groups. What it computes beside them is waste: places no group needs,
rows that only fill up a micro-batch, and copies of a prefix.

A group stands in one row. Only if it is longer than T_K are its branches spread
over rows, as few as can hold them, each with a copy of the prefix.

Micro-batches of the longest rows hold groups of any length, and waste least
where rows are many. Shorter ones are there for what is left over, and for
groups of more than half a row. How many of those to take is tried out: for each
choice groups go, longest first, into the row with the least room that holds
them (best-fit decreasing), the longest rows being opened as they are needed.
The choice that computes the fewest places is taken, each micro-batch counted as
a few more than it has.

Every micro-batch has the same number of rows, rather than the same number of
tokens: groups that are short as a whole stand side by side in long rows just as
well, so short rows are worth having only if a micro-batch of them is small.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from longjax import types

# So many choices are tried that about so many pieces are placed in all of them;
# where pieces are many, each matters less.
_MOST_PLACED = 60_000

# What a micro-batch costs whatever its length, as a share of what one of the
# longest rows costs: weights are gathered, gradients are added.
_COST_OF_MICRO_BATCH = 0.02

# At most about so many ways to share rows are tried for a group.
_MOST_TRIES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
  """Tokens of a group in a row.

  Attributes:
    prefix: of what its branches share.
    branches: of each branch.
  """

  prefix: int
  branches: tuple[int, ...]

  def pairs(self, branches: Sequence[int]) -> int:
    """Twice the pairs of tokens that see each other, about."""
    return self.prefix**2 + sum(
        (2 * self.prefix + self.branches[b]) * self.branches[b]
        for b in branches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
  """A group in a row, or a part of it.

  Attributes:
    group: its number.
    branches: numbers of those that stand here, beside the prefix.
    num_tokens: of both.
  """

  group: int
  branches: tuple[int, ...]
  num_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
  """Rows computed at once; those at the end may be empty."""

  row_len: int
  rows: tuple[tuple[Piece, ...], ...]


def place(
    groups: Sequence[Lengths],
    *,
    row_lens: Sequence[int],
    num_rows: int,
) -> list[MicroBatch]:
  """Gives every branch of every group a place in a row.

  Args:
    groups: what to place.
    row_lens: the lengths rows may have, increasing; the last holds any prefix
      with any one of its branches.
    num_rows: of every micro-batch.

  Returns:
    Micro-batches, the longest first; a single empty one if there are no groups.
    Rows of like work stand together, for the slowest sets the time.

  Raises:
    UserError: a prefix and one branch are longer than the longest row.
  """
  pieces = [
      piece for i in range(len(groups))
      for piece in _pieces(groups[i], i, row_len=row_lens[-1])]
  pieces.sort(key=lambda piece: -piece.num_tokens)
  sizes = [piece.num_tokens for piece in pieces]

  def cost(lens: Sequence[int]) -> float:
    return sum(lens) + _COST_OF_MICRO_BATCH * row_lens[-1] * len(lens)

  best = [_Row(row_len=row_lens[0]) for _ in range(num_rows)]
  least = float('inf')
  for short in _choices(sizes, row_lens=row_lens, num_rows=num_rows):
    if cost(short) >= least:
      continue
    filled = _fill(sizes, short, longest=row_lens[-1], num_rows=num_rows)
    found = cost([row.row_len for row in filled])
    if found < least:
      best, least = filled, found

  def work(row: _Row) -> int:
    return sum(
        groups[pieces[i].group].pairs(pieces[i].branches) for i in row.pieces)

  best.sort(key=lambda row: (-row.row_len, -work(row)))
  return [
      MicroBatch(row_len=best[start].row_len, rows=tuple(
          tuple(pieces[i] for i in row.pieces)
          for row in best[start:start + num_rows]))
      for start in range(0, len(best), num_rows)]


@dataclasses.dataclass(kw_only=True)
class _Row:
  """A row being filled: its length, and which pieces stand in it."""

  row_len: int
  pieces: list[int] = dataclasses.field(default_factory=list)


def _pieces(group: Lengths, number: int, *, row_len: int) -> Iterator[Piece]:
  """The group whole, or in as few pieces as rows of `row_len` allow."""
  size = group.prefix + sum(group.branches)
  if size <= row_len:
    yield Piece(group=number, branches=tuple(range(len(group.branches))),
                num_tokens=size)
    return
  if group.prefix + max(group.branches) > row_len:
    raise types.UserError(
        f'a prompt of {group.prefix + 1} tokens with a response of '
        f'{max(group.branches)} does not fit into the longest row of '
        f'{row_len}; use longer rows or lower the length caps.')
  for branches in _fewest_rows(group.branches, row_len - group.prefix):
    yield Piece(
        group=number, branches=tuple(sorted(branches)),
        num_tokens=group.prefix + sum(group.branches[b] for b in branches))


def _fewest_rows(lens: Sequence[int], room: int) -> list[list[int]]:
  """Numbers of the lengths that share a row of `room`, in the fewest rows.

  The first rows that are tried are those of first-fit decreasing. Should the
  search take too long, there may be a row too many, as there may be with
  first-fit decreasing.
  """
  order = sorted(range(len(lens)), key=lambda i: -lens[i])

  def put(at: int, rows: list[list[int]], tries: Iterator[int]) -> bool:
    """Finds places for `order[at:]`; False if there are none."""
    if at == len(order):
      return True
    seen = set()
    for row in rows:
      used = sum(lens[i] for i in row)
      # Rows filled alike would only repeat the search.
      if used in seen or used + lens[order[at]] > room:
        continue
      seen.add(used)
      row.append(order[at])
      if put(at + 1, rows, tries):
        return True
      row.pop()
      if next(tries, None) is None:
        break
    return False

  for number in range(-(-sum(lens) // room), len(lens) + 1):
    rows: list[list[int]] = [[] for _ in range(number)]
    if put(0, rows, iter(range(_MOST_TRIES))):
      return rows
  raise AssertionError('a row each is enough.')


def _choices(
    sizes: Sequence[int], *, row_lens: Sequence[int], num_rows: int
) -> Iterator[tuple[int, ...]]:
  """Lengths of short rows to lay out before the longest, one choice a time.

  From none to as many micro-batches of each length as could hold everything,
  evenly spaced if those are too many to try. Without pieces there is no choice.
  """
  if not sizes:
    return
  short = row_lens[:-1]
  most_each = max(int(
      (_MOST_PLACED / len(sizes)) ** (1 / max(len(short), 1))), 2)
  numbers = []
  for row_len in short:
    most = -(-sum(sizes) // (num_rows * row_len))
    step = max(most / most_each, 1)
    numbers.append([round(i * step) for i in range(int(most / step) + 1)])
  for choice in itertools.product(*numbers):
    yield tuple(
        row_len for number, row_len in zip(choice, short)
        for _ in range(number * num_rows))


def _fill(
    sizes: Sequence[int],
    short: Sequence[int],
    *,
    longest: int,
    num_rows: int,
) -> list[_Row]:
  """Best-fit decreasing.

  Args:
    sizes: of the pieces, decreasing.
    short: lengths of the rows there are.
    longest: length of the rows that are opened where no other has room.
    num_rows: so many at once.

  Returns:
    All rows, empty ones included.
  """
  rows = [_Row(row_len=row_len) for row_len in short]
  # (room, row) of each, increasing.
  rooms = sorted((rows[r].row_len, r) for r in range(len(rows)))
  for i in range(len(sizes)):
    at = bisect.bisect_left(rooms, (sizes[i], -1))
    if at == len(rooms):
      for _ in range(num_rows):
        rooms.append((longest, len(rows)))
        rows.append(_Row(row_len=longest))
    room, r = rooms.pop(at)
    rows[r].pieces.append(i)
    bisect.insort(rooms, (room - sizes[i], r))
  return rows

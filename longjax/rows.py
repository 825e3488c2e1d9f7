"""The row layout: shared prefixes, branches and packing in three integers.

A training row, a prefill row and an SFT row are the same thing: T tokens and
beside them `group` (which packed group; -1 is padding), `branch` (0 is the
prefix shared by the group, 1..G its suffixes) and `position` (inside the
token's own sequence). One rule decides who sees whom (`visible`):

  query q sees key k iff group[q] == group[k] >= 0,
  branch[k] is 0 or branch[q], and position[k] <= position[q].

Every token predicts `targets` at its own place. The *last* prompt token
predicts G different first tokens, so it is not stored in the prefix but once
at the head of each branch:

  prompt p0 p1 p2, responses "a b" and "c":
    tokens    p0 p1 | p2 a | p2
    targets   -  -  | a  b | c
    branch    0  0  | 1  1 | 2
    position  0  1  | 2  3 | 2

The sampler works the same way: it prefills p0 p1 once, and each sample starts
by feeding p2.

Shapes: B rows, T positions, S key positions, N trajectories, R response len.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from longjax import types


@struct.dataclass
class TokenMeta:
  """Who a token is; i32[..., T] each. See the module's docstring."""

  group: jax.Array
  branch: jax.Array
  position: jax.Array


@struct.dataclass
class Rows:
  """Packed token rows, all [B, T].

  Attributes:
    tokens: i32, the ids read.
    targets: i32, the id each token should predict; 0 where not trained.
    meta: group, branch and position.
    loss_mask: bool, True where `targets` counts.
    trajectory: i32, which response a trained token belongs to (or which of
      several turns' responses, that have one reward), indexing per-response
      arrays such as advantages f32[N]; 0 where not trained.
    response_index: i32, index of the target inside its response, or inside all
      responses of its trajectory put together, indexing per-token arrays
      f32[N, R]; 0 where not trained.
    expert_ids: [B, T, L, A], the experts the sampler sent each token to, for
      the trainer to send it there again; None lets it choose.
  """

  tokens: jax.Array
  targets: jax.Array
  meta: TokenMeta
  loss_mask: jax.Array
  trajectory: jax.Array
  response_index: jax.Array
  expert_ids: jax.Array | None = None


def visible(
    query: TokenMeta,  # i32[..., T]
    key: TokenMeta,  # i32[..., S]
) -> jax.Array:  # bool[..., T, S]
  """True where a query token may attend to a key token."""

  def q(x):
    return x[..., :, None]

  def k(x):
    return x[..., None, :]

  return (
      (q(query.group) == k(key.group))
      & (k(key.group) >= 0)
      & ((k(key.branch) == 0) | (k(key.branch) == q(query.branch)))
      & (k(key.position) <= q(query.position))
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
  """One response to a group's prompt.

  Attributes:
    response: ids of the response, at least one.
    trajectory: row of the per-response arrays.
    extra_prompt: ids between the shared prefix and the response, read but not
      trained: questions about one document each have their own.
    first_index: `response_index` of the first id; what was written before it,
      of the same trajectory, stands in other branches.
    expert_ids: [., L, A] where the sampler sent the tokens the branch reads;
      None if it did not say.
  """

  response: Sequence[int] | np.ndarray
  trajectory: int
  extra_prompt: Sequence[int] = ()
  first_index: int = 0
  expert_ids: np.ndarray | None = None

  def __post_init__(self):
    # Its head would stand in the row without being counted in `num_tokens`.
    if not len(self.response):
      raise ValueError(
          f'the response of trajectory {self.trajectory} is empty.')

  @property
  def num_tokens(self) -> int:
    """Tokens the branch takes in a row."""
    return len(self.extra_prompt) + len(self.response)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """A prompt and the responses to it.

  Attributes:
    prompt: ids of the shared prompt, at least one.
    branches: the responses, at least one.
    expert_ids: [., L, A] of the prompt's tokens but the last, as in `Branch`.
  """

  prompt: Sequence[int]
  branches: Sequence[Branch]
  expert_ids: np.ndarray | None = None

  @property
  def num_tokens(self) -> int:
    """Tokens the group takes in a row."""
    return len(self.prompt) - 1 + sum(b.num_tokens for b in self.branches)


def empty(num_rows: int, row_len: int) -> Rows:
  """Rows of padding, as NumPy arrays."""
  shape = (num_rows, row_len)

  def full(value):
    return np.full(shape, value, np.int32)

  return Rows(
      tokens=full(0),
      targets=full(0),
      meta=TokenMeta(group=full(-1), branch=full(0), position=full(0)),
      loss_mask=np.zeros(shape, bool),
      trajectory=full(0),
      response_index=full(0),
  )


def _place(
    groups: Sequence[Group], *, row_len: int
) -> list[list[Group]]:
  """Groups of each row: longest first, into the first row with room."""
  order = sorted(
      range(len(groups)), key=lambda i: groups[i].num_tokens, reverse=True)
  used: list[int] = []
  placed: list[list[Group]] = []
  for i in order:
    size = groups[i].num_tokens
    if size > row_len:
      raise types.UserError(
          f'a group of {size} tokens (prompt {len(groups[i].prompt)}, '
          f'{len(groups[i].branches)} responses) does not fit into '
          f'row_len={row_len}; raise row_len or lower the length caps.')
    row = next((r for r, n in enumerate(used) if n + size <= row_len), None)
    if row is None:
      row = len(used)
      used.append(0)
      placed.append([])
    used[row] += size
    placed[row].append(groups[i])
  return placed


def pack(
    groups: Sequence[Group], *, row_len: int, num_rows: int | None = None
) -> Rows:
  """Packs groups into rows, longest first into the first row with room.

  Args:
    groups: what to pack; a group is never split.
    row_len: tokens a row.
    num_rows: rows to return; None means as many as needed.

  Returns:
    NumPy rows; groups are numbered within their row.

  Raises:
    UserError: a group is longer than a row, or `num_rows` are not enough.
  """
  placed = _place(groups, row_len=row_len)
  if num_rows is None:
    num_rows = len(placed)
  if len(placed) > num_rows:
    raise types.UserError(
        f'{len(groups)} groups need {len(placed)} rows of row_len={row_len} '
        f'but num_rows={num_rows}; raise one of them.')
  return write(placed + [[]] * (num_rows - len(placed)), row_len=row_len)


def write(placed: Sequence[Sequence[Group]], *, row_len: int) -> Rows:
  """Writes groups into the rows they were given.

  Args:
    placed: the groups of each row, which fit into it; none make a row of
      padding.
    row_len: tokens a row.

  Returns:
    NumPy rows; groups are numbered within their row.
  """
  rows = empty(len(placed), row_len)
  example = next((g.expert_ids for groups in placed for g in groups), None)
  if example is not None:
    rows = dataclasses.replace(rows, expert_ids=np.zeros(
        (len(placed), row_len, *example.shape[1:]), example.dtype))
  for r, row_groups in enumerate(placed):
    start = 0
    for number, group in enumerate(row_groups):
      start = _write_group(rows, r, start, number, group)
  return rows


def split(rows: Rows, num_rows: int) -> list[Rows]:
  """Rows [B, T] as micro-batches of `num_rows` rows, which divide B."""
  starts = range(0, rows.tokens.shape[0], num_rows)
  return [
      jax.tree.map(lambda x, at=at: x[at:at + num_rows], rows)
      for at in starts]


def _write_group(
    rows: Any, row: int, start: int, number: int, group: Group
) -> int:
  """Writes `group` at `rows[row, start:]` and returns where it ends."""
  prefix_len = len(group.prompt) - 1
  end = start + prefix_len
  rows.tokens[row, start:end] = group.prompt[:-1]
  rows.meta.group[row, start:end] = number
  rows.meta.position[row, start:end] = np.arange(prefix_len)
  if rows.expert_ids is not None:
    rows.expert_ids[row, start:end] = group.expert_ids
  for b, branch in enumerate(group.branches, start=1):
    start, first = end, end + len(branch.extra_prompt)
    end = first + len(branch.response)
    rows.tokens[row, start] = group.prompt[-1]
    rows.tokens[row, start + 1:first + 1] = branch.extra_prompt
    rows.tokens[row, first + 1:end] = branch.response[:-1]
    rows.meta.group[row, start:end] = number
    rows.meta.branch[row, start:end] = b
    rows.meta.position[row, start:end] = prefix_len + np.arange(end - start)
    if rows.expert_ids is not None:
      rows.expert_ids[row, start:end] = branch.expert_ids
    rows.targets[row, first:end] = branch.response
    rows.loss_mask[row, first:end] = True
    rows.trajectory[row, first:end] = branch.trajectory
    rows.response_index[row, first:end] = branch.first_index + np.arange(
        len(branch.response))
  return end

"""Batches with the same number of prompts from every task.

Task-balanced sampling (QwenLong-L1.5, arXiv:2512.12967, Sec. 4.2): each step
takes floor(P / tasks) prompts per task; the P mod tasks left over go to tasks
in turn (the reference gives them always to the same ones). Every task has its
own shuffled queue. A queue's tail is carried over into the next epoch's first
batch (the reference drops it), and a prompt never appears twice in a batch.

A task with fewer prompts than its share gives all of them each step, and the
other tasks fill the places.

A batch is a function of (seed, step): there is nothing to checkpoint but the
step.
"""

import bisect
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from longjax import types


class TaskBalancedSampler:
  """Which examples to ask at each step."""

  def __init__(self, task_of: Sequence[str], *, batch_size: int, seed: int):
    """Counts the tasks and shares out the batch.

    Args:
      task_of: the task of each example.
      batch_size: P, prompts per step.
      seed: of the shuffles.

    Raises:
      UserError: a batch would need more prompts than there are.
    """
    if batch_size < 1:
      raise types.UserError(f'batch_size={batch_size} must be >= 1.')
    if batch_size > len(task_of):
      raise types.UserError(
          f'batch_size={batch_size} needs as many different prompts, the data '
          f'has {len(task_of)}; lower it or add examples.')
    members: dict[str, list[int]] = {}
    for i, task in enumerate(task_of):
      members.setdefault(task, []).append(i)
    self.tasks: tuple[str, ...] = tuple(sorted(members))
    self._queues = {
        task: _Queue(
            np.asarray(members[task], np.int64), task=task, seed=seed,
            taken=_Taken(**share))
        for task, share in _shares(
            {t: len(members[t]) for t in self.tasks}, batch_size).items()
    }

  def batch(self, step: int) -> np.ndarray:
    """Indices of the examples of a step, task by task; i64[P]."""
    return np.concatenate([self._queues[t].window(step) for t in self.tasks])

  def counts(self, step: int) -> dict[str, int]:
    """Prompts per task at a step."""
    return {
        t: self._queues[t].taken(step + 1) - self._queues[t].taken(step)
        for t in self.tasks
    }


class _Taken:
  """How many prompts a task gave before a step: a line plus rotating turns."""

  def __init__(self, *, base: int, turn: int, num_turns: int, num_extra: int):
    """Each step gives `base`, and `num_extra` of `num_turns` tasks one more.

    Turns are dealt round: those of step s are s * num_extra + k, modulo
    num_turns, for k < num_extra.
    """
    self._base = base
    self._turn = turn
    self._num_turns = num_turns
    self._num_extra = num_extra

  def __call__(self, step: int) -> int:
    dealt = step * self._num_extra
    extra = (dealt + self._num_turns - 1 - self._turn) // self._num_turns
    return step * self._base + extra


def _shares(
    sizes: Mapping[str, int], batch_size: int
) -> dict[str, dict[str, int]]:
  """Arguments of `_Taken` for each task."""
  shares: dict[str, dict[str, int]] = {}
  open_tasks = list(sizes)
  left = batch_size
  while True:
    share = -(-left // len(open_tasks))
    small = [t for t in open_tasks if sizes[t] < share]
    if not small:
      break
    for task in small:
      shares[task] = dict(base=sizes[task], turn=0, num_turns=1, num_extra=0)
      open_tasks.remove(task)
      left -= sizes[task]
  for turn, task in enumerate(open_tasks):
    shares[task] = dict(
        base=left // len(open_tasks), turn=turn, num_turns=len(open_tasks),
        num_extra=left % len(open_tasks))
  return shares


class _Queue:
  """One task's endless stream: a shuffle of its members for every epoch."""

  def __init__(
      self, members: np.ndarray, *, task: str, seed: int, taken: _Taken):
    self.taken = taken
    self._members = members
    digest = hashlib.sha256(task.encode()).digest()
    self._entropy = (seed, int.from_bytes(digest[:8], 'big'))
    # The epoch reached and its order. An epoch's start depends on the tail of
    # the one before, so an earlier epoch is recomputed from the beginning.
    self._epoch = -1
    self._order = members[:0]

  def window(self, step: int) -> np.ndarray:
    """The members that a step takes."""
    start, end = self.taken(step), self.taken(step + 1)
    size = len(self._members)
    parts = []
    while start < end:
      epoch, first = divmod(start, size)
      last = min(size, first + end - start)
      parts.append(self._order_of(epoch)[first:last])
      start += last - first
    return np.concatenate(parts) if parts else self._members[:0]

  def _order_of(self, epoch: int) -> np.ndarray:
    if epoch < self._epoch:
      self._epoch, self._order = -1, self._members[:0]
    while self._epoch < epoch:
      self._epoch += 1
      self._order = self._next_order()
    return self._order

  def _next_order(self) -> np.ndarray:
    """A fresh shuffle whose start repeats nothing of a batch begun before."""
    rng = np.random.default_rng((*self._entropy, self._epoch))
    order = rng.permutation(self._members)
    # The batch in which this epoch begins has `tail` places from the last
    # epoch and `head` from this one; tail + head <= len(order).
    begin = self._epoch * len(order)
    step = bisect.bisect_right(range(begin + 1), begin, key=self.taken) - 1
    tail = begin - self.taken(step)
    head = self.taken(step + 1) - begin
    if not tail:
      return order
    is_free = ~np.isin(order, self._order[-tail:])
    first = np.flatnonzero(is_free)[:head]
    return np.concatenate([order[first], np.delete(order, first)])

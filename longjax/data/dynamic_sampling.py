"""DAPO's dynamic sampling: train on the groups whose rewards differ.

DAPO (arXiv:2503.14476), Sec. 3.2: a group of equal rewards has no advantage,
so it only takes a place in the batch. DAPO keeps sampling until there are P
other groups. Here a step samples `oversample` times P prompts, once: shapes
stay static and the time of a step is bounded. Where fewer than P groups
differ, some of the others fill their places with zero weight.

Shapes: Q prompts sampled, P prompts trained on, G rollouts per prompt.
"""

import collections
import dataclasses
from collections.abc import Sequence

import chex
import numpy as np

from longjax import types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """The groups of a batch.

  Attributes:
    groups: i64[P] which of the Q groups, no group twice.
    is_varying: bool[P] False for a group that only fills its place: its
      responses get no weight and count in no denominator.
    num_sampled: Q.
    num_varying: of the Q groups, those whose rewards differ.
    num_solved: of the Q groups, those with rewards of 1 only.
    num_unsolved: of the Q groups, those with rewards of 0 only.
  """

  groups: np.ndarray
  is_varying: np.ndarray
  num_sampled: int
  num_varying: int
  num_solved: int
  num_unsolved: int

  def metrics(self) -> dict[str, float]:
    """Shares: of the groups sampled, and of the P places."""
    num_trained = int(self.is_varying.sum())
    return {
        'dynamic/varying': self.num_varying / self.num_sampled,
        'dynamic/solved': self.num_solved / self.num_sampled,
        'dynamic/unsolved': self.num_unsolved / self.num_sampled,
        'dynamic/surplus': (self.num_varying - num_trained) / self.num_sampled,
        'dynamic/filled': 1.0 - num_trained / self.groups.size,
    }


def choose_groups(
    rewards: np.ndarray,  # f32[Q, G]
    lengths: np.ndarray,  # i32[Q, G]
    tasks: Sequence[str],  # Q
    *,
    num_prompts: int,
    turn: int = 0,
) -> Choice:
  """Which of the sampled groups are trained on.

  Groups whose rewards differ come first. Tasks take turns, each with its next
  such group in the order sampled, until P are chosen: the tasks that have most
  of them lose the surplus. If there are fewer than P, groups of equal rewards
  are chosen likewise.

  In what is returned tasks alternate, and groups of equal rewards stand evenly
  between the others: consecutive parts of the batch, such as mini-batches,
  hold their share of every task and of what is learnt from.

  Args:
    rewards: grades before any shaping; DAPO compares accuracies. A penalty
      on length would make all-wrong groups differ.
    lengths: response tokens; responses of 0 do not count, and a group of those
      never differs.
    tasks: of each group's prompt.
    num_prompts: P.
    turn: rotates which task comes first, e.g. the step, so that what P leaves
      over goes to all tasks in turn.

  Raises:
    UserError: fewer than P groups were sampled.
  """
  dims = chex.Dimensions()
  dims['QG'] = rewards.shape
  chex.assert_shape(lengths, dims['QG'])
  assert len(tasks) == len(rewards), (len(tasks), len(rewards))
  if len(rewards) < num_prompts:
    raise types.UserError(
        f'num_prompts={num_prompts} is more than the {len(rewards)} groups '
        'sampled; sample at least as many as are trained on.')
  counts = lengths > 0
  is_seen = counts.any(axis=1)
  low = np.min(rewards, axis=1, where=counts, initial=np.inf)
  high = np.max(rewards, axis=1, where=counts, initial=-np.inf)
  is_varying = high > low

  varying = _in_turn(np.flatnonzero(is_varying), tasks, turn)[:num_prompts]
  others = _in_turn(np.flatnonzero(~is_varying), tasks, turn)
  others = others[:num_prompts - len(varying)]
  # Both are spread over (0, 1), then merged; of equal places, `varying` first.
  place = np.concatenate([
      (np.arange(len(part)) + 0.5) / max(len(part), 1)
      for part in (varying, others)])
  order = np.argsort(place, kind='stable')
  groups = np.asarray(varying + others, np.int64)[order]
  return Choice(
      groups=groups, is_varying=is_varying[groups], num_sampled=len(rewards),
      num_varying=int(is_varying.sum()),
      num_solved=int((is_seen & (low >= 1.0)).sum()),
      num_unsolved=int((is_seen & (high <= 0.0)).sum()))


def _in_turn(
    groups: np.ndarray, tasks: Sequence[str], turn: int
) -> list[int]:
  """All groups, tasks taking turns; within a task in order."""
  names = sorted(set(tasks))
  first = turn % max(len(names), 1)
  queues: dict[str, collections.deque[int]] = {
      task: collections.deque() for task in names[first:] + names[:first]}
  for g in groups.tolist():
    queues[tasks[g]].append(g)
  order: list[int] = []
  while len(order) < len(groups):
    order += [queue.popleft() for queue in queues.values() if queue]
  return order

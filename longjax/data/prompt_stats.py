"""What training has seen of every prompt: how often, how well, how long.

A table by example of a stage's split, updated every step from the groups that
were sampled, and read when the next stage's examples are chosen
(`data.difficulty`). It lives on the host as NumPy arrays and is part of a
checkpoint, so a run that is killed goes on with the same table.

Shapes: D examples of the split, P prompts of a step, G rollouts per prompt.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import chex
import numpy as np
from flax import struct

from longjax import types
from longjax.data import records

# Weight of what a visit measures in the running mean of rewards. The policy
# moves on, so an old mean says little; one group of 8 is too noisy alone.
_NEW_WEIGHT = 0.5


@struct.dataclass
class PromptStats:
  """NumPy arrays by example, 0 where there was no visit yet.

  Attributes:
    visits: i32[D] groups that were sampled.
    mean: f32[D] reward: a running mean of the visits' means, the last of which
      has half the weight; the first is taken as it is.
    std: f32[D] unbiased deviation of the rewards of the last visit.
    length: f32[D] response tokens, mean over the last visit.
    truncated: f32[D] share of the last visit's responses that hit their cap.
  """

  visits: np.ndarray
  mean: np.ndarray
  std: np.ndarray
  length: np.ndarray
  truncated: np.ndarray


def nothing(num_examples: int) -> PromptStats:
  """Before the first step."""
  return PromptStats(
      visits=np.zeros(num_examples, np.int32),
      mean=np.zeros(num_examples, np.float32),
      std=np.zeros(num_examples, np.float32),
      length=np.zeros(num_examples, np.float32),
      truncated=np.zeros(num_examples, np.float32))


def update(
    stats: PromptStats,
    *,
    examples: np.ndarray,  # i[P]
    rewards: np.ndarray,  # f32[P, G]
    lengths: np.ndarray,  # i32[P, G]
    is_finished: np.ndarray,  # bool[P, G]
) -> PromptStats:
  """The table after a step; `stats` stays as it is.

  Args:
    stats: after the step before.
    examples: index of each group's example, no index twice. Groups that were
      sampled but not trained on (`data.dynamic_sampling`) belong here as well.
    rewards: grades in [0, 1], before any shaping: what is kept says how hard a
      prompt is, not how long-winded its responses are.
    lengths: response tokens; a response of 0 does not count, and a group of
      such responses is no visit (it is carried over, or padding).
    is_finished: False for a response that was cut off by its cap.
  """
  dims = chex.Dimensions()
  dims['PG'] = rewards.shape
  chex.assert_shape([lengths, is_finished], dims['PG'])
  chex.assert_shape(examples, dims['P'])

  counts = lengths > 0
  seen = counts.any(axis=1)
  index = examples[seen]
  assert np.unique(index).size == index.size, 'a prompt is twice in a batch'
  counts = counts[seen]
  num = counts.sum(axis=1)

  def mean_of(values):  # [P, G] -> f64[P]
    return np.sum(values, axis=1, where=counts, dtype=np.float64) / num

  mean = mean_of(rewards[seen])
  deviation = rewards[seen] - mean[:, None]
  squares = np.sum(np.square(deviation), axis=1, where=counts)
  before = stats.mean[index].astype(np.float64)
  is_first = stats.visits[index] == 0
  blend = before + _NEW_WEIGHT * (mean - before)

  def put(old, new):
    made = old.copy()
    made[index] = new
    return made

  return PromptStats(
      visits=put(stats.visits, stats.visits[index] + 1),
      mean=put(stats.mean, np.where(is_first, mean, blend)),
      std=put(stats.std, np.sqrt(squares / np.maximum(num - 1, 1))),
      length=put(stats.length, mean_of(lengths[seen])),
      truncated=put(stats.truncated, mean_of(~is_finished[seen])))


def metrics(stats: PromptStats) -> dict[str, float]:
  """The share of examples visited, and of those the always and never solved."""
  is_visited = stats.visits > 0
  mean = stats.mean[is_visited]
  num_visited = max(mean.size, 1)
  return {
      'prompts/visited': float(is_visited.mean()),
      'prompts/solved': float((mean >= 1.0).sum() / num_visited),
      'prompts/unsolved': float((mean <= 0.0).sum() / num_visited),
  }


def table(
    stats: PromptStats, ids: Sequence[str]
) -> list[dict[str, Any]]:
  """A row for each visited example, in their order, ready for JSON."""
  assert len(ids) == stats.visits.size, (len(ids), stats.visits.size)
  return [
      {
          'id': ids[i],
          'visits': int(stats.visits[i]),
          'mean': float(stats.mean[i]),
          'std': float(stats.std[i]),
          'length': float(stats.length[i]),
          'truncated': float(stats.truncated[i]),
      }
      for i in np.flatnonzero(stats.visits).tolist()]


def write(
    path: str | os.PathLike[str], stats: PromptStats, ids: Sequence[str]
) -> None:
  """Writes the table, one JSON object a line, in one rename."""
  records.write_text(
      path, ''.join(json.dumps(row) + '\n' for row in table(stats, ids)))


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows that `write` wrote.

  Raises:
    UserError: there is no such file.
  """
  if not os.path.exists(path):
    raise types.UserError(
        f'{path} is gone, and what its stage saw of the prompts with it; start '
        'anew in another --workdir.')
  return records.read(path)

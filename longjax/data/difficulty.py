"""Examples chosen by how hard they are for the policy.

  stratify       scored examples, per task equally many of each difficulty
  retrospective  examples of earlier stages, failures first

A score is the mean reward of k responses (pass@k as a rate), in [0, 1]. An
example that is always solved teaches nothing and is dropped; of those never
solved, which seldom teach anything, a limited share is taken.

QwenLong-L1 (arXiv:2505.17667) has difficulty-aware retrospective sampling,
QwenLong-L1.5 (arXiv:2512.12967) pass@k strata; they state no numbers, so the
defaults are ours. `data.next_stage` puts the two together.

Chance is a function of (seed, id of the example): neither the order of examples
nor what else is offered changes one's draw.

Shapes: D examples.
"""

import dataclasses
import hashlib
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from longjax import types

RetrospectiveMode = Literal['weighted', 'hardest']
MODES = typing.get_args(RetrospectiveMode)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StratifyConfig:
  """Strata of new examples.

  Attributes:
    num_bins: equal intervals of [0, 1] that scores are sorted into.
    max_unsolved: share of a task's quota that may have a score of 0.
  """

  num_bins: int = 4
  max_unsolved: float = 0.25

  def __post_init__(self):
    if self.num_bins < 1:
      raise types.UserError(
          f'stratify num_bins={self.num_bins} must be >= 1; use 4.')
    _check_share('stratify max_unsolved', self.max_unsolved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrospectiveConfig:
  """Examples of earlier stages that come back.

  Attributes:
    share: of the next stage's examples; 0 means none come back.
    mode: 'weighted' draws without replacement, an example with mean reward m
      of G responses with weight 1 / (m + 1 / 2G); 'hardest' takes those of the
      lowest mean, ties by chance.
    max_unsolved: share of them that may have a mean reward of 0.
  """

  share: float = 0.25
  mode: RetrospectiveMode = 'weighted'
  max_unsolved: float = 0.5

  def __post_init__(self):
    if self.mode not in MODES:
      raise types.UserError(
          f'retrospective mode={self.mode!r} is unknown; use one of '
          f'{", ".join(MODES)}.')
    _check_share('retrospective share', self.share)
    _check_share('retrospective max_unsolved', self.max_unsolved)


def _check_share(name: str, value: float) -> None:
  if not 0.0 <= value <= 1.0:
    raise types.UserError(
        f'{name}={value} is a share; use a number from 0 to 1.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
  """Examples and how well the policy does on them.

  Attributes:
    ids: of the examples, each its own.
    tasks: what is balanced: the task, or 'source/task'.
    scores: f[D] mean rewards in [0, 1]; NaN of examples that were not tried,
      which are never chosen.
  """

  ids: Sequence[str]
  tasks: Sequence[str]
  scores: np.ndarray

  def __post_init__(self):
    assert len(self.ids) == len(self.tasks) == len(self.scores)
    assert len(set(self.ids)) == len(self.ids), 'an id occurs twice'
    outside = (self.scores < 0.0) | (self.scores > 1.0)
    assert not outside.any(), self.scores[outside]

  def take(self, index: np.ndarray) -> 'Scored':
    """Some of the examples."""
    return Scored(
        ids=[self.ids[i] for i in index.tolist()],
        tasks=[self.tasks[i] for i in index.tolist()],
        scores=self.scores[index])

  def of_task(self, task: str) -> np.ndarray:  # i64[<=D]
    """Indices of a task's examples."""
    return np.flatnonzero(np.asarray(self.tasks, object) == task)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
  """A choice of examples.

  Attributes:
    indices: i64[K], increasing.
    counts: how many of the D examples are 'chosen', 'untried', 'solved' (score
      1), 'unsolved' (score 0 and over the limit) or 'surplus' (not drawn); they
      add up to D.
  """

  indices: np.ndarray
  counts: Mapping[str, int]


def stratify(
    candidates: Scored,
    *,
    quota: int,
    seed: int,
    config: StratifyConfig = StratifyConfig(),
) -> Chosen:
  """Of each task the same number from each bin of scores that is not empty.

  A bin with fewer examples gives all of them and the others fill its place;
  what does not divide goes to harder bins. Within a bin all are as likely,
  until the limit of those with score 0 is reached.

  Args:
    candidates: new examples, scored under the caps they will be trained with.
    quota: examples of each task; a task may have fewer, and no other task
      takes their place.
    seed: of the draws; stages should have different ones.
    config: see there.
  """
  noise = _uniform(candidates.ids, seed)
  chosen: list[int] = []
  num_unsolved = 0
  for task in sorted(set(candidates.tasks)):
    members = candidates.of_task(task)
    members = members[candidates.scores[members] < 1.0]  # False of NaN.
    members = members[np.argsort(noise[members], kind='stable')]
    is_over = _is_over_limit(
        candidates.scores[members], math.floor(config.max_unsolved * quota))
    num_unsolved += int(is_over.sum())
    members = members[~is_over]
    bin_of = np.floor(
        candidates.scores[members].astype(np.float64) * config.num_bins)
    bins = [members[bin_of == b] for b in range(config.num_bins)]
    shares = _equal_shares([len(b) for b in bins], quota)
    for of_bin, share in zip(bins, shares, strict=True):
      chosen += of_bin[:share].tolist()
  return _chosen(candidates, chosen, num_unsolved)


def retrospective(
    seen: Scored,
    *,
    size: int,
    num_samples: int,
    seed: int,
    config: RetrospectiveConfig = RetrospectiveConfig(),
) -> Chosen:
  """Examples of earlier stages, whatever their task.

  Weights are drawn from without replacement by Gumbel top-k (arXiv:1903.06059):
  the largest of log(weight) plus independent Gumbel noise.

  Args:
    seen: examples with their running mean reward (`data.prompt_stats`).
    size: how many to choose, at most; `max_unsolved` is a share of it.
    num_samples: G, responses a mean reward was measured on.
    seed: of the draws; stages should have different ones.
    config: see there; `share` is not used.
  """
  noise = _uniform(seen.ids, seed)
  members = np.flatnonzero(seen.scores < 1.0)  # False of NaN.
  means = seen.scores[members].astype(np.float64)
  if config.mode == 'hardest':
    order = np.lexsort((noise[members], means))
  else:
    gumbel = -np.log(-np.log(noise[members]))
    order = np.argsort(
        np.log(means + 0.5 / num_samples) - gumbel, kind='stable')
  members = members[order]
  is_over = _is_over_limit(
      seen.scores[members], math.floor(config.max_unsolved * size))
  return _chosen(
      seen, members[~is_over][:size].tolist(), int(is_over.sum()))


def _uniform(ids: Sequence[str], seed: int) -> np.ndarray:  # f64[D]
  """A number in (0, 1) for each example, a function of its id and the seed."""

  def number(name: str) -> int:
    digest = hashlib.sha256(f'{seed} {name}'.encode()).digest()
    return int.from_bytes(digest[:8], 'big') >> 12

  # 52 bits, so that adding a half is exact and neither 0 nor 1 is reached.
  return (np.asarray([number(name) for name in ids], np.float64) + 0.5) / 2**52


def _is_over_limit(scores: np.ndarray, limit: int) -> np.ndarray:  # bool[D]
  """True of zeros that come after the first `limit` zeros."""
  is_unsolved = scores <= 0.0
  return is_unsolved & (np.cumsum(is_unsolved) > limit)


def _equal_shares(sizes: Sequence[int], total: int) -> list[int]:
  """Shares as equal as sizes allow; the first ones are larger by one."""
  shares = [0] * len(sizes)
  for _ in range(min(total, sum(sizes))):
    has_more = [b for b, size in enumerate(sizes) if shares[b] < size]
    shares[min(has_more, key=shares.__getitem__)] += 1
  return shares


def _chosen(
    examples: Scored, indices: Sequence[int], num_unsolved: int) -> Chosen:
  """The choice, and why the others were not chosen."""
  num_untried = int(np.isnan(examples.scores).sum())
  num_solved = int((examples.scores >= 1.0).sum())
  return Chosen(
      indices=np.sort(np.asarray(indices, np.int64)),
      counts={
          'chosen': len(indices), 'untried': num_untried, 'solved': num_solved,
          'unsolved': num_unsolved,
          'surplus': (len(examples.ids) - len(indices) - num_untried
                      - num_solved - num_unsolved)})

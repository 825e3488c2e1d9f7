"""The examples of the next stage: new ones of its lengths, earlier failures.

QwenLong-L1.5 (arXiv:2512.12967) trains on longer and longer inputs. Before each
stage, examples of its lengths are tried by the policy so far under the stage's
own caps; those it always solves are dropped, the others stratified by
difficulty, and a share of the set are hard examples of earlier stages.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from longjax.data import difficulty


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextStage:
  """The examples of a stage.

  Attributes:
    fresh: i64[K] indices into the candidates, increasing.
    retrospective: i64[L] indices into the examples seen before, increasing.
    counts: the `difficulty.Chosen.counts` of both as 'fresh/...' and
      'retrospective/...'; 'retrospective/candidate', examples that are judged
      among the candidates; and 'missing', how many the set is short of `size`.
    counts_by_task: the same of each task.
  """

  fresh: np.ndarray
  retrospective: np.ndarray
  counts: Mapping[str, int]
  counts_by_task: Mapping[str, Mapping[str, int]]


def build(
    candidates: difficulty.Scored,
    seen: difficulty.Scored,
    *,
    size: int,
    num_samples: int,
    seed: int,
    stratify: difficulty.StratifyConfig = difficulty.StratifyConfig(),
    retrospective: difficulty.RetrospectiveConfig = (
        difficulty.RetrospectiveConfig()),
) -> NextStage:
  """Chooses them, the same number of every task.

  Of each task's quota `share` is retrospective. New examples take the place of
  earlier ones that are missing, but not the other way round: earlier ones stay
  a small part. Nor does a task take the place of another: batches are balanced
  over tasks whatever the set has of each (`task_balance`).

  Args:
    candidates: examples with prompts longer than the last stage's cap, scored
      with the current policy under the next stage's caps.
    seen: examples of all stages so far. One that is a candidate too is judged
      by its newer score.
    size: how many examples in all; the first tasks have one more where it
      does not divide.
    num_samples: G, see `difficulty.retrospective`.
    seed: of the draws; stages should have different ones.
    stratify: see there.
    retrospective: see there.
  """
  is_candidate = set(candidates.ids)
  earlier = np.asarray(
      [i for i, name in enumerate(seen.ids) if name not in is_candidate],
      np.int64)
  tasks = sorted({*candidates.tasks, *seen.tasks})
  fresh: list[int] = []
  back: list[int] = []
  by_task: dict[str, dict[str, int]] = {}
  for number, task in enumerate(tasks):
    quota = size // len(tasks) + (number < size % len(tasks))
    new = candidates.of_task(task)
    ever = seen.of_task(task)
    old = np.intersect1d(ever, earlier)
    again = difficulty.retrospective(
        seen.take(old), size=math.floor(retrospective.share * quota),
        num_samples=num_samples, seed=seed, config=retrospective)
    first = difficulty.stratify(
        candidates.take(new), quota=quota - len(again.indices), seed=seed,
        config=stratify)
    fresh += new[first.indices].tolist()
    back += old[again.indices].tolist()
    by_task[task] = (
        {f'fresh/{k}': n for k, n in first.counts.items()}
        | {f'retrospective/{k}': n for k, n in again.counts.items()}
        | {'retrospective/candidate': len(ever) - len(old),
           'missing': quota - len(first.indices) - len(again.indices)})
  counts: collections.Counter[str] = collections.Counter()
  for of_task in by_task.values():
    counts.update(of_task)  # Unlike `+`, keeps zeros.
  return NextStage(
      fresh=np.sort(np.asarray(fresh, np.int64)),
      retrospective=np.sort(np.asarray(back, np.int64)),
      counts=dict(counts), counts_by_task=by_task)

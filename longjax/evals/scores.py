"""What an evaluation found: records become tables and gains.

Every score over several task types is the mean of the task types' scores, as
in the paper's tables; intervals draw examples within task types.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from longjax.evals import bootstrap

DEPTH_BINS = ('0-25%', '25-50%', '50-75%', '75-100%')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """One graded response.

  Attributes:
    id: of the example.
    task: of the example.
    context_length: nominal length it is reported under, tokens.
    prompt_length: real length, tokens.
    depth: where the middle of the evidence lies, from 0 (first character of
      the documents) to 1 (last); None without evidence.
    sample: number of the response to this example, from 0.
    question: of the example.
    gold: accepted answers.
    evidence: the text of each evidence span.
    response: what was written.
    response_length: tokens.
    is_finished: it ended with the stop token.
    answer: what was graded; '' if no answer was found.
    rule: name of the rule that decided.
    reward: in [0, 1].
  """

  id: str
  task: str
  context_length: int
  prompt_length: int
  depth: float | None
  sample: int
  question: str
  gold: tuple[str, ...]
  evidence: tuple[str, ...]
  response: str
  response_length: int
  is_finished: bool
  answer: str
  rule: str
  reward: float


def table(
    results: Sequence[Record],
    *,
    seed: int = 0,
    num_resamples: int = bootstrap.NUM_RESAMPLES,
) -> dict[str, Any]:
  """Scores by task, by context length, by both and by evidence depth.

  A cell holds reward, low, high (95% interval, `bootstrap`), num_examples,
  num_responses, truncated and no_answer (fractions of the responses) and
  response_length (mean, tokens).

  Returns:
    {'overall': cell, 'by_task': {task: cell}, 'by_length': {length: cell},
    'by_depth': {bin: cell}, 'by_task_and_length': {task: {length: cell}}},
    ready for JSON; 'overall' of nothing is None. Cells over several task
    types are means over task types, whatever the number of examples of each.
  """

  def cell(chosen):
    return _cell(list(chosen), seed, num_resamples)

  def cells(key):
    keys = sorted({key(r) for r in results} - {None})
    return {str(k): cell(r for r in results if key(r) == k) for k in keys}

  by_both = {}
  for task in sorted({r.task for r in results}):
    own = [r for r in results if r.task == task]
    lengths = sorted({r.context_length for r in own})
    by_both[task] = {
        str(n): cell(r for r in own if r.context_length == n) for n in lengths}
  return {
      'overall': cell(results) if results else None,
      'by_task': cells(lambda r: r.task),
      'by_length': cells(lambda r: r.context_length),
      'by_depth': cells(_depth_bin),
      'by_task_and_length': by_both,
  }


def gain(
    before: Sequence[Record],
    after: Sequence[Record],
    *,
    task: str | None = None,
    context_length: int | None = None,
    seed: int = 0,
    num_resamples: int = bootstrap.NUM_RESAMPLES,
) -> bootstrap.Interval:
  """Reward after minus reward before, on the examples both answered.

  The difference is taken example by example, which removes how hard each is
  from the interval; it is far tighter than two separate ones suggest.

  Args:
    before: records of one evaluation.
    after: records of another.
    task: only this task; None means the mean over task types.
    context_length: only this length; None means all.
    seed: of the bootstrap.
    num_resamples: of the bootstrap.

  Returns:
    The gain; its mean is NaN if the two have no example in common.
  """

  def chosen(results):
    return [
        r for r in results
        if task in (None, r.task) and context_length in (None, r.context_length)
    ]

  old, new = _example_means(chosen(before)), _example_means(chosen(after))
  differences: dict[str, list[float]] = {}
  for key in sorted(old.keys() & new.keys()):
    differences.setdefault(key[0], []).append(new[key] - old[key])
  return bootstrap.interval(
      [np.array(d) for d in differences.values()],
      seed=seed, num_resamples=num_resamples)


def _depth_bin(record: Record) -> str | None:
  if record.depth is None:
    return None
  return DEPTH_BINS[min(int(record.depth * 4), 3)]


def _example_means(
    results: Sequence[Record],
) -> dict[tuple[str, int, str], float]:
  """Mean reward of each example, keyed by task, length and id."""
  rewards: dict[tuple[str, int, str], list[float]] = {}
  for r in results:
    key = (r.task, r.context_length, r.id)
    rewards.setdefault(key, []).append(r.reward)
  return {key: float(np.mean(values)) for key, values in rewards.items()}


def _cell(
    results: Sequence[Record], seed: int, num_resamples: int
) -> dict[str, Any]:
  means = _example_means(results)
  strata: dict[str, list[float]] = {}
  for (task, _, _), value in sorted(means.items()):
    strata.setdefault(task, []).append(value)
  reward = bootstrap.interval(
      [np.array(s) for s in strata.values()],
      seed=seed, num_resamples=num_resamples)
  return {
      'reward': reward.mean,
      'low': reward.low,
      'high': reward.high,
      'num_examples': len(means),
      'num_responses': len(results),
      'truncated': float(np.mean([not r.is_finished for r in results])),
      'no_answer': float(np.mean([not r.answer for r in results])),
      'response_length': float(np.mean([r.response_length for r in results])),
  }

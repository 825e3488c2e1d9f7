"""Grades for responses as they are finished: the rule, then perhaps a judge.

  reward = max(rule, judge)

A judge is asked only where the rule scores below 1, an answer was found, and
the kind of example leaves room for other words: never about options, lists,
counts and dense rewards, where the rule says all there is to say.

Rules are applied at once. What a judge is asked it may answer while other
responses are still being written: `Grader.collect` waits for the rest.
"""

import dataclasses
import time
from collections.abc import Callable, Collection
from typing import Literal

from longjax import types
from longjax.reward import completions, hybrid
from longjax.reward import judge as judge_lib

# Kinds of examples whose answers may be right in other words.
JUDGED_KINDS = frozenset({'qa', 'numeric'})

# An answer may be this long, or four times the longest gold: one that lists
# every candidate must not win by its length.
_MIN_CHARS_CAP = 500

# Anything that sorts, such as (prompt, sample).
Key = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InprocessConfig:
  """Shapes of the forward pass that compares YES with NO.

  Attributes:
    row_len: tokens of a row; a longer case is not judged. Several short ones
      share a row.
    rows_at_once: rows of a forward pass; 0 means one for each part of the
      mesh that rows are split over.
  """

  row_len: int = 1024
  rows_at_once: int = 0

  def __post_init__(self):
    for name, least in (('row_len', 2), ('rows_at_once', 0)):
      if getattr(self, name) < least:
        raise types.UserError(
            f'inprocess.{name}={getattr(self, name)} must be >= {least}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
  """Who is asked where the rule finds no match.

  Attributes:
    mode: 'none'; 'endpoint', a server; or 'inprocess', a frozen copy of the
      initial policy in the memory of the devices.
    endpoint: the server.
    inprocess: the forward pass.
  """

  mode: Literal['none', 'endpoint', 'inprocess'] = 'none'
  endpoint: completions.EndpointConfig = completions.EndpointConfig()
  inprocess: InprocessConfig = InprocessConfig()

  def __post_init__(self):
    for name in ('url', 'model'):
      if self.mode == 'endpoint' and not getattr(self.endpoint, name):
        raise types.UserError(
            f"judge.mode='endpoint' needs judge.endpoint.{name}, which is "
            "empty; set it, or use mode='none'.")

  @property
  def name(self) -> str:
    """Who that is, in a word or two, for those who read the results."""
    match self.mode:
      case 'endpoint':
        return self.endpoint.model
      case 'inprocess':
        return 'initial policy'
      case _:
        return 'none'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grades:
  """What became of the responses of a batch.

  Attributes:
    scores: by key, in the keys' order. `rule` is 'judge' where the judge's
      verdict is what counts.
    metrics: how many responses the judge was asked about, said yes to, failed
      on, gave no verdict on, and knew from before; seconds spent waiting for
      it. Empty without a judge.
  """

  scores: dict[Key, types.Score]
  metrics: dict[str, float]


class Grader:
  """Grades responses in the order they end; results do not depend on it."""

  def __init__(
      self,
      *,
      judge: judge_lib.Judge | None = None,
      score: Callable[..., types.Score] = hybrid.score,
  ):
    """Grades nothing yet.

    Args:
      judge: who is asked; None asks nobody. Its owner closes it.
      score: the rules: (example, text, is_finished=) -> Score.
    """
    self._judge = judge
    self._score = score
    self._scores: dict[Key, types.Score] = {}
    self._cases: dict[Key, judge_lib.Case] = {}

  def submit(
      self, key: Key, example: types.TaskExample, text: str, *,
      is_finished: bool,
  ) -> None:
    """Applies the rule, and asks the judge if there is reason to; no waiting.

    Args:
      key: unique among the responses until `collect`; they sort.
      example: what the response answers.
      text: decoded, without the stop token.
      is_finished: False for a response cut off by its cap.
    """
    if key in self._scores:
      raise ValueError(f'response {key} is submitted twice.')
    score = self._score(example, text, is_finished=is_finished)
    self._scores[key] = score
    if self._judge is None or not _is_open(example, score):
      return
    case = _case(example, score.answer)
    self._cases[key] = case
    self._judge.ask(case)

  def collect(self, among: Collection[Key] | None = None) -> Grades:
    """Waits for verdicts; grades of the responses since the last time.

    Args:
      among: only these keys; nobody waits for others, which are forgotten. A
        judge that was asked about one goes on, and if the response is
        submitted again may have its verdict already. None means all.
    """
    if among is None:
      among = self._scores.keys()
    scores = {key: self._scores[key] for key in sorted(among)}
    keys = sorted(self._cases.keys() & among)
    cases = [self._cases[key] for key in keys]
    self._scores, self._cases = {}, {}
    if self._judge is None:
      return Grades(scores=scores, metrics={})
    start = time.perf_counter()
    rulings = self._judge.rulings(cases) if cases else []
    seconds = time.perf_counter() - start
    for key, ruling in zip(keys, rulings, strict=True):
      if ruling.verdict is judge_lib.Verdict.YES:
        scores[key] = dataclasses.replace(
            scores[key], reward=1.0, rule='judge')

    def count(verdict: judge_lib.Verdict) -> float:
      return float(sum(r.verdict is verdict for r in rulings))

    return Grades(scores=scores, metrics={
        'judge/asked': float(len(rulings)),
        'judge/yes': count(judge_lib.Verdict.YES),
        'judge/failed': count(judge_lib.Verdict.FAILED),
        'judge/unclear': count(judge_lib.Verdict.UNCLEAR),
        'judge/cached': float(sum(r.is_cached for r in rulings)),
        'judge/wait_seconds': seconds,
    })


def _is_open(example: types.TaskExample, score: types.Score) -> bool:
  """Whether a judge may see it differently."""
  max_chars = max(
      _MIN_CHARS_CAP, 4 * max(len(gold) for gold in example.answers))
  # 'think', 'unfinished' and 'no_answer' are no rules that could be wrong.
  return (score.reward < 1.0 and score.rule in JUDGED_KINDS
          and len(score.answer) <= max_chars)


def _case(example: types.TaskExample, answer: str) -> judge_lib.Case:
  """What the judge decides about."""
  unit = example.meta.get('unit', '') if example.kind == 'numeric' else ''
  unit = f' (unit: {unit})' if unit else ''
  return judge_lib.Case(
      question=example.question,
      golds=tuple(gold + unit for gold in example.answers),
      prediction=answer)

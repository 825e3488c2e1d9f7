"""The select stage: which examples the next stage of RL is to learn from.

The policy so far tries candidates of the next stage's lengths, k times each,
under that stage's caps. What it always solves is dropped, the rest is
stratified by difficulty, and hard examples of earlier stages come back
(`data.next_stage`). The result is a split of its own name:

  {workdir}/selected/{name}.json   {'examples': [[split, id], ..], 'counts', ..}
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from longjax import types
from longjax.data import difficulty, next_stage, records
from longjax.evals import scores
from longjax.evals import stage as evals_stage
from longjax.rollout import decode

FOLDER = 'selected'


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectStage:
  """What is chosen.

  Attributes:
    job: marks the kind of stage.
    split: of the data set, the candidates.
    size: examples to choose, the same number of every task.
    seen: names of earlier RL stages whose examples may come back.
    max_prompt_len: cap of the next stage on prompts.
    num_samples: k.
    prompts_at_once: prompts whose keys and values the sampler holds.
    sampler: of the next stage.
    stratify: of the candidates, see there.
    retrospective: of the examples seen before, see there.
  """

  job: Literal['select'] = 'select'
  split: str
  size: int
  seen: tuple[str, ...] = ()
  max_prompt_len: int
  num_samples: int = 8
  prompts_at_once: int = 32
  sampler: decode.SamplerConfig
  stratify: difficulty.StratifyConfig = difficulty.StratifyConfig()
  retrospective: difficulty.RetrospectiveConfig = (
      difficulty.RetrospectiveConfig())

  def __post_init__(self):
    for name in ('size', 'max_prompt_len', 'num_samples', 'prompts_at_once'):
      if getattr(self, name) < 1:
        raise types.UserError(
            f'select.{name}={getattr(self, name)} must be >= 1.')


def attempts(stage: SelectStage) -> evals_stage.EvalsStage:
  """The evaluation in which the policy tries the candidates."""
  return evals_stage.EvalsStage(
      splits=(stage.split,), lengths=(stage.max_prompt_len,),
      num_samples=stage.num_samples, sampler=stage.sampler,
      prompts_at_once=stage.prompts_at_once)


def result(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """The file a select stage writes."""
  return workdir / FOLDER / f'{name}.json'


def load(workdir: pathlib.Path, name: str) -> list[tuple[str, str]]:
  """Split and id of each chosen example."""
  content = json.loads(result(workdir, name).read_bytes())
  return [(split, example) for split, example in content['examples']]


def choose(
    stage: SelectStage,
    tried: Sequence[scores.Record],
    candidates: Sequence[types.TaskExample],
    seen: Mapping[str, tuple[str, str, float]],
    *,
    num_seen: int,
    seed: int,
) -> dict[str, Any]:
  """Chooses by what the policy made of the candidates.

  Args:
    stage: its configuration.
    tried: k responses to each candidate, graded.
    candidates: in the order of their split.
    seen: id -> (split, task, mean reward) of examples of earlier stages.
    num_seen: G, responses behind each of these means.
    seed: of the draws.

  Returns:
    What the file holds.
  """
  rewards: dict[str, list[float]] = {}
  for record in tried:
    rewards.setdefault(record.id, []).append(record.reward)
  made = next_stage.build(
      difficulty.Scored(
          ids=[e.id for e in candidates], tasks=[e.task for e in candidates],
          scores=np.asarray([
              float(np.mean(rewards[e.id])) if e.id in rewards else math.nan
              for e in candidates])),
      difficulty.Scored(
          ids=list(seen), tasks=[task for _, task, _ in seen.values()],
          scores=np.asarray([mean for *_, mean in seen.values()])),
      size=stage.size, num_samples=num_seen, seed=seed,
      stratify=stage.stratify, retrospective=stage.retrospective)
  ids = list(seen)
  return {
      'examples': [
          *([stage.split, candidates[i].id] for i in made.fresh),
          *([seen[ids[i]][0], ids[i]] for i in made.retrospective)],
      'counts': dict(made.counts),
      'counts_by_task': {k: dict(v) for k, v in made.counts_by_task.items()},
      'mean_reward': float(np.mean([r.reward for r in tried]))}


def save(workdir: pathlib.Path, name: str, content: Mapping[str, Any]) -> None:
  """Writes the result in one rename."""
  records.write_text(result(workdir, name), json.dumps(content, indent=1))

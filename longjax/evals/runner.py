"""Evaluation: a sampler and a grader turn prompts into records.

Host code only: what writes and what grades are passed in. Training rewards and
evaluations use one grader (`reward.grading`), or a gain is an artefact.
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from longjax import types
from longjax.data import records as record_files
from longjax.evals import scores
from longjax.reward import grading

EVALS_FOLDER = 'evals'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
  """What a model wrote.

  Attributes:
    text: '</think>' visible, without the stop token.
    length: tokens, stop token included.
    is_finished: it ended with the stop token.
  """

  text: str
  length: int
  is_finished: bool


class Generate(Protocol):
  """Writes `num_samples` responses to each prompt, in order."""

  def __call__(
      self, prompts: Sequence[types.Prompt], num_samples: int
  ) -> Sequence[Sequence[Response]]:
    """One inner sequence of `num_samples` responses a prompt."""


class Score(Protocol):
  """Grades a response; `reward.hybrid.score` is one."""

  def __call__(
      self,
      example: types.TaskExample,
      response_text: str,
      *,
      is_finished: bool = True,
  ) -> types.Score:
    """The grade."""


def by_length(
    prompts: Iterable[types.Prompt], bounds: Sequence[int]
) -> dict[int, list[types.Prompt]]:
  """Sorts prompts under the smallest bound that holds them, in tokens.

  Raises:
    UserError: a prompt is longer than every bound.
  """
  bounds = sorted(bounds)
  grouped: dict[int, list[types.Prompt]] = {bound: [] for bound in bounds}
  for prompt in prompts:
    num_tokens = len(prompt.tokens)
    bound = next((b for b in bounds if num_tokens <= b), None)
    if bound is None:
      raise types.UserError(
          f'example {prompt.example.id!r} has a prompt of {num_tokens} tokens, '
          f'longer than every evaluation length {bounds}; add a longer one.')
    grouped[bound].append(prompt)
  return {bound: group for bound, group in grouped.items() if group}


def evaluate(
    generate: Generate,
    grader: grading.Grader,
    prompts: Mapping[int, Sequence[types.Prompt]],
    *,
    num_samples: int,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[scores.Record]:
  """Lets a model answer prompts and grades what it wrote.

  Args:
    generate: the model.
    grader: grades them. It may ask a judge while others are still written;
      nobody waits for it before the end.
    prompts: by nominal context length in tokens.
    num_samples: responses to each prompt.
    batch_size: prompts given to `generate` at once, all of one length; None
      means all of a length. The last batch of a length may be smaller.
    on_batch: called with the number of prompts just answered, for a progress
      bar.

  Returns:
    Records, in the order of the lengths, prompts and samples.
  """
  written: list[tuple[types.Prompt, int, int, Response]] = []
  for context_length, group in sorted(prompts.items()):
    size = batch_size or len(group) or 1
    for start in range(0, len(group), size):
      batch = group[start:start + size]
      answers = generate(batch, num_samples)
      for prompt, responses in zip(batch, answers, strict=True):
        assert len(responses) == num_samples, (len(responses), num_samples)
        for sample, response in enumerate(responses):
          grader.submit(
              (len(written),), prompt.example, response.text,
              is_finished=response.is_finished)
          written.append((prompt, context_length, sample, response))
      if on_batch is not None:
        on_batch(len(batch))
  grades = grader.collect().scores
  return [_record(*what, grades[(i,)]) for i, what in enumerate(written)]


def save(
    workdir: str | os.PathLike[str],
    name: str,
    results: Sequence[scores.Record],
    *,
    seed: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Writes records and their table to evals/{name}.json in one rename.

  Args:
    workdir: of the run.
    name: file name without suffix; a leading number orders the columns of the
      report: '0_base', '1_sft', '2_rl'.
    results: what `evaluate` returned.
    seed: of the bootstrap.
    facts: anything else about the evaluation, ready for JSON: 'step',
      'num_samples', 'temperature', ...

  Returns:
    The table.
  """
  summary = scores.table(results, seed=seed)
  content = {
      'name': name,
      'facts': dict(facts or {}),
      **summary,
      'records': [dataclasses.asdict(r) for r in results],
  }
  path = pathlib.Path(workdir) / EVALS_FOLDER / f'{name}.json'
  record_files.write_text(path, json.dumps(content, indent=1))
  return summary


def load(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """What `save` wrote, in the order of the names' leading numbers.

  Raises:
    UserError: a file is damaged; names it.
  """
  contents = []
  for path in (pathlib.Path(workdir) / EVALS_FOLDER).glob('*.json'):
    try:
      contents.append(json.loads(path.read_bytes()))
    except ValueError as error:
      raise types.UserError(
          f'{path} is damaged: {error}; delete it and run the same command '
          'again.') from error

  def order(content):
    number = content['name'].partition('_')[0]
    is_numbered = number.isdecimal()
    return (not is_numbered, int(number) if is_numbered else 0, content['name'])

  return sorted(contents, key=order)


def _record(
    prompt: types.Prompt,
    context_length: int,
    sample: int,
    response: Response,
    grade: types.Score,
) -> scores.Record:
  example = prompt.example
  return scores.Record(
      id=example.id,
      task=example.task,
      context_length=context_length,
      prompt_length=len(prompt.tokens),
      depth=_depth(example),
      sample=sample,
      question=example.question,
      gold=tuple(example.answers),
      evidence=tuple(
          example.documents[s.document].text[s.start:s.end]
          for s in example.evidence),
      response=response.text,
      response_length=int(response.length),
      is_finished=bool(response.is_finished),
      answer=grade.answer,
      rule=grade.rule,
      reward=float(grade.reward),
  )


def _depth(example: types.TaskExample) -> float | None:
  """Mean place of the evidence in the context, 0 to 1."""
  ends = list(itertools.accumulate(
      (len(d.text) for d in example.documents), initial=0))
  middles = [
      ends[s.document] + (s.start + s.end) / 2 for s in example.evidence]
  return sum(middles) / len(middles) / ends[-1] if middles else None

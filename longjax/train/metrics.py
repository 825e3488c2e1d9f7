"""What a run leaves behind while it runs: numbers and rollouts to read.

  metrics.jsonl    one line a step: {"step": 7, "stage": "rl", "values": {...}}
  rollouts.jsonl   one line a prompt, with the responses sampled for it
  tensorboard/     the same numbers as TensorBoard events

Names under 'time/' hold whatever depends on the clock; every other number of
two runs of one configuration on one machine is equal bit for bit, however
often either was killed and restarted.

Only the primary process writes; on the others every call does nothing.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import tensorboardX

from longjax import types
from longjax.data import chat, records
from longjax.parallel import multihost

METRICS_FILE = 'metrics.jsonl'
ROLLOUTS_FILE = 'rollouts.jsonl'
TENSORBOARD_FOLDER = 'tensorboard'


class MetricsWriter:
  """Writes numbers to metrics.jsonl and to TensorBoard."""

  def __init__(self, workdir: str | os.PathLike[str]):
    self._path = pathlib.Path(workdir) / METRICS_FILE
    self._events_folder = pathlib.Path(workdir) / TENSORBOARD_FOLDER
    self._lines: records.Appender | None = None
    self._events: tensorboardX.SummaryWriter | None = None
    self._purge_step: int | None = None

  def write(
      self, step: int, stage: str, values: Mapping[str, SupportsFloat]
  ) -> None:
    """Writes the numbers of one step; on disk when this returns.

    Args:
      step: global step, growing through all stages of a run.
      stage: name of the stage, e.g. 'sft'.
      values: anything `float` accepts, scalar arrays included. Prefer one
        `jax.device_get` of them all to one wait for each.
    """
    if not multihost.is_primary():
      return
    numbers = {name: float(value) for name, value in values.items()}
    if self._lines is None:
      self._lines = records.Appender(self._path)
    self._lines.append({'step': int(step), 'stage': stage, 'values': numbers})
    if self._events is None:
      self._events = self._new_events()
    for name, number in numbers.items():
      if math.isfinite(number):  # TensorBoard has no place for NaN.
        self._events.add_scalar(f'{stage}/{name}', number, int(step))

  def truncate(self, step: int) -> None:
    """Forgets all after `step`, which the run has gone back to.

    Call it after restoring a checkpoint, with its global step; -1 forgets
    everything. TensorBoard drops its later events when it reads the next.
    """
    if not multihost.is_primary():
      return
    self.close()
    records.truncate(self._path, step=step)
    self._purge_step = step + 1

  def close(self) -> None:
    """Writes out pending TensorBoard events; the writer may be used again."""
    if self._lines is not None:
      self._lines.close()
      self._lines = None
    if self._events is not None:
      self._events.close()
      self._events = None

  def _new_events(self) -> tensorboardX.SummaryWriter:
    # TensorBoard reads the files of a folder by name, which begins with the
    # second of creation: the number separates restarts within one second.
    self._events_folder.mkdir(parents=True, exist_ok=True)
    number = sum(1 for _ in self._events_folder.iterdir())
    purge_step, self._purge_step = self._purge_step, None
    return tensorboardX.SummaryWriter(
        logdir=str(self._events_folder),
        purge_step=purge_step,
        flush_secs=10,
        filename_suffix=f'.{number:05d}',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """One response to a prompt, as a reader of the report sees it.

  Attributes:
    text: the decoded response, '</think>' visible, without the stop token.
    score: its grade.
    advantage: what the update multiplied its gradient by, before masking.
    length: tokens, stop token included.
    entropy: mean over its tokens, nats.
    is_finished: it ended with the stop token.
    is_kept: False if AEPO masked it.
    turns: of the memory agent, before the answer; none if it did not read.
  """

  text: str
  score: types.Score
  advantage: float
  length: int
  entropy: float
  is_finished: bool = True
  is_kept: bool = True
  turns: Sequence['Turn'] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
  """What the memory agent noted of a part.

  Attributes:
    part: text of the part.
    memory: text carried on.
    plan: text carried on.
    is_parsed: False if there was no memory between tags.
  """

  part: str
  memory: str
  plan: str
  is_parsed: bool


class RolloutWriter:
  """Writes rollouts worth reading to rollouts.jsonl.

  A record is one prompt with the responses to it, so that a long context is
  stored once and its responses can be compared:

    step, stage, id, task, kind, prompt, question, instruction, gold,
    documents: [{title, text, evidence: [[start, end], ...]}, ...],
    samples: [{thinking, response, answer, rule, reward, advantage, length,
               entropy, is_finished, is_kept,
               turns: [{part, memory, plan, is_parsed}, ...]}, ...]

  `response` is the text after the thinking span, `answer` what was graded.
  """

  def __init__(self, workdir: str | os.PathLike[str]):
    self._path = pathlib.Path(workdir) / ROLLOUTS_FILE
    self._lines: records.Appender | None = None

  def write(
      self,
      step: int,
      stage: str,
      example: types.TaskExample,
      samples: Sequence[Sample],
      *,
      prompt_text: str,
  ) -> None:
    """Writes the responses to one prompt; on disk when this returns.

    Args:
      step: global step.
      stage: name of the stage.
      example: where the prompt comes from.
      samples: the responses, or some of them.
      prompt_text: the prompt as the model read it.
    """
    if not multihost.is_primary():
      return
    if self._lines is None:
      self._lines = records.Appender(self._path)
    self._lines.append({
        'step': int(step),
        'stage': stage,
        'id': example.id,
        'task': example.task,
        'kind': example.kind,
        'prompt': prompt_text,
        'question': example.question,
        'instruction': example.instruction,
        'gold': list(example.answers),
        'documents': _documents(example),
        'samples': [_sample(sample) for sample in samples],
    })

  def truncate(self, step: int) -> None:
    """Forgets all after `step`; see `MetricsWriter.truncate`."""
    if not multihost.is_primary():
      return
    self.close()
    records.truncate(self._path, step=step)

  def close(self) -> None:
    """Closes the file; the writer may be used again."""
    if self._lines is not None:
      self._lines.close()
      self._lines = None


def read(workdir: str | os.PathLike[str]) -> list[records.Record]:
  """All records of metrics.jsonl, oldest first."""
  return records.read(pathlib.Path(workdir) / METRICS_FILE)


def _documents(example: types.TaskExample) -> list[records.Record]:
  spans: list[list[list[int]]] = [[] for _ in example.documents]
  for span in example.evidence:
    spans[span.document].append([span.start, span.end])
  return [
      {'title': document.title, 'text': document.text, 'evidence': evidence}
      for document, evidence in zip(example.documents, spans, strict=True)
  ]


def _sample(sample: Sample) -> dict[str, Any]:
  parts = chat.split_response(sample.text)
  return {
      'thinking': parts.thinking,
      'response': parts.answer,
      'answer': sample.score.answer,
      'rule': sample.score.rule,
      'reward': float(sample.score.reward),
      'advantage': float(sample.advantage),
      'length': int(sample.length),
      'entropy': float(sample.entropy),
      'is_finished': bool(sample.is_finished),
      'is_kept': bool(sample.is_kept),
      'turns': [dataclasses.asdict(turn) for turn in sample.turns],
  }

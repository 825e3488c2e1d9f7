"""What is kept of an inquiry in its folder: it can be killed at any time.

  WORKDIR/compiled/            programs, shared by all inquiries
  WORKDIR/<hash>/inquiry.json  where it stands: replaced after every part

The hash is of the model, the documents (paths, sizes, times of change), the
questions and all settings that an answer depends on. Whoever asks the same
again goes on where the last one was killed, or is shown its answers.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from longjax.agents import memory, rounds
from longjax.ask import sources as sources_lib
from longjax.data import records
from longjax.parallel import multihost

FILE = 'inquiry.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """What the model answered.

  Attributes:
    text: of its response, thinking included.
    is_finished: it ended with a stop token.
  """

  text: str
  is_finished: bool


@dataclasses.dataclass(kw_only=True)
class Reading:
  """How one question about one document stands; see `rounds.Reader`.

  Attributes:
    turn: parts read.
    notes: memory and plan.
    sources: where the memory's sentences came from.
    answer: None before there is one.
  """

  turn: int = 0
  notes: memory.Notes = memory.Notes()
  sources: sources_lib.Sources = dataclasses.field(
      default_factory=sources_lib.Sources)
  answer: Answer | None = None

  def to_json(self, agent: memory.MemoryAgent) -> dict[str, Any]:
    """What `from_json` takes, and the memory as text for people."""
    return {
        'turn': self.turn, 'memory': list(self.notes.memory),
        'plan': list(self.notes.plan), 'is_parsed': self.notes.is_parsed,
        'memory_text': agent.text(self.notes.memory),
        'sources': self.sources.to_json(),
        'answer': self.answer and dataclasses.asdict(self.answer)}

  @classmethod
  def from_json(cls, content: dict[str, Any]) -> 'Reading':
    """What was saved."""
    answer = content['answer']
    return cls(
        turn=content['turn'],
        notes=memory.Notes(
            memory=tuple(content['memory']), plan=tuple(content['plan']),
            is_parsed=content['is_parsed']),
        sources=sources_lib.Sources.from_json(content['sources']),
        answer=answer and Answer(**answer))

  def reader(self, query: int) -> rounds.Reader:
    """The reader who goes on with this."""
    return rounds.Reader(query=query, turn=self.turn, notes=self.notes)


class Folder:
  """The folder of an inquiry."""

  def __init__(self, workdir: str | os.PathLike[str], asked: Any):
    """Chooses the folder.

    Args:
      workdir: of all inquiries.
      asked: what tells this one from others, ready for JSON.
    """
    text = json.dumps(asked, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    self.path = pathlib.Path(workdir) / digest[:16]
    self._asked = json.loads(text)  # As it is read again: lists, no tuples.

  def load(self) -> dict[str, Any]:
    """What was saved last; {} if nothing was. All processes call this."""

    def read() -> dict[str, Any]:
      path = self.path / FILE
      try:
        content = json.loads(path.read_bytes())
        if content['asked'] != self._asked:
          raise ValueError('it is of another inquiry')
      except FileNotFoundError:
        return {}
      except (
          OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logging.warning('%s is damaged (%s); starting anew.', path, error)
        return {}
      return content

    return multihost.on_primary(read)

  def save(
      self, agent: memory.MemoryAgent, readings: Sequence[Reading], **facts: Any
  ) -> None:
    """Replaces what was saved; all processes call this."""
    content = {'asked': self._asked, **facts,
               'readings': [r.to_json(agent) for r in readings]}
    multihost.on_primary(lambda: records.write_text(
        self.path / FILE, json.dumps(content)))


def identity(path: pathlib.Path) -> list[Any]:
  """A file's path, size and time of change."""
  stat = path.stat()
  return [str(path.absolute()), stat.st_size, stat.st_mtime_ns]

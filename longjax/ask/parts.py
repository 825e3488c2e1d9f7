"""Documents as parts for the memory agent, and the lines each part is of."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from longjax import types
from longjax.agents import memory
from longjax.ask import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """How much there is to read."""

  num_parts: int
  num_tokens: int


def size(agent: memory.MemoryAgent, paths: Sequence[pathlib.Path]) -> Size:
  """Reads documents once to count."""
  num_parts = num_tokens = 0
  for part in Parts(agent, paths):
    num_parts += 1
    num_tokens += len(part)
  return Size(num_parts=num_parts, num_tokens=num_tokens)


class Parts:
  """The parts of documents, made when they are asked for.

  Attributes:
    lines: of the part handed out last; its first and last perhaps in it only
      to a part.
  """

  def __init__(
      self, agent: memory.MemoryAgent, paths: Sequence[pathlib.Path], *,
      num_parts: int | None = None,
  ):
    """Reads nothing yet.

    Args:
      agent: cuts them.
      paths: of the documents.
      num_parts: as counted before. Other numbers, of files that are written
        to meanwhile, raise UserError. None takes any.
    """
    self._agent = agent
    self._paths = paths
    self._num_parts = num_parts
    self.lines: list[files.Line] = []

  def __iter__(self) -> Iterator[tuple[int, ...]]:
    waiting: collections.deque[tuple[files.Line, int]] = collections.deque()

    def encoded() -> Iterator[list[int]]:
      for line in files.lines(self._paths):
        ids = self._agent.encode(line.text)
        waiting.append((line, len(ids)))
        yield ids

    number = 0
    for number, part in enumerate(self._agent.cut(encoded()), start=1):
      self._check(number <= (self._num_parts or number))
      self.lines, left = [], len(part)
      while left:
        line, num_tokens = waiting.popleft()
        self.lines.append(line)
        if num_tokens > left:  # The next part begins with the rest.
          waiting.appendleft((line, num_tokens - left))
        left -= min(num_tokens, left)
      yield part
    self._check(number == (self._num_parts or number))

  def _check(self, is_as_counted: bool) -> None:
    if not is_as_counted:
      raise types.UserError(
          f'{files.shown(self._paths[0])}: was written to, or another file '
          'after it, while it was read; run the same command again.')

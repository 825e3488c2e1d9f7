"""Documents as parts for the memory agent, and the lines each part is of."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

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
      self, agent: memory.MemoryAgent, paths: Sequence[pathlib.Path]
  ):
    """Reads nothing yet."""
    self._agent = agent
    self._paths = paths
    self.lines: list[files.Line] = []

  def __iter__(self) -> Iterator[tuple[int, ...]]:
    waiting: collections.deque[tuple[files.Line, int]] = collections.deque()

    def encoded() -> Iterator[list[int]]:
      for line in files.lines(self._paths):
        ids = self._agent.encode(line.text)
        waiting.append((line, len(ids)))
        yield ids

    for part in self._agent.cut(encoded()):
      self.lines, left = [], len(part)
      while left:
        line, num_tokens = waiting.popleft()
        self.lines.append(line)
        if num_tokens > left:  # The next part begins with the rest.
          waiting.appendleft((line, num_tokens - left))
        left -= min(num_tokens, left)
      yield part

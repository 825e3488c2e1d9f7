"""Where the facts that a memory keeps came from.

Sentences of a memory are looked for among the lines of the part that was read
before they were written. A model puts things in its own words, so what is
looked for is the place that shares most of a sentence's words; a word counts
the more, the fewer lines have it: names and numbers decide. A sentence that an
earlier memory had, in these words or nearly, keeps the place found then.

Held are the sentences of the memory as it is now, nothing else.
"""

import bisect
import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from longjax.ask import files

# Share of a sentence, by weight, that a place must have.
_LEAST_SHARED = 0.5
# A fact may go on in the next line; a shorter place is the better one.
_MAX_LINES = 3
_COST_OF_A_LINE = 0.02
# Of 'the', 'is' and their like, where a part is too short to tell.
_SMALL_WEIGHT = 0.25
_SMALL_WORD_CHARS = 3

_SENTENCE_END = re.compile(r'(?<=[.!?])\s+|(?<=。)\s*|\s*\n\s*')
_BULLET = re.compile(r'^(?:[-*•]|\d+[.)])\s+')
# Scripts without spaces are compared sign by sign.
_WORD = re.compile(r'[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """Where a sentence came from.

  Attributes:
    file: name of the file.
    line: of the file, from 1; of a whole part its first.
    part: number of the part, from 1.
    is_found: False if no place says so; the part is then that after which the
      sentence was first written.
  """

  file: str
  line: int
  part: int
  is_found: bool

  def __str__(self) -> str:
    if self.is_found:
      return f'{self.file}:{self.line} (part {self.part})'
    return (f'in no line as such; first noted after part {self.part}, from '
            f'{self.file}:{self.line} on')


def sentences(text: str) -> list[str]:
  """The sentences and lines of a memory, each once, without bullets."""
  found = (_BULLET.sub('', s.strip()) for s in _SENTENCE_END.split(text))
  return list(dict.fromkeys(s for s in found if _WORD.search(s)))


class Sources:
  """The places of the sentences of one memory as it changes."""

  def __init__(self, known: Mapping[str, Source] | None = None):
    """Goes on from what is known; None is a memory without any sentence."""
    self.known: dict[str, Source] = dict(known or {})

  def update(
      self, memory: str, part: int, lines: Sequence[files.Line]
  ) -> None:
    """Takes a memory just written.

    Args:
      memory: its text.
      part: number of the part that was read, from 1.
      lines: of that part; at least one.
    """
    place = _Places(lines)
    before = {s: _words(s) for s in self.known}
    self.known = {
        s: self.known.get(s) or self._find(s, part, lines, place, before)
        for s in sentences(memory)}

  def _find(
      self, sentence: str, part: int, lines: Sequence[files.Line],
      places: '_Places', before: Mapping[str, frozenset[str]],
  ) -> Source:
    words, small = _words(sentence), _small_words(sentence)
    weights = {
        w: places.weight(w) * (_SMALL_WEIGHT if w in small else 1.0)
        for w in words}
    total = sum(weights.values())
    old_share, old = max((
        (sum(weights[w] for w in words & of_old) / total, s)
        for s, of_old in before.items()), default=(0.0, ''))
    share, number = places.best(weights)
    if old_share >= max(_LEAST_SHARED, share / total):
      return self.known[old]
    is_found = share / total >= _LEAST_SHARED
    line = lines[number if is_found else 0]
    return Source(
        file=line.file, line=line.number, part=part, is_found=is_found)

  def to_json(self) -> list[Any]:
    """What `from_json` takes."""
    return [[s, dataclasses.asdict(place)] for s, place in self.known.items()]

  @classmethod
  def from_json(cls, content: Sequence[Any]) -> 'Sources':
    """What was saved."""
    return cls({s: Source(**place) for s, place in content})


class _Places:
  """An index of the lines of a part."""

  def __init__(self, lines: Sequence[files.Line]):
    self._lines_with: dict[str, list[int]] = collections.defaultdict(list)
    for i, line in enumerate(lines):
      for word in _words(line.text):
        self._lines_with[word].append(i)

  def weight(self, word: str) -> float:
    """Of a word: the fewer lines have it, the more."""
    # A root so high, for a word of the model's own must not outweigh all that
    # it copied from lines that are much alike.
    return (1 + len(self._lines_with.get(word, ())))**-0.25

  def best(self, weights: Mapping[str, float]) -> tuple[float, int]:
    """Weight that the best place shares, and its first line."""
    lines_with = {w: self._lines_with.get(w, []) for w in weights}
    # Common words stand everywhere: a place that shares enough has one of
    # those that make up the rest.
    rest = (1.0 - _LEAST_SHARED) * sum(weights.values())
    candidates: set[int] = set()
    for word in sorted(weights, key=lambda w: (-weights[w], w)):
      candidates |= {
          max(i - before, 0) for i in lines_with[word]
          for before in range(_MAX_LINES)}
      rest -= weights[word]
      if rest < 0.0:
        break
    best = (0.0, 0.0, 0)
    for start in sorted(candidates):
      for length in range(1, _MAX_LINES + 1):
        shared = sum(
            weight for w, weight in weights.items()
            if _any_within(lines_with[w], start, start + length))
        rank = shared - (length - 1) * _COST_OF_A_LINE * sum(weights.values())
        if rank > best[0] + 1e-9:
          best = rank, shared, start
    return best[1], best[2]


def _any_within(numbers: Sequence[int], start: int, end: int) -> bool:
  """Whether one of some sorted numbers lies in [start, end)."""
  i = bisect.bisect_left(numbers, start)
  return i < len(numbers) and numbers[i] < end


def _small_words(sentence: str) -> frozenset[str]:
  """Those that look like neither names nor numbers."""
  return frozenset(
      w.casefold() for i, w in enumerate(_WORD.findall(sentence))
      if len(w) <= _SMALL_WORD_CHARS and w.isascii() and w.isalpha()
      and (w.islower() or i == 0))


def _words(text: str) -> frozenset[str]:
  return frozenset(_WORD.findall(text.casefold()))

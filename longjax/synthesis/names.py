"""Invented names and codes, in three disjoint spaces.

A stable hash sends every name ("Dorvan") and code ("a3f") to training,
validation or test, so nothing a model meets in training occurs in the others.
Names have two syllables of three or four letters, drawn from few: a small
vocabulary writes them in two tokens. Long contexts use up the short
ones; then names get more syllables and codes more characters.
"""

import functools
import itertools
import random
import zlib

from longjax import types

SPLITS = ('train', 'validation', 'test')

# 48 first and 48 last syllables, their endings tied to their beginnings: few
# enough that byte-pair encoding makes each of them one piece, and a name two.
_FIRST = tuple(
    consonant + vowel + 'lrn'[(i + j) % 3]
    for i, consonant in enumerate('BDFGHKLMPRTV')
    for j, vowel in enumerate('aeio'))
_MIDDLE = tuple(map(''.join, itertools.product('bdgklmrtv', 'aeiu')))
_LAST = tuple(
    consonant + vowel + ('n', 's', 'th')[(i + j) % 3]
    for i, consonant in enumerate('bdgkmstvwzhf')
    for j, vowel in enumerate('aeiu'))
# Combinations that happen to be English words or well-known names.
_NOT_INVENTED = frozenset(('Kelvin', 'Marvin', 'Pandas', 'Tartan'))
_MIXED_DIGITS = '0123456789abcdef'
# Draws at one length before a longer one is tried.
_PATIENCE = 256


@functools.lru_cache(maxsize=1 << 16)
def split_of(name: str) -> str:
  """The space of a name or code: 80% train, 10% validation, 10% test."""
  bucket = zlib.crc32(name.encode()) % 10
  return SPLITS[max(0, bucket - 7)]


@functools.cache
def short_names(split: str) -> tuple[str, ...]:
  """All two-syllable names of one space."""
  if split not in SPLITS:
    raise types.UserError(
        f'names={split!r} is not a name space; use one of '
        f'{", ".join(SPLITS)}.')
  every = (first + last for first in _FIRST for last in _LAST)
  return tuple(
      name for name in every
      if split_of(name) == split and name not in _NOT_INVENTED)


class NameSource:
  """Draws names and codes of one space, none of them twice."""

  def __init__(self, split: str, rng: random.Random):
    self._split = split
    self._rng = rng
    self._short = short_names(split)
    self._used: set[str] = set()

  def name(self) -> str:
    """A fresh name."""
    is_short = 2 * len(self._used) < len(self._short)
    for attempt in itertools.count():
      if is_short:
        name = self._rng.choice(self._short)
      else:
        middle = self._rng.choices(_MIDDLE, k=1 + attempt // _PATIENCE)
        name = ''.join(
            [self._rng.choice(_FIRST), *middle, self._rng.choice(_LAST)])
      if self._take(name):
        return name
    raise AssertionError('unreachable')

  def code(self, length: int) -> str:
    """A fresh hex-like code with at least one digit and one letter."""
    for attempt in itertools.count():
      code = ''.join(self._rng.choices(
          _MIXED_DIGITS, k=length + attempt // _PATIENCE))
      if not code.isdigit() and not code.isalpha() and self._take(code):
        return code
    raise AssertionError('unreachable')

  def _take(self, name: str) -> bool:
    """Marks a name as used; False if it is taken or of another space."""
    if name in self._used or split_of(name) != self._split:
      return False
    self._used.add(name)
    return True

"""From a response to the answer in it, and from an answer to its tokens.

Rules 1 and 2 of the reward: what follows the last `</think>`, and in it what
follows the last "the answer is".
"""

import re
import unicodedata
from typing import Literal

Think = Literal['required', 'none', 'strict']

_CUE = re.compile(r'the answer is', re.IGNORECASE)
# Stripped at both ends of an answer. '_' and quotes may belong to it, and a
# leading '-' is a sign.
_LEFT = ' \t\r\v\f*`#>:~'
_RIGHT = ' \t\r\v\f*`~.,;:!?…。'

_DASHES = str.maketrans(dict.fromkeys('−‐‑‒–', '-') | {'’': "'", '—': ' '})
_THOUSANDS = re.compile(r'(?<=[0-9]),(?=[0-9]{3}(?![0-9]))')
# A number keeps its sign and decimal point. Inside a word, apostrophes, dots,
# hyphens and underscores are dropped (O'Neil -> oneil), except between digits,
# where they tell 3.11 from 311; everything else separates words.
_TOKEN = re.compile(
    r"(?<!\w)-?(?:\d+(?:\.\d+)?|\.\d+)(?!\w|['._-]+\w)"
    r"|\w+(?:['._-]+\w+)*")
_JOINER = re.compile(r"(?<!\d)['._-]+|['._-]+(?!\d)")
_NUMBER = re.compile(r'-?(?:\d+(?:\.\d+)?|\.\d+)')
_ARTICLES = frozenset(('a', 'an', 'the'))


def split_think(
    text: str, *, think: Think = 'required', tag: str = '</think>'
) -> str | None:
  """The text after the last closing think tag.

  Args:
    text: a decoded response. Its opening tag may be part of the prompt, so
      only the closing one is looked for.
    think: 'required' returns None without a tag (usually a truncated
      response), 'strict' also with more than one, 'none' takes the whole text
      where there is no tag.
    tag: the closing tag.

  Returns:
    The rest of the response, or None.
  """
  num_tags = text.count(tag)
  if num_tags == 0:
    return text if think == 'none' else None
  if think == 'strict' and num_tags > 1:
    return None
  return text[text.rindex(tag) + len(tag):]


def extract(text: str) -> str:
  """The answer after the last cue "the answer is", or ''.

  It ends at the line's end and is stripped of markdown and final punctuation.
  """
  ends = [cue.end() for cue in _CUE.finditer(text)]
  return strip(text[ends[-1]:].partition('\n')[0]) if ends else ''


def strip(text: str) -> str:
  """Removes white space, markdown at both ends and final punctuation."""
  return text.lstrip(_LEFT).rstrip(_RIGHT)


def tokens(text: str) -> tuple[str, ...]:
  """Words and numbers for comparison: NFKC, case folded, without articles.

  Signs and decimal points of numbers stay, so that -5 is not 5 and 1.5 is not
  15; thousands separators and all other punctuation go.
  """
  text = unicodedata.normalize('NFKC', text).casefold().translate(_DASHES)
  text = _THOUSANDS.sub('', text)
  words = []
  for match in _TOKEN.finditer(text):
    word = match.group()
    if not _NUMBER.fullmatch(word):
      word = _JOINER.sub('', word)
    if word and word not in _ARTICLES:
      words.append(word)
  return tuple(words)

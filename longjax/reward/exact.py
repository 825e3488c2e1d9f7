"""Exact rules: multiple choice, short answers, lists."""

import collections
import re
from collections.abc import Iterable, Sequence

from longjax.reward import answers, numeric

_QUOTES = ' \t"\'“”‘’'
# A letter that ends its answer ("C", "(C)", "option C.") or is set off from
# what follows by a bracket or punctuation ("C) Paris", not "A dog").
_OPTION = re.compile(
    r'(?:(?:option|choice|letter|answer)\s+)?'
    r'(?:\((?P<closed>[a-z])\)|(?P<bare>[a-z])(?:\s*(?:[).:,]|-\s|$)))'
    r'(?P<rest>.*)', re.IGNORECASE | re.DOTALL)
# Another option named in the rest; a lower-case letter before a word is an
# article or a variable, not an option.
_OTHER_OPTION = re.compile(
    r"(?<![\w'’])(?:[A-Z](?!\w)|[a-z](?=\s*(?:[^\w\s'’]|$)))")
_MIN_LEN_CAP = 32


def multiple_choice(prediction: str, golds: Sequence[str]) -> bool:
  """True for exactly one option letter, or an option's exact text.

  Args:
    prediction: 'C', '(C)', 'C.', 'option C', 'C) its text' or the text.
    golds: the letter, then the option's text (may be absent).

  Returns:
    Whether it names the gold option and no other.
  """
  prediction = prediction.strip(_QUOTES)
  letter, texts = golds[0].strip(' ().').casefold(), golds[1:]
  words = answers.tokens(prediction)
  # A one-letter option text would be mistaken for the name of an option.
  if len(prediction) > 1 and words and any(
      words == answers.tokens(text) for text in texts):
    return True
  match = _OPTION.fullmatch(prediction)
  if match is None:
    return False
  if (match['closed'] or match['bare']).casefold() != letter:
    return False
  rest = match['rest'].strip(_QUOTES)
  if any(answers.tokens(rest) == answers.tokens(text) for text in texts):
    return True
  others = {found.casefold() for found in _OTHER_OPTION.findall(rest)}
  return others <= {letter}


def short_answer(prediction: str, golds: Iterable[str]) -> bool:
  """Cover exact match, in one direction only.

  The gold's token sequence must stand in the prediction, which may be at most
  max(32, 4 times the gold) tokens long. An answer without tokens ("the") never
  matches: QwenLong-L1's two-way rule finds it inside every gold. A gold of yes
  or no must be the first token. A gold that is punctuation only, such as (),
  must be given literally.
  """
  return any(_covers(prediction, gold) for gold in golds)


def _covers(prediction: str, gold: str) -> bool:
  """`short_answer` for one gold."""
  wanted, given = answers.tokens(gold), answers.tokens(prediction)
  if not wanted:
    literal = gold.strip()
    return bool(literal) and prediction.strip() == literal
  if not given or len(given) > max(_MIN_LEN_CAP, 4 * len(wanted)):
    return False
  if wanted in (('yes',), ('no',)):
    return given[0] == wanted[0]
  return any(
      given[i:i + len(wanted)] == wanted
      for i in range(len(given) - len(wanted) + 1))


def cells(
    prediction: str, golds: Sequence[str], *, is_ordered: bool = False
) -> bool:
  """True if a list has exactly the gold cells, each as often.

  Cells are separated by semicolons, bars, commas or a final "and". As cells may
  contain these, every consistent way of splitting is tried.

  Args:
    prediction: 'a, b and c', '[a, b, c]', 'a; b; c'.
    golds: one cell each.
    is_ordered: the order counts, too.

  Returns:
    Whether one way of splitting gives the gold cells.
  """
  wanted = [_cell(gold) for gold in golds]
  # Runs of white space would make the patterns below quadratic.
  prediction = ' '.join(prediction.split()).strip(_QUOTES)
  if prediction[:1] + prediction[-1:] in ('[]', '()', '{}'):
    prediction = prediction[1:-1]
  for separator in (r'[;|]', r',\s', r',', r'$'):
    for conjunction in (r'', r'|\s+(?:and|&)\s+'):
      parts = re.split(
          rf'(?:\s*{separator}\s*(?:and\s+)?){conjunction}', prediction)
      parts = [part for part in parts if part.strip(_QUOTES)]
      if len(parts) != len(wanted):
        continue
      given = [_cell(part) for part in parts]
      if given == wanted if is_ordered else (
          collections.Counter(given) == collections.Counter(wanted)):
        return True
  return False


def _cell(text: str) -> tuple[str, ...]:
  """A cell in comparable form: a number's value, or its tokens."""
  text = text.strip(_QUOTES)
  number = numeric.single(text)
  words = answers.tokens(text)
  if number is not None and len(words) == 1:
    return (repr(number.value), '%' if number.is_percent else '')
  return words or (text,)

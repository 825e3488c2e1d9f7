"""Numbers in answers: reading them and comparing them.

A difference from the verifier of QwenLong-L1: the sign counts, powers of ten
are not forgiven, and nothing the model wrote is evaluated.
"""

import dataclasses
import math
import re

_DIGITS = r'(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)'
_SCALES = {
    'k': 1e3, 'thousand': 1e3, 'thousands': 1e3,
    'mn': 1e6, 'million': 1e6, 'millions': 1e6,
    'bn': 1e9, 'billion': 1e9, 'billions': 1e9,
}
_SCALE_WORD = '|'.join(sorted(_SCALES, key=len, reverse=True))
_CURRENCY = r'(?:[$€£¥₹]\s*)?'
_NUMBER = re.compile(
    rf"""
    (?<![\w.])(?<![0-9],)
    (?P<open>{_CURRENCY}\(\s*)?
    (?P<sign>[-+]\s?|(?:minus|negative)\s+)?
    {_CURRENCY}
    (?P<late_sign>[-+])?
    (?P<digits>{_DIGITS})(?![0-9_]|[.,][0-9])
    (?P<power>e[-+]?[0-9]{{1,3}}(?!\w)
      |\s*[x×*]\s*10\s*(?:\^|\*\*)\s*[-+]?[0-9]{{1,3}})?
    (?:\s*/\s*(?P<denominator>{_DIGITS})(?!\s*/|[0-9_]|[.,][0-9]))?
    (?:\s*(?P<scale>{_SCALE_WORD})(?!\w))?
    (?P<close>\s*\))?
    (?P<percent>\s*(?:%|percent(?:age)?(?!\w)|per\s+cent(?!\w)))?
    (?P<late_close>\s*\))?
    """,
    re.IGNORECASE | re.VERBOSE)
_PERCENT = re.compile(r'%|\bper ?cent', re.IGNORECASE)
_DASHES = str.maketrans(dict.fromkeys('−‐‑‒–', '-'))

# 0.15%: what QwenLong-L1 grants.
RELATIVE_TOLERANCE = 1.5e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number:
  """A number as written.

  Attributes:
    value: with sign, fraction, exponent and scale word applied; a percentage
      keeps its written size (5% is 5).
    half_unit: half a unit of the last decimal written; 0 without decimals.
    is_percent: a percent sign follows it.
    is_scaled: a scale word such as "million" follows it.
  """

  value: float
  half_unit: float
  is_percent: bool
  is_scaled: bool


def parse(text: str) -> tuple[Number, ...]:
  """All numbers written in `text`, in order.

  Reads signs, accountants' parentheses for negatives, thousands commas,
  currency signs, percentages, scientific notation, fractions a/b and the words
  k, thousand, million, billion. Digits inside words are not numbers. A value
  out of range is infinite, a division by zero NaN.
  """
  return tuple(
      _number(match) for match in _NUMBER.finditer(text.translate(_DASHES)))


def _number(match: re.Match[str]) -> Number:
  """What one match of `_NUMBER` says."""
  digits = match['digits'].replace(',', '')
  value = float(digits)
  unit = 10.0 ** -len(digits.partition('.')[2]) if '.' in digits else 0.0
  factor = 1.0
  if match['power']:
    factor *= float('1e' + re.findall(r'[-+]?[0-9]+$', match['power'])[0])
  if match['scale']:
    factor *= _SCALES[match['scale'].lower()]
  if match['denominator']:
    denominator = float(match['denominator'].replace(',', ''))
    factor = factor / denominator if denominator else math.nan
  sign = (match['sign'] or match['late_sign'] or '+').strip().lower()
  is_closed = match['close'] or match['late_close']
  if sign not in ('', '+') or (match['open'] and is_closed):
    value = -value
  value *= factor
  return Number(
      value=value,
      half_unit=0.5 * unit * factor,
      is_percent=bool(match['percent']),
      is_scaled=bool(match['scale']),
  )


def single(text: str) -> Number | None:
  """The one finite number of an answer; None if there is none or they differ.

  After an equals sign only the last side counts. Several different numbers are
  no answer: listing candidates must not pay.
  """
  numbers = parse(text.rpartition('=')[2])
  if not numbers or not math.isfinite(numbers[0].value):
    return None
  first = numbers[0]
  if any(n.value != first.value or n.is_percent != first.is_percent
         for n in numbers):
    return None
  return first


def is_equal(
    prediction: str, gold: str, *, question: str = '', unit: str = ''
) -> bool:
  """True if an answer states the gold number, within tolerance.

  The tolerance is 0.15% of the gold or half a unit of its last stated decimal,
  whichever is larger. A fraction may be given for a percentage and the reverse
  only if a percent sign stands on one side, or the question speaks of per
  cent. "5,200,000" may be given for 5.2 only if the unit declares millions.

  Args:
    prediction: what the model answered.
    gold: the reference.
    question: where "percent" is looked for.
    unit: the declared unit of the gold, e.g. 'million dollars'; may be empty.

  Returns:
    Whether they agree, sign included.
  """
  wanted, given = single(gold), single(prediction)
  if wanted is None or given is None:
    return False
  scales = [1.0]
  if wanted.is_percent != given.is_percent:
    scales.append(100.0 if wanted.is_percent else 0.01)
  elif not wanted.is_percent and _PERCENT.search(question):
    scales.extend((100.0, 0.01))
  declared = next(
      (_SCALES[w] for w in unit.lower().split() if w in _SCALES), None)
  if declared is not None and not wanted.is_scaled:
    scales.append(1.0 / declared)
  return any(_is_close(given.value * scale, wanted) for scale in scales)


def _is_close(value: float, gold: Number) -> bool:
  """True within tolerance and not on the other side of zero."""
  tolerance = max(RELATIVE_TOLERANCE * abs(gold.value), gold.half_unit)
  # Half a unit is a round decimal that binary fractions straddle.
  is_near = abs(value - gold.value) <= tolerance * (1.0 + 1e-9)
  return is_near and value * gold.value >= 0.0


def is_equal_count(prediction: str, gold: str) -> bool:
  """True if an answer states exactly the gold count, as a plain number."""
  wanted, given = single(gold), single(prediction)
  if wanted is None or given is None or given.is_percent:
    return False
  return given.value == wanted.value

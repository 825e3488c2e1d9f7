"""Axes of a drawing: where a value goes, where the ticks are, what they say."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Axis:
  """Maps values in [low, high] to places in [start, end]."""

  low: float
  high: float
  start: float
  end: float
  is_log: bool = False

  def __call__(self, value: float) -> float:
    """Where `value` goes."""
    low, high = self.low, self.high
    if self.is_log:
      low, high, value = math.log10(low), math.log10(high), math.log10(value)
    share = (value - low) / (high - low)
    return self.start + share * (self.end - self.start)


def number(value: float) -> str:
  """A number as short as a reader needs it."""
  if not math.isfinite(value):
    return '–'
  size = abs(value)
  if size == 0.0 or 1e-3 <= size < 1e6:
    digits = 3 if size < 1 else 2 if size < 100 else 0
    short = f'{value:,.{digits}f}'
    return short.rstrip('0').rstrip('.') if '.' in short else short
  return f'{value:.1e}'.replace('e-0', 'e-').replace('e+0', 'e')


def ticks(low: float, high: float, most: int) -> list[float]:
  """Round numbers that cover [low, high] in at most `most` steps."""
  if not high > low:
    high = low + (abs(low) or 1.0)
  step = 10.0 ** math.floor(math.log10((high - low) / most))
  factors = (1, 2, 2.5, 5, 10, 20, 25)
  while True:
    for factor in factors:
      first = math.floor(low / (step * factor) + 1e-9)
      last = math.ceil(high / (step * factor) - 1e-9)
      if last - first <= most:
        return [i * step * factor for i in range(first, last + 1)]
    step *= 10.0

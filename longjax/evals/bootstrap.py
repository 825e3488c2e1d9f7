"""Confidence intervals by resampling examples.

Responses to one example are no independent observations, so examples, not
responses, are drawn: every observation here is one example's mean. A score
that is a mean over task types draws within each type (stratum) and averages
the types with equal weight.

Percentile bootstrap, Efron 1979. It is honest about tens of examples, not
about three, and collapses to a point where all examples score alike.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
  """A mean and where it may lie.

  Attributes:
    mean: of the observations.
    low: lower end of the interval; None without two observations to draw.
    high: upper end; None likewise.
  """

  mean: float
  low: float | None
  high: float | None


def interval(
    strata: Sequence[np.ndarray],  # f64[n_k] each
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Interval:
  """Mean over strata of their means, with a bootstrap interval.

  Args:
    strata: observations of each stratum; one stratum gives a plain mean. An
      empty stratum is left out; a stratum of one contributes no spread.
    seed: makes the interval reproducible.
    num_resamples: draws.
    level: probability mass of the interval.

  Returns:
    The interval. Its mean is NaN without any observation.
  """
  strata = [np.asarray(s, np.float64) for s in strata if len(s)]
  if not strata:
    return Interval(mean=float('nan'), low=None, high=None)
  mean = float(np.mean([s.mean() for s in strata]))
  if all(len(s) < 2 for s in strata):
    return Interval(mean=mean, low=None, high=None)
  generator = np.random.default_rng(seed)
  resampled = np.zeros(num_resamples)
  for s in strata:
    draws = generator.integers(len(s), size=(num_resamples, len(s)))
    resampled += s[draws].mean(axis=1) / len(strata)
  tail = (1.0 - level) / 2.0
  low, high = np.quantile(resampled, [tail, 1.0 - tail])
  return Interval(mean=mean, low=float(low), high=float(high))

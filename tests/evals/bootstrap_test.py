import itertools

import numpy as np
import pytest

from longjax.evals import bootstrap


def test_three_observations_give_the_quantiles_of_all_27_resamples():
  values = np.array([0.0, 0.3, 1.0])
  means = [np.mean(draw) for draw in itertools.product(values, repeat=3)]
  result = bootstrap.interval([values], num_resamples=200_000, level=0.8)
  assert result.mean == pytest.approx(1.3 / 3)
  # Quantiles of a discrete distribution: exact up to the number of draws.
  assert result.low == pytest.approx(np.quantile(means, 0.1), abs=1e-9)
  assert result.high == pytest.approx(np.quantile(means, 0.9), abs=1e-9)


def test_strata_agree_with_a_loop_that_draws_within_each():
  generator = np.random.default_rng(5)
  strata = [generator.random(12), generator.random(40) * 0.3]
  means = []
  for _ in range(10_000):
    of_strata = []
    for stratum in strata:
      drawn = [stratum[generator.integers(len(stratum))] for _ in stratum]
      of_strata.append(sum(drawn) / len(drawn))
    means.append(sum(of_strata) / len(of_strata))
  low, high = np.quantile(means, [0.025, 0.975])
  result = bootstrap.interval(strata, num_resamples=20_000)
  assert result.mean == pytest.approx(
      (strata[0].mean() + strata[1].mean()) / 2)
  # The means spread by 0.04, so a 2.5% quantile of 10,000 of them has a
  # standard error of 0.0011, and the difference of the two of 0.0014.
  assert result.low == pytest.approx(low, abs=0.006)
  assert result.high == pytest.approx(high, abs=0.006)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
  generator = np.random.default_rng(0)
  covered = 0
  for seed in range(300):
    draw = generator.random(40) < 0.4
    result = bootstrap.interval([draw], seed=seed, num_resamples=500)
    covered += result.low <= 0.4 <= result.high
  # 95% nominal; three binomial standard errors are 4%.
  assert 0.90 <= covered / 300 <= 0.985


def test_the_seed_decides_the_interval():
  values = [np.random.default_rng(0).random(30)]
  first = bootstrap.interval(values, seed=1)
  assert first == bootstrap.interval(values, seed=1)
  assert first != bootstrap.interval(values, seed=2)


def test_degenerate_observations_have_no_invented_interval():
  nothing = bootstrap.interval([np.array([])])
  assert np.isnan(nothing.mean) and nothing.low is nothing.high is None
  single = bootstrap.interval([np.array([0.5]), np.array([1.0])])
  assert (single.mean, single.low, single.high) == (0.75, None, None)
  # An empty stratum is left out, a stratum of one only shifts.
  mixed = bootstrap.interval(
      [np.array([]), np.array([1.0]), np.array([0.0, 1.0])])
  assert (mixed.mean, mixed.low, mixed.high) == (0.75, 0.5, 1.0)

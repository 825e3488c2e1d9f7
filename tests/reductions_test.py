import jax.numpy as jnp
import numpy as np

from longjax import reductions


def test_sums_of_parts_give_the_mean_of_the_whole_not_of_the_means():
  values = jnp.float32([1.0, 2.0, 30.0])
  ones = jnp.ones(3, bool)
  whole = reductions.average(values, ones)
  parts = reductions.average(values[:1], ones[:1]) + reductions.average(
      values[1:], ones[1:])
  np.testing.assert_allclose(parts.mean(), 11.0)
  np.testing.assert_allclose(whole.mean(), 11.0)
  np.testing.assert_array_equal(parts.count, 3)


def test_masked_values_may_be_anything():
  values = jnp.float32([1.0, np.nan, np.inf, 5.0])
  mask = jnp.array([True, False, False, True])
  assert float(reductions.average(values, mask).mean()) == 3.0


def test_the_mean_of_nothing_is_zero():
  assert float(reductions.zero().mean()) == 0.0
  empty = reductions.average(jnp.ones(3), jnp.zeros(3, bool))
  assert float(empty.mean()) == 0.0


def test_means_are_taken_element_by_element():
  average = reductions.Average(
      total=jnp.float32([2.0, 7.0]), count=jnp.float32([4.0, 0.0]))
  np.testing.assert_array_equal(average.mean(), [0.5, 0.0])

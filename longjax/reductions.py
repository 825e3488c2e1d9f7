"""Sums that remember how much they summed.

Micro-batches, packed rows and devices add up before anyone divides: the mean
of means depends on how a batch was cut, a sum and its count do not.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Average:
  """A mean that is not yet divided; both fields share one shape.

  Attributes:
    total: the sum of the values.
    count: how many values (or how much weight) it is the sum of.
  """

  total: jax.Array
  count: jax.Array

  def __add__(self, other: 'Average') -> 'Average':
    return Average(
        total=self.total + other.total, count=self.count + other.count)

  def mean(self) -> jax.Array:
    """`total / count`; 0 where nothing was counted."""
    is_empty = self.count == 0
    return jnp.where(is_empty, 0.0, self.total / jnp.where(
        is_empty, 1.0, self.count))


def zero() -> Average:
  """The average of nothing: what sums start from."""
  return Average(total=jnp.zeros(()), count=jnp.zeros(()))


def average(
    values: jax.Array,  # f[...]
    mask: jax.Array,  # bool[...]
) -> Average:
  """Sums `values` where `mask` holds; masked values may be anything."""
  return Average(
      total=jnp.sum(jnp.where(mask, values, 0), dtype=jnp.float32),
      count=jnp.sum(mask, dtype=jnp.float32),
  )

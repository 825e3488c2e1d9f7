"""Rotary position embedding (RoFormer, arXiv:2104.09864, Sec. 3.4.2).

Shapes: T positions, H head size; leading dimensions are free.
"""

import jax
import jax.numpy as jnp


def angles(
    position: jax.Array,  # i32[..., T]
    *,
    head_dim: int,
    theta: float,
) -> jax.Array:  # f32[..., T, H/2]
  """Angle of every channel pair: position * theta^(-2i/H), in radians.

  Always float32: bfloat16 has 8 bits of mantissa and would merge neighbouring
  positions beyond a few hundred tokens.
  """
  exponent = jnp.arange(head_dim // 2, dtype=jnp.float32) * (2.0 / head_dim)
  frequency = theta**-exponent
  return position[..., None].astype(jnp.float32) * jnp.expand_dims(
      frequency, tuple(range(position.ndim)))


def rotate(
    x: jax.Array,  # f[..., T, N, H]
    angle: jax.Array,  # f32[..., T, H/2]
) -> jax.Array:  # f[..., T, N, H]
  """Turns channel pairs (i, i + H/2) by `angle`: the half-split convention."""
  cos = jnp.cos(angle)[..., None, :]
  sin = jnp.sin(angle)[..., None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)

"""Rotary position embedding (RoFormer, arXiv:2104.09864, Sec. 3.4.2).

Shapes: T positions, H head size; leading dimensions are free.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from longjax.model import architecture


def frequencies(
    *,
    head_dim: int,
    theta: float,
    yarn: architecture.YarnConfig | None = None,
) -> np.ndarray:  # f64[H/2]
  """Radians a position of every channel pair: theta^(-2i/H).

  With YaRN (arXiv:2309.00071), Sec. 3.2 "NTK-by-parts": a pair that turns
  r times over the trained length keeps its frequency where r > beta_fast, has
  it divided by the factor where r < beta_slow, and a mixture between.

  Args:
    head_dim: H.
    theta: base.
    yarn: None means unscaled.
  """
  pair = np.arange(head_dim // 2)
  frequency = theta ** -(2.0 * pair / head_dim)
  if yarn is None:
    return frequency

  def pair_turning(turns: float) -> float:
    """The (fractional) pair that turns so often over the trained length."""
    return head_dim * math.log(
        yarn.original_len / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))

  low, high = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
  if yarn.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  width = high - low or 0.001  # Not 0: a border may be sharp.
  stretched = np.clip((pair - low) / width, 0.0, 1.0)
  return frequency * (1.0 - stretched) + frequency / yarn.factor * stretched


def angles(
    position: jax.Array,  # i32[..., T]
    *,
    head_dim: int,
    theta: float,
    yarn: architecture.YarnConfig | None = None,
) -> jax.Array:  # f32[..., T, H/2]
  """Angle of every channel pair, in radians: position times its frequency.

  Always float32: bfloat16 has 8 bits of mantissa and would merge neighbouring
  positions beyond a few hundred tokens.
  """
  frequency = jnp.asarray(
      frequencies(head_dim=head_dim, theta=theta, yarn=yarn), jnp.float32)
  return position[..., None].astype(jnp.float32) * jnp.expand_dims(
      frequency, tuple(range(position.ndim)))


def rotate(
    x: jax.Array,  # f[..., T, N, H]
    angle: jax.Array,  # f32[..., T, H/2]
    *,
    scale: float = 1.0,
) -> jax.Array:  # f[..., T, N, H]
  """Turns channel pairs (i, i + H/2) by `angle`: the half-split convention.

  Args:
    x: queries or keys.
    angle: see `angles`.
    scale: multiplies the result; YaRN's `YarnConfig.scale`.
  """
  cos = scale * jnp.cos(angle)[..., None, :]
  sin = scale * jnp.sin(angle)[..., None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)

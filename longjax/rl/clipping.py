"""Negative-gradient clipping: which tokens of failures are not learnt from.

The static alternatives to AEPO of QwenLong-L1.5 (arXiv:2512.12967), Sec. 4.3.
They touch only responses with a negative advantage, and leave the loss
denominators as they are:

  off         everything is kept
  token_high  drop the tokens of highest entropy, token_low of lowest
  seq_high    drop the responses of highest mean entropy, seq_low of lowest

The paper states no thresholds; these are quantiles over the negative responses
of the batch.

Shapes: N responses of the whole optimiser batch, R response tokens.
"""

import dataclasses
import typing
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from longjax import types
from longjax.rl import entropy_control

ClipMethod = Literal['off', 'token_high', 'token_low', 'seq_high', 'seq_low']
METHODS = typing.get_args(ClipMethod)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativeClipConfig:
  """Which part of the failures is dropped.

  Attributes:
    method: see the module's docstring.
    token_fraction: share of the negative tokens that token_* drops.
    seq_fraction: share of the negative responses that seq_* drops.
  """

  method: ClipMethod = 'off'
  token_fraction: float = 0.2
  seq_fraction: float = 0.5

  def __post_init__(self):
    if self.method not in METHODS:
      raise types.UserError(
          f'negative_clip method={self.method!r} is unknown; use one of '
          f'{", ".join(METHODS)}.')
    for name in ('token_fraction', 'seq_fraction'):
      value = getattr(self, name)
      if not 0.0 <= value <= 1.0:
        raise types.UserError(
            f'negative_clip {name}={value} must lie in [0, 1].')


def keep_tokens(
    entropy: jax.Array,  # f32[N, R]
    mask: jax.Array,  # bool[N, R]
    advantages: jax.Array,  # f32[N]
    *,
    method: ClipMethod,
    token_fraction: float = 0.2,
    seq_fraction: float = 0.5,
) -> jax.Array:  # bool[N, R]
  """False on the tokens whose gradient is dropped, True everywhere else.

  Values that equal the threshold are kept, so a batch with one negative
  response, or with equal entropies, loses nothing.

  Args:
    entropy: of each response token, nats.
    mask: True on response tokens.
    advantages: one per response.
    method: which tokens.
    token_fraction: share of the negative tokens that token_* drops.
    seq_fraction: share of the negative responses that seq_* drops.

  Returns:
    A mask to multiply into the loss weights; denominators do not change.
  """
  dims = chex.Dimensions()
  dims['NR'] = entropy.shape
  chex.assert_shape(mask, dims['NR'])
  chex.assert_shape(advantages, dims['N'])
  if method == 'off':
    return jnp.ones_like(mask)

  is_negative = advantages < 0
  if method.startswith('token'):
    values, fraction = entropy, token_fraction
    candidates = mask & is_negative[:, None]
  else:
    values = entropy_control.response_entropy(entropy, mask)
    candidates = jnp.any(mask, axis=-1) & is_negative
    fraction = seq_fraction
  if method.endswith('high'):
    is_dropped = values > quantile(values, candidates, 1.0 - fraction)
  else:
    is_dropped = values < quantile(values, candidates, fraction)
  kept = ~(candidates & is_dropped)
  return kept if kept.ndim == 2 else jnp.broadcast_to(kept[:, None], mask.shape)


def quantile(
    values: jax.Array,  # f32[...]
    mask: jax.Array,  # bool[...]
    q: float,
) -> jax.Array:  # f32[]
  """The q-quantile, linearly interpolated, of the values where `mask` holds.

  Exact on ties: the quantile of equal values is that value. NaN if `mask`
  holds nowhere, which compares False with everything.
  """
  chex.assert_equal_shape([values, mask])
  ordered = jnp.sort(jnp.where(mask, values, jnp.inf).ravel())
  count = jnp.sum(mask)
  place = q * jnp.maximum(count - 1, 0).astype(jnp.float32)
  low = jnp.floor(place).astype(jnp.int32)
  low_value = ordered[low]
  high_value = ordered[jnp.minimum(low + 1, jnp.maximum(count - 1, 0))]
  result = low_value + (place - low) * (high_value - low_value)
  return jnp.where(count > 0, result, jnp.nan)

"""What is done about responses near the cap on their length, and cut by it.

QwenLong-L1.5 (arXiv:2512.12967) says nothing, so nothing is the default; a
response that was cut off scores 0 anyhow. QwenLong-L1 (arXiv:2505.17667) adds a
penalty to the reward, as DAPO (arXiv:2503.14476) does: with the length L, its
cap L_out and the buffer B,

  penalty = factor * min(0, -(L - (L_out - B)) / B),

0 up to L_out - B tokens and -factor at the cap. The reward may then be
negative. DAPO also masks truncated responses: they keep their place in the
statistics of rewards and in denominators, and have no gradient.

N responses.
"""

import dataclasses
import typing
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from longjax import types

Mode = Literal['off', 'soft', 'mask_truncated']
MODES = typing.get_args(Mode)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverlongConfig:
  """How length is shaped.

  Attributes:
    mode: 'off'; 'soft' adds the penalty; 'mask_truncated' takes the gradient
      of responses that were cut off.
    buffer_len: B, tokens before the cap that are penalised.
    factor: the penalty at the cap, as a positive number.
  """

  mode: Mode = 'off'
  buffer_len: int = 1000
  factor: float = 1.0

  def __post_init__(self):
    if self.mode not in MODES:
      raise types.UserError(
          f'overlong.mode={self.mode!r} is unknown; use one of '
          f'{", ".join(MODES)}.')
    if self.buffer_len < 1:
      raise types.UserError(
          f'overlong.buffer_len={self.buffer_len} must be >= 1.')
    if not self.factor > 0.0:
      raise types.UserError(
          f'overlong.factor={self.factor} must be positive; use '
          "mode='off' for no penalty.")


def check(config: OverlongConfig, *, max_response_len: int) -> None:
  """Refuses a buffer that is longer than responses may be."""
  if config.mode == 'soft' and config.buffer_len > max_response_len:
    raise types.UserError(
        f'overlong.buffer_len={config.buffer_len} is more than '
        f'sampler.max_response_len={max_response_len}; lower it.')


def shaped_rewards(
    rewards: jax.Array,  # f32[N]
    lengths: jax.Array,  # i32[N]
    *,
    config: OverlongConfig,
    max_response_len: int,
) -> jax.Array:  # f32[N]
  """Rewards to train on: with the penalty under 'soft', else as they are.

  Args:
    rewards: of the answers.
    lengths: of the responses in tokens, stop token included; an empty one
      (padding) has no penalty.
    config: see there.
    max_response_len: L_out.
  """
  chex.assert_rank(rewards, 1)
  chex.assert_equal_shape([rewards, lengths])
  if config.mode != 'soft':
    return jnp.asarray(rewards)
  over = jnp.asarray(lengths) - (max_response_len - config.buffer_len)
  penalty = jnp.minimum(0.0, -over / config.buffer_len)
  return jnp.asarray(rewards) + config.factor * penalty


def keep(
    lengths: jax.Array,  # i32[N]
    is_finished: jax.Array,  # bool[N]
    *,
    config: OverlongConfig,
) -> jax.Array:  # bool[N]
  """False where a response has no gradient: cut off, under 'mask_truncated'.

  It belongs into the `keep` of `loss.response_weights`, beside that of AEPO;
  advantages are formed with all responses.

  Args:
    lengths: of the responses in tokens; empty ones are not truncated.
    is_finished: whether each ended with a stop token.
    config: see there.
  """
  chex.assert_rank(lengths, 1)
  chex.assert_equal_shape([lengths, is_finished])
  if config.mode != 'mask_truncated':
    return jnp.ones(lengths.shape, bool)
  return jnp.asarray(is_finished) | (jnp.asarray(lengths) == 0)

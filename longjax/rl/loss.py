"""Losses: policy gradient and cross-entropy, as sums.

Every loss here is `sum over tokens of weight * l`. The weight of a token is
formed once from the *whole* optimiser batch (`response_weights`), so that
micro-batches, packing, padding and devices never change a gradient: their
losses add up, and nobody divides afterwards.

Shapes: B rows, T positions of packed rows; N responses.
"""

import dataclasses
import typing
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from flax import struct

from longjax import reductions, types
from longjax.rl import diagnostics

LossNorm = Literal['batch_tokens', 'group_tokens', 'seq_mean', 'const']
Objective = Literal['on_policy', 'off_policy']
NORMS = typing.get_args(LossNorm)
OBJECTIVES = typing.get_args(Objective)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """The policy-gradient loss.

  Attributes:
    loss_norm: what the loss is divided by, see `response_weights`.
    objective: 'on_policy' for one update a batch, 'off_policy' to clip the
      ratio between the trained policy and the one at the batch's start.
    eps_low: the ratio's clip below 1, used where the advantage is negative.
    eps_high: its clip above 1; larger than `eps_low` is DAPO's clip-higher.
    dual_clip: largest ratio that a negative advantage is multiplied by.
    tis_cap: truncation of the importance weights that correct the sampler's
      numerics; None means no correction, 2.0 is usual.
  """

  loss_norm: LossNorm = 'batch_tokens'
  objective: Objective = 'on_policy'
  eps_low: float = 0.2
  eps_high: float = 0.28
  dual_clip: float = 3.0
  tis_cap: float | None = None

  def __post_init__(self):
    if self.loss_norm not in NORMS:
      raise types.UserError(
          f'loss loss_norm={self.loss_norm!r} is unknown; use one of '
          f'{", ".join(NORMS)}.')
    if self.objective not in OBJECTIVES:
      raise types.UserError(
          f'loss objective={self.objective!r} is unknown; use one of '
          f'{", ".join(OBJECTIVES)}.')
    if not 0.0 <= self.eps_low < 1.0:
      raise types.UserError(
          f'loss eps_low={self.eps_low} must lie in [0, 1).')
    if not self.eps_high >= 0.0:
      raise types.UserError(
          f'loss eps_high={self.eps_high} must not be negative.')
    if not self.dual_clip > 1.0:
      raise types.UserError(
          f'loss dual_clip={self.dual_clip} must be more than 1; use 3.0.')
    if self.tis_cap is not None and not self.tis_cap > 0.0:
      raise types.UserError(
          f'loss tis_cap={self.tis_cap} must be positive, or None for off.')


def response_weights(
    lengths: jax.Array,  # i32[N]
    group_ids: jax.Array,  # i32[N]
    keep: jax.Array,  # bool[N]
    *,
    loss_norm: LossNorm,
    num_groups: int,
    max_response_len: int,
    aepo_norm: Literal['all', 'kept'] = 'all',
) -> jax.Array:  # f32[N]
  """The weight of each token of each response, from the whole batch.

  With L_i the length of response i, D the tokens of the batch, D_g those of a
  group, and P, N the groups and responses that are not empty:

    batch_tokens  1 / D          every token equal (DAPO as in verl)
    group_tokens  1 / (P D_g)    every prompt equal (QwenLong-L1.5, Eq. 4)
    seq_mean      1 / (N L_i)    every response equal (GRPO)
    const         1 / (N max_response_len)    no length bias (Dr. GRPO)

  Args:
    lengths: trained tokens of each response; 0 marks padding.
    group_ids: which prompt each response answers, in [0, num_groups).
    keep: False removes a response's gradient, e.g. by AEPO.
    loss_norm: which of the four.
    num_groups: static bound of `group_ids`.
    max_response_len: the cap on responses, used by 'const'.
    aepo_norm: 'all' counts removed responses in the denominators (Eq. 8: AEPO
      removes their gradient, not their weight), 'kept' does not.

  Returns:
    Weights, 0 for empty and removed responses.
  """
  chex.assert_rank(lengths, 1)
  chex.assert_equal_shape([lengths, group_ids, keep])
  counted = lengths.astype(jnp.float32)
  if aepo_norm == 'kept':
    counted = jnp.where(keep, counted, 0.0)
  num_responses = jnp.sum(counted > 0, dtype=jnp.float32)
  match loss_norm:
    case 'batch_tokens':
      divisor = jnp.broadcast_to(jnp.sum(counted), counted.shape)
    case 'group_tokens':
      tokens = jax.ops.segment_sum(counted, group_ids, num_groups)
      divisor = jnp.sum(tokens > 0, dtype=jnp.float32) * tokens[group_ids]
    case 'seq_mean':
      divisor = num_responses * counted
    case 'const':
      divisor = jnp.broadcast_to(
          num_responses * max_response_len, counted.shape)
    case _:
      raise types.UserError(
          f'loss loss_norm={loss_norm!r} is unknown; use one of '
          f'{", ".join(NORMS)}.')
  is_weighted = keep & (counted > 0)
  return jnp.where(is_weighted, 1.0 / jnp.where(is_weighted, divisor, 1.0), 0.0)


@struct.dataclass
class LossOutput:
  """A policy-gradient loss, f32[], to be minimised and added up."""

  loss: jax.Array
  metrics: diagnostics.LossMetrics


def policy_gradient_loss(
    *,
    logprobs: jax.Array,  # f32[B, T]
    old_logprobs: jax.Array | None,  # f32[B, T]
    sampler_logprobs: jax.Array,  # f32[B, T]
    advantages: jax.Array,  # f32[B, T]
    weights: jax.Array,  # f32[B, T]
    loss_mask: jax.Array,  # bool[B, T]
    objective: Objective = 'on_policy',
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    dual_clip: float = 3.0,
    tis_cap: float | None = None,
) -> LossOutput:
  """Token-level policy gradient, QwenLong-L1.5 (arXiv:2512.12967), Eq. 4.

    loss = - sum_t weight_t w_t u_t
    on_policy:   u = exp(lp - stop_gradient(lp)) A, whose gradient is A grad lp
    off_policy:  u = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A),
                 and u >= dual_clip A where A < 0;  rho = exp(lp - lp_old)
    w = stop_gradient(min(exp(lp_old - lp_sampler), tis_cap)), or 1 without cap

  Args:
    logprobs: of each target under the policy being trained, nats.
    old_logprobs: under the policy at the batch's start; no gradient flows.
      None means that it is the trained policy (one update a batch).
    sampler_logprobs: under the sampler's numerics.
    advantages: of the token's response: `advantages[rows.trajectory]`.
    weights: `response_weights(...)[rows.trajectory]`, times a token mask where
      negative gradients are clipped.
    loss_mask: True on trained tokens; elsewhere the arrays may hold anything.
    objective: see above; 'off_policy' needs `old_logprobs`.
    eps_low: clip of the ratio below 1.
    eps_high: clip of the ratio above 1.
    dual_clip: bound of the ratio where the advantage is negative.
    tis_cap: truncation of the importance weights; None means none are used.

  Returns:
    The loss (0 for an empty mask) and monitors over the masked tokens.
  """
  dims = chex.Dimensions()
  dims['BT'] = logprobs.shape
  chex.assert_shape(
      [sampler_logprobs, advantages, weights, loss_mask], dims['BT'])
  if old_logprobs is None:
    if objective == 'off_policy':
      raise ValueError('objective=off_policy needs old_logprobs, got None.')
    old_logprobs = logprobs
  chex.assert_shape(old_logprobs, dims['BT'])

  def masked(x):
    # Padding may hold -inf or NaN, which `where` after `exp` would not stop
    # from reaching the gradient.
    return jnp.where(loss_mask, x, 0.0)

  logprobs, advantages = masked(logprobs), masked(advantages)
  old = jax.lax.stop_gradient(masked(old_logprobs))
  sampler = jax.lax.stop_gradient(masked(sampler_logprobs))
  ratio = _ratio(logprobs, old)
  importance = _ratio(old, sampler)
  if objective == 'on_policy':
    gain = advantages * jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
    bounds = (0.0, jnp.inf, jnp.inf)
  else:
    gain = _clipped_gain(ratio, advantages, eps_low, eps_high, dual_clip)
    bounds = (1.0 - eps_low, 1.0 + eps_high, dual_clip)
  if tis_cap is not None:
    gain *= jnp.minimum(importance, tis_cap)

  def share(condition):
    return reductions.average(jax.lax.stop_gradient(condition), loss_mask)

  low, high, dual = bounds
  cap = jnp.inf if tis_cap is None else tis_cap
  return LossOutput(
      loss=-jnp.sum(masked(weights) * gain),
      metrics=diagnostics.LossMetrics(
          ratio=share(ratio),
          clip_high=share((advantages > 0) & (ratio > high)),
          clip_low=share((advantages < 0) & (ratio < low)),
          clip_dual=share((advantages < 0) & (ratio > dual)),
          tis_capped=share(importance > cap),
          mismatch=diagnostics.mismatch(old, sampler, loss_mask),
      ),
  )


def _clipped_gain(
    ratio: jax.Array,  # f32[B, T]
    advantages: jax.Array,  # f32[B, T]
    eps_low: float,
    eps_high: float,
    dual_clip: float,
) -> jax.Array:  # f32[B, T]
  """PPO's pessimistic surrogate with clip-higher and a floor where A < 0."""
  clipped = jnp.clip(ratio, 1.0 - eps_low, 1.0 + eps_high)
  gain = jnp.minimum(ratio * advantages, clipped * advantages)
  return jnp.where(
      advantages < 0, jnp.maximum(gain, dual_clip * advantages), gain)


def _ratio(logprobs: jax.Array, other: jax.Array) -> jax.Array:
  """Probability ratio, its logarithm cut to where float32 can square it."""
  limit = diagnostics.MAX_LOG_RATIO
  return jnp.exp(jnp.clip(logprobs - other, -limit, limit))


def cross_entropy(
    *,
    logprobs: jax.Array,  # f32[B, T]
    loss_mask: jax.Array,  # bool[B, T]
) -> reductions.Average:
  """Negative log-likelihood of the targets, for supervised fine-tuning.

  Args:
    logprobs: of each target at temperature 1, nats.
    loss_mask: True on response tokens.

  Returns:
    The sum over response tokens, in nats, and their number: divide the sum by
    the number of the whole optimiser batch, not of a micro-batch.
  """
  chex.assert_equal_shape([logprobs, loss_mask])
  return reductions.average(-logprobs, loss_mask)

"""Advantages: how much better a response did than its siblings.

Recipe of QwenLong-L1.5 (arXiv:2512.12967), Eq. 7. With mu_g the mean reward
of the responses to one prompt, e `epsilon` and unbiased (ddof=1) deviations:

  group_std   (r_i - mu_g) / (std over the group + e)           GRPO
  none         r_i - mu_g                                       Dr. GRPO
  loo          r_i - mean of the *other* rewards of the group   RLOO
  batch_std   (r_i - mu_g) / (std over the batch + e)
  task_std    (r_i - mu_g) / (std over the statistics group + e)

The deviations of `batch_std` and `task_std` are of raw rewards, not of centred
ones, so they also hold the spread between easy and hard prompts: a nearly
unanimous group is not blown up.

Shapes: N responses of the whole optimiser batch (all hosts), before masking.
"""

import dataclasses
import typing
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from flax import struct

from longjax import reductions, types

AdvantageMethod = Literal['group_std', 'none', 'loo', 'batch_std', 'task_std']
METHODS = typing.get_args(AdvantageMethod)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
  """How rewards become advantages.

  Attributes:
    method: which formula, see the module's docstring.
    epsilon: added to every standard deviation.
    min_stat_n: 'task_std' uses the batch's deviation for a statistics group
      with fewer responses than this.
  """

  method: AdvantageMethod = 'task_std'
  epsilon: float = 1e-6
  min_stat_n: int = 8

  def __post_init__(self):
    if self.method not in METHODS:
      raise types.UserError(
          f'advantage method={self.method!r} is unknown; use one of '
          f'{", ".join(METHODS)}.')
    if not self.epsilon > 0:
      raise types.UserError(
          f'advantage epsilon={self.epsilon} must be positive; use 1e-6.')
    if self.min_stat_n < 2:
      raise types.UserError(
          f'advantage min_stat_n={self.min_stat_n} must be at least 2: one '
          'response has no deviation.')


def check_group_size(num_samples: int) -> None:
  """Refuses groups of one, which leave every advantage 0.

  Raises:
    UserError: `num_samples` is less than 2.
  """
  if num_samples < 2:
    raise types.UserError(
        f'num_samples={num_samples}: advantages compare the responses to one '
        'prompt with each other; sample at least 2 per prompt.')


@struct.dataclass
class AdvantageOutput:
  """Advantages and how often the degenerate cases occurred.

  Attributes:
    advantages: f32[N], 0 for invalid responses and in degenerate cases.
    num_groups: f32[] groups with at least one valid response.
    num_zero_groups: f32[] groups of two or more equal rewards.
    num_singleton_groups: f32[] groups of one, which have no baseline.
    num_fallbacks: f32[] statistics groups too small for their own deviation.
  """

  advantages: jax.Array
  num_groups: jax.Array
  num_zero_groups: jax.Array
  num_singleton_groups: jax.Array
  num_fallbacks: jax.Array

  @property
  def frac_zero_groups(self) -> jax.Array:
    """The share of groups that teach nothing because all rewards agree."""
    return reductions.Average(
        total=self.num_zero_groups, count=self.num_groups).mean()


@struct.dataclass
class _Moments:
  """f32[K] each; `is_constant` bool[K] is True if all values are equal."""

  count: jax.Array
  mean: jax.Array
  std: jax.Array
  is_constant: jax.Array


def advantages(
    rewards: jax.Array,  # f32[N]
    group_ids: jax.Array,  # i32[N]
    stat_ids: jax.Array,  # i32[N]
    valid: jax.Array,  # bool[N]
    *,
    method: AdvantageMethod,
    num_groups: int,
    num_stats: int,
    epsilon: float = 1e-6,
    min_stat_n: int = 8,
) -> AdvantageOutput:
  """One advantage per response; see the module's docstring for the formulas.

  Eq. 7 leaves the degenerate cases open. Here the advantage is 0 for equal
  rewards in a group, for a group of one, and under 'task_std' for a statistics
  group of one response or of equal rewards.

  Args:
    rewards: of each response, after shaping.
    group_ids: which prompt each response answers, in [0, num_groups).
    stat_ids: whose rewards share a deviation (the task, or the task and the
      kind of reward), in [0, num_stats); used by 'task_std'.
    valid: False for padding, whose reward is ignored and may be anything.
    method: which formula.
    num_groups: static bound of `group_ids`.
    num_stats: static bound of `stat_ids`.
    epsilon: added to every deviation.
    min_stat_n: statistics groups smaller than this use the batch's deviation.

  Returns:
    Advantages and counters.
  """
  dims = chex.Dimensions()
  dims['N'] = rewards.shape
  chex.assert_shape([group_ids, stat_ids, valid], dims['N'])

  rewards = jnp.where(valid, rewards, 0.0).astype(jnp.float32)
  groups = _moments(rewards, group_ids, valid, num_groups)
  stats = _moments(rewards, stat_ids, valid, num_stats)
  batch = _moments(rewards, jnp.zeros_like(group_ids), valid, 1)

  centred = rewards - groups.mean[group_ids]
  is_zero = groups.is_constant[group_ids]
  is_fallback = jnp.zeros((num_stats,), bool)
  match method:
    case 'none':
      result = centred
    case 'loo':
      count = groups.count[group_ids]
      result = centred * count / jnp.maximum(count - 1.0, 1.0)
    case 'group_std':
      result = centred / (groups.std[group_ids] + epsilon)
    case 'batch_std':
      result = centred / (batch.std + epsilon)
    case 'task_std':
      is_fallback = (stats.count > 1) & (stats.count < min_stat_n)
      std = jnp.where(is_fallback, batch.std, stats.std)
      result = centred / (std[stat_ids] + epsilon)
      is_zero |= stats.is_constant[stat_ids]
    case _:
      raise types.UserError(
          f'advantage method={method!r} is unknown; use one of '
          f'{", ".join(METHODS)}.')

  def number(condition):
    return jnp.sum(condition, dtype=jnp.float32)

  return AdvantageOutput(
      advantages=jnp.where(valid & ~is_zero, result, 0.0),
      num_groups=number(groups.count > 0),
      num_zero_groups=number((groups.count > 1) & groups.is_constant),
      num_singleton_groups=number(groups.count == 1),
      num_fallbacks=number(is_fallback),
  )


def _moments(
    values: jax.Array,  # f32[N]
    ids: jax.Array,  # i32[N]
    valid: jax.Array,  # bool[N]
    num_ids: int,
) -> _Moments:
  """Count, mean and unbiased deviation of the valid values of each id."""
  # Out-of-range ids are dropped by the segment reductions.
  ids = jnp.where(valid, ids, num_ids)
  # The deviation is formed around a member of the segment and in two passes,
  # so that equal rewards give exactly 0 whatever their magnitude.
  low = jax.ops.segment_min(values, ids, num_ids)
  high = jax.ops.segment_max(values, ids, num_ids)
  count = jax.ops.segment_sum(valid.astype(jnp.float32), ids, num_ids)
  low = jnp.where(count > 0, low, 0.0)
  high = jnp.where(count > 0, high, 0.0)

  def per_value(x):
    return x.at[ids].get(mode='fill', fill_value=0.0)

  offset = jax.ops.segment_sum(values - per_value(low), ids, num_ids)
  mean = low + offset / jnp.maximum(count, 1.0)
  squares = jax.ops.segment_sum(
      jnp.square(values - per_value(mean)), ids, num_ids)
  return _Moments(
      count=count,
      mean=mean,
      std=jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0)),
      is_constant=high <= low,
  )

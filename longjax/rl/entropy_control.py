"""AEPO: entropy decides whether failures are learnt from.

QwenLong-L1.5 (arXiv:2512.12967), Sec. 4.4. Gradients of failed responses
raise the policy's entropy until it stops learning. A two-state controller with
hysteresis removes them while the batch entropy H is too high:

  FULL and H > high -> POS,   POS and H < low -> FULL,   otherwise unchanged.

In POS only responses with a positive advantage are kept. The decision made
from a batch's entropy applies to that same batch.

Thresholds are absolute, or (default) multiples of H_0, the mean entropy of the
first `baseline_steps` batches, during which the mode stays FULL: the levels
at which the paper's Fig. 11 switches fit no single number.

Shapes: N responses, R response tokens.
"""

import dataclasses
import enum
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from flax import struct

from longjax import reductions, types


class Mode(enum.IntEnum):
  """Which responses are learnt from."""

  FULL = 0
  POS = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AepoConfig:
  """The entropy band and what happens above it.

  Attributes:
    enabled: False keeps the mode FULL; the baseline is still measured.
    high_ratio: the upper threshold as a multiple of H_0.
    low_ratio: the lower threshold as a multiple of H_0.
    baseline_steps: number of first batches that H_0 is the mean of.
    entropy_high: absolute upper threshold in nats; None means relative.
    entropy_low: absolute lower threshold in nats; None means relative.
    require_pos_reward: in POS a response also needs a positive reward, which
      matters only if shaping makes rewards negative.
    max_pos_steps: longest stay in POS, since POS is not guaranteed to lower
      the entropy; 0 means no limit.
    entropy_agg: 'seq_mean' averages the responses' mean entropies (Eq. 11),
      'token_mean' averages over tokens.
    aepo_norm: 'all' leaves the loss denominators as if nothing was removed
      (Eq. 8), 'kept' forms them from the kept responses.
  """

  enabled: bool = True
  high_ratio: float = 2.0
  low_ratio: float = 1.1
  baseline_steps: int = 3
  entropy_high: float | None = None
  entropy_low: float | None = None
  require_pos_reward: bool = True
  max_pos_steps: int = 0
  entropy_agg: Literal['seq_mean', 'token_mean'] = 'seq_mean'
  aepo_norm: Literal['all', 'kept'] = 'all'

  @property
  def is_relative(self) -> bool:
    """True if the thresholds are multiples of the measured baseline."""
    return self.entropy_high is None

  def __post_init__(self):
    self._check_absolute()
    if not 0.0 < self.low_ratio < self.high_ratio:
      raise types.UserError(
          f'aepo needs 0 < low_ratio < high_ratio, got low_ratio='
          f'{self.low_ratio}, high_ratio={self.high_ratio}; raise high_ratio '
          'or lower low_ratio.')
    if self.high_ratio <= 1.0:
      raise types.UserError(
          f'aepo high_ratio={self.high_ratio} puts the band below the starting '
          'entropy, so failures would be masked from the first step on; use '
          'more than 1, for example 2.0.')
    if self.baseline_steps < 1:
      raise types.UserError(
          f'aepo baseline_steps={self.baseline_steps} must be at least 1.')
    if self.max_pos_steps < 0:
      raise types.UserError(
          f'aepo max_pos_steps={self.max_pos_steps} must not be negative; use '
          '0 for no limit.')
    if self.entropy_agg not in ('seq_mean', 'token_mean'):
      raise types.UserError(
          f'aepo entropy_agg={self.entropy_agg!r} is unknown; use seq_mean or '
          'token_mean.')
    if self.aepo_norm not in ('all', 'kept'):
      raise types.UserError(
          f'aepo aepo_norm={self.aepo_norm!r} is unknown; use all or kept.')

  def _check_absolute(self) -> None:
    """Both absolute thresholds or none, and in order."""
    low, high = self.entropy_low, self.entropy_high
    if low is None and high is None:
      return
    if low is None or high is None:
      raise types.UserError(
          f'aepo entropy_low={low} and entropy_high={high}: set both, or '
          'neither for relative thresholds.')
    if not 0.0 <= low < high:
      raise types.UserError(
          f'aepo needs 0 <= entropy_low < entropy_high, got entropy_low={low}, '
          f'entropy_high={high}; raise entropy_high or lower entropy_low.')


@struct.dataclass
class AepoState:
  """The controller's memory; scalars, checkpointed with the run.

  Attributes:
    mode: i32[], a `Mode`.
    baseline: the batch entropies H_0 is the mean of.
    steps_in_pos: i32[], batches since POS began, the present one included.
    num_switches: i32[], changes of mode so far.
  """

  mode: jax.Array
  baseline: reductions.Average
  steps_in_pos: jax.Array
  num_switches: jax.Array


def init() -> AepoState:
  """FULL, nothing measured: the state at the start of every stage."""
  return AepoState(
      mode=jnp.int32(Mode.FULL),
      baseline=reductions.zero(),
      steps_in_pos=jnp.int32(0),
      num_switches=jnp.int32(0),
  )


def thresholds(
    state: AepoState, config: AepoConfig
) -> tuple[jax.Array, jax.Array]:  # f32[], f32[]
  """The band (low, high) in nats; (0, inf) until the baseline is measured."""
  if not config.is_relative:
    return jnp.float32(config.entropy_low), jnp.float32(config.entropy_high)
  is_measured = state.baseline.count >= config.baseline_steps
  baseline = state.baseline.mean()
  return (
      jnp.where(is_measured, config.low_ratio * baseline, 0.0),
      jnp.where(is_measured, config.high_ratio * baseline, jnp.inf),
  )


def update(
    state: AepoState,
    entropy: jax.Array,  # f32[]
    *,
    config: AepoConfig,
) -> AepoState:
  """Decides the mode of the batch that `entropy` was measured on.

  Args:
    state: after the previous batch.
    entropy: batch entropy in nats (see `batch_entropy`); one that is not
      finite changes nothing.
    config: the band.

  Returns:
    The state holding for this batch.
  """
  chex.assert_shape(entropy, ())
  low, high = thresholds(state, config)
  is_full = state.mode == Mode.FULL
  is_pos = jnp.where(is_full, entropy > high, ~(entropy < low))
  if config.max_pos_steps:
    is_pos &= is_full | (state.steps_in_pos < config.max_pos_steps)
  is_pos &= config.enabled
  mode = jnp.where(is_pos, Mode.POS, Mode.FULL).astype(jnp.int32)

  is_baseline = (
      (state.baseline.count < config.baseline_steps) & jnp.isfinite(entropy))
  return AepoState(
      mode=mode,
      baseline=state.baseline + reductions.average(entropy, is_baseline),
      steps_in_pos=jnp.where(is_pos, state.steps_in_pos + 1, 0),
      num_switches=state.num_switches + (mode != state.mode),
  )


def keep(
    state: AepoState,
    advantages: jax.Array,  # f32[N]
    rewards: jax.Array,  # f32[N]
    *,
    config: AepoConfig,
) -> jax.Array:  # bool[N]
  """True for the responses whose gradient the batch keeps.

  All in FULL; in POS those with a positive advantage (and reward). They are
  removed by zero weights, never by dropping rows, so shapes stay static.
  """
  chex.assert_equal_shape([advantages, rewards])
  is_positive = advantages > 0
  if config.require_pos_reward:
    is_positive &= rewards > 0
  return (state.mode == Mode.FULL) | is_positive


def check_baseline(state: AepoState, config: AepoConfig) -> None:
  """Host check of an absolute band against the measured entropy.

  Call it when the baseline is complete. A band below the entropy that the run
  starts from masks failures on every step and never releases.

  Raises:
    UserError: `entropy_high` is not above the measured baseline.
  """
  high = config.entropy_high
  if high is None or not config.enabled:
    return
  if float(state.baseline.count) < config.baseline_steps:
    return
  baseline = float(state.baseline.mean())
  if baseline >= high:
    raise types.UserError(
        f'aepo entropy_high={high} is not above the entropy of '
        f'the first {config.baseline_steps} steps, {baseline:.3f}; raise it '
        'above that, or leave it unset for relative thresholds.')


def response_entropy(
    entropy: jax.Array,  # f32[N, R]
    mask: jax.Array,  # bool[N, R]
) -> jax.Array:  # f32[N]
  """Mean entropy of each response, nats per token; 0 for an empty one."""
  chex.assert_equal_shape([entropy, mask])
  return reductions.Average(
      total=jnp.sum(jnp.where(mask, entropy, 0.0), axis=-1),
      count=jnp.sum(mask, axis=-1, dtype=jnp.float32),
  ).mean()


def batch_entropy(
    entropy: jax.Array,  # f32[N, R]
    mask: jax.Array,  # bool[N, R]
    *,
    agg: Literal['seq_mean', 'token_mean'],
) -> reductions.Average:
  """Entropy of a batch as a sum and its count.

  Args:
    entropy: of each response token, nats.
    mask: True on response tokens; a row without any is not a response.
    agg: 'seq_mean' counts responses (Eq. 11), 'token_mean' counts tokens.

  Returns:
    The undivided mean; its `mean()` is what `update` takes.
  """
  if agg == 'token_mean':
    return reductions.average(entropy, mask)
  return reductions.average(
      response_entropy(entropy, mask), jnp.any(mask, axis=-1))

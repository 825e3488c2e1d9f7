"""What to watch while a policy learns; nothing here has a gradient.

Everything is a sum with its count, so micro-batches and devices add up.

Shapes: B rows, T positions, N responses, R response tokens.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

from longjax import reductions
from longjax.rl import entropy_control

# Log ratios are cut here before `exp`: e^20 still squares within float32.
MAX_LOG_RATIO = 20.0


@struct.dataclass
class Mismatch:
  """How far the trainer's policy is from the one that sampled.

  Attributes:
    gap: mean |log-ratio| of the sampled tokens, nats.
    gap_max: f32[], the largest of them.
    kl: KL(sampler || trainer), the k3 estimate, nats per token.
    ratio: mean of trainer / sampler probability, 1 if they agree.
    ratio_squared: mean of its square.
  """

  gap: reductions.Average
  gap_max: jax.Array
  kl: reductions.Average
  ratio: reductions.Average
  ratio_squared: reductions.Average

  def __add__(self, other: 'Mismatch') -> 'Mismatch':
    return Mismatch(
        gap=self.gap + other.gap,
        gap_max=jnp.maximum(self.gap_max, other.gap_max),
        kl=self.kl + other.kl,
        ratio=self.ratio + other.ratio,
        ratio_squared=self.ratio_squared + other.ratio_squared,
    )

  def effective_sample_size(self) -> jax.Array:
    """(sum w)^2 / (n sum w^2) of the ratios: 1 if equal; 0 of nothing."""
    mean_square = self.ratio_squared.mean()
    is_empty = mean_square == 0
    return jnp.where(is_empty, 0.0, jnp.square(self.ratio.mean()) / jnp.where(
        is_empty, 1.0, mean_square))


def zero_mismatch() -> Mismatch:
  """The mismatch of nothing."""
  zero = reductions.zero()
  return Mismatch(
      gap=zero, gap_max=jnp.zeros(()), kl=zero, ratio=zero, ratio_squared=zero)


def mismatch(
    trainer_logprobs: jax.Array,  # f32[...]
    sampler_logprobs: jax.Array,  # f32[...]
    mask: jax.Array,  # bool[...]
) -> Mismatch:
  """Compares two log-probabilities (nats) of the same sampled tokens.

  The estimate of KL(sampler || trainer) from the sampler's own tokens is
  k3 = r - 1 - log r with r = trainer / sampler; it is never negative.
  """
  chex.assert_equal_shape([trainer_logprobs, sampler_logprobs, mask])
  # Padding may hold -inf, and -inf - -inf is NaN.
  log_ratio = jax.lax.stop_gradient(
      jnp.where(mask, trainer_logprobs, 0.0)
      - jnp.where(mask, sampler_logprobs, 0.0))
  gap = jnp.abs(log_ratio)
  log_ratio = jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
  ratio = jnp.exp(log_ratio)
  return Mismatch(
      gap=reductions.average(gap, mask),
      gap_max=jnp.max(gap, initial=0.0),
      # expm1 keeps the digits of the small differences it is there to show.
      kl=reductions.average(jnp.expm1(log_ratio) - log_ratio, mask),
      ratio=reductions.average(ratio, mask),
      ratio_squared=reductions.average(jnp.square(ratio), mask),
  )


@struct.dataclass
class LossMetrics:
  """Monitors of a policy-gradient loss over all masked tokens.

  Attributes:
    ratio: trained / old probability; 1 while strictly on policy.
    clip_high: share of tokens with A > 0 and the ratio above its clip.
    clip_low: share of tokens with A < 0 and the ratio below its clip.
    clip_dual: share of tokens with A < 0 and the ratio above the dual clip.
    tis_capped: share of tokens whose importance weight was truncated.
    mismatch: of the old policy with the sampler.
  """

  ratio: reductions.Average
  clip_high: reductions.Average
  clip_low: reductions.Average
  clip_dual: reductions.Average
  tis_capped: reductions.Average
  mismatch: Mismatch

  def __add__(self, other: 'LossMetrics') -> 'LossMetrics':
    return LossMetrics(
        ratio=self.ratio + other.ratio,
        clip_high=self.clip_high + other.clip_high,
        clip_low=self.clip_low + other.clip_low,
        clip_dual=self.clip_dual + other.clip_dual,
        tis_capped=self.tis_capped + other.tis_capped,
        mismatch=self.mismatch + other.mismatch,
    )

  def summary(self) -> dict[str, jax.Array]:  # f32[] each
    """Means by name, ready to be logged."""
    return {
        'ratio/mean': self.ratio.mean(),
        'ratio/clip_high': self.clip_high.mean(),
        'ratio/clip_low': self.clip_low.mean(),
        'ratio/clip_dual': self.clip_dual.mean(),
        'ratio/tis_capped': self.tis_capped.mean(),
        'gap/logprob_mean': self.mismatch.gap.mean(),
        'gap/logprob_max': self.mismatch.gap_max,
        'gap/kl': self.mismatch.kl.mean(),
        'gap/effective_sample_size': self.mismatch.effective_sample_size(),
    }


def zero_loss_metrics() -> LossMetrics:
  """The monitors of nothing: what a sum over micro-batches starts from."""
  zero = reductions.zero()
  return LossMetrics(
      ratio=zero, clip_high=zero, clip_low=zero, clip_dual=zero,
      tis_capped=zero, mismatch=zero_mismatch())


@struct.dataclass
class Balance:
  """What a batch pushes up and what it pushes down.

  Attributes:
    positive_total: f32[], sum of the positive advantages kept.
    negative_total: f32[], sum of the negative advantages kept, at most 0.
    positive_rows: share of the responses with a positive advantage.
    kept_rows: share of the responses kept.
    kept_tokens: share of the response tokens kept.
  """

  positive_total: jax.Array
  negative_total: jax.Array
  positive_rows: reductions.Average
  kept_rows: reductions.Average
  kept_tokens: reductions.Average


def balance(
    advantages: jax.Array,  # f32[N]
    keep: jax.Array,  # bool[N]
    lengths: jax.Array,  # i32[N]
) -> Balance:
  """Sums up a batch after AEPO decided; responses of length 0 don't count."""
  chex.assert_equal_shape([advantages, keep, lengths])
  is_response = lengths > 0
  kept = jnp.where(keep & is_response, advantages, 0.0)
  token_total = jnp.sum(jnp.where(keep, lengths, 0), dtype=jnp.float32)
  return Balance(
      positive_total=jnp.sum(jnp.maximum(kept, 0.0)),
      negative_total=jnp.sum(jnp.minimum(kept, 0.0)),
      positive_rows=reductions.average(advantages > 0, is_response),
      kept_rows=reductions.average(keep, is_response),
      kept_tokens=reductions.Average(
          total=token_total, count=jnp.sum(lengths, dtype=jnp.float32)),
  )


def entropies(
    entropy: jax.Array,  # f32[N, R]
    entropy_t1: jax.Array,  # f32[N, R]
    mask: jax.Array,  # bool[N, R]
) -> dict[str, reductions.Average]:
  """The four batch entropies in use: who averages, at which temperature.

  Args:
    entropy: at the sampling temperature, nats.
    entropy_t1: at temperature 1, nats.
    mask: True on response tokens.

  Returns:
    'seq_mean', 'token_mean', and 'seq_mean_t1', 'token_mean_t1'.
  """
  result = {}
  for suffix, values in (('', entropy), ('_t1', entropy_t1)):
    for agg in ('seq_mean', 'token_mean'):
      result[agg + suffix] = entropy_control.batch_entropy(
          values, mask, agg=agg)
  return result

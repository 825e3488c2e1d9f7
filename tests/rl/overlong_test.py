import chex
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from longjax import types
from longjax.rl import advantage, loss, overlong

CAP, BUFFER = 40, 12


def reference(rewards, lengths, cap, buffer, factor):
  """The equation, one response at a time, in float64."""
  out = np.zeros(len(rewards))
  for i, (reward, length) in enumerate(zip(rewards, lengths)):
    expected = cap - buffer
    out[i] = float(reward) + factor * min(
        0.0, -(int(length) - expected) / buffer)
  return out


def config(mode, **overrides):
  return overlong.OverlongConfig(
      **dict(mode=mode, buffer_len=BUFFER) | overrides)


class OverlongTest(chex.TestCase):

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(1.0, 0.5, 3.0)
  def test_the_penalty_is_the_equation(self, factor):
    lengths = np.arange(CAP + 1, dtype=np.int32)
    rewards = np.float32(np.random.default_rng(0).uniform(size=CAP + 1))
    got = self.variant(
        lambda r, n: overlong.shaped_rewards(
            r, n, config=config('soft', factor=factor),
            max_response_len=CAP))(rewards, lengths)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(
        got, reference(rewards, lengths, CAP, BUFFER, factor), rtol=1e-6,
        atol=1e-6)
    # None up to the buffer; all of it at the cap.
    np.testing.assert_array_equal(got[:CAP - BUFFER + 1],
                                  rewards[:CAP - BUFFER + 1])
    np.testing.assert_allclose(got[-1], rewards[-1] - factor, rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_other_modes_leave_rewards_alone(self):
    rewards, lengths = jnp.float32([0.0, 0.3, 1.0]), jnp.int32([0, 39, 40])
    for mode in ('off', 'mask_truncated'):
      got = self.variant(
          lambda r, n, mode=mode: overlong.shaped_rewards(
              r, n, config=config(mode), max_response_len=CAP))(
                  rewards, lengths)
      np.testing.assert_array_equal(got, rewards)

  @chex.variants(with_jit=True, without_jit=True)
  def test_only_truncated_responses_are_masked(self):
    lengths = jnp.int32([40, 40, 7, 0])
    is_finished = jnp.bool_([True, False, True, False])
    for mode, expected in (
        ('mask_truncated', [True, False, True, True]), ('off', [True] * 4),
        ('soft', [True] * 4)):
      got = self.variant(
          lambda n, f, mode=mode: overlong.keep(n, f, config=config(mode)))(
              lengths, is_finished)
      np.testing.assert_array_equal(got, expected)


def test_the_papers_numbers():
  # QwenLong-L1: L_out 10,000 and B 1000.
  got = overlong.shaped_rewards(
      jnp.zeros(4), jnp.int32([9000, 9001, 9500, 10_000]),
      config=overlong.OverlongConfig(mode='soft'), max_response_len=10_000)
  np.testing.assert_allclose(got, [0.0, -0.001, -0.5, -1.0], rtol=1e-6)


def test_a_buffer_as_long_as_the_cap_is_a_price_on_every_token():
  made = config('soft', buffer_len=CAP)
  overlong.check(made, max_response_len=CAP)
  got = overlong.shaped_rewards(
      jnp.zeros(3), jnp.int32([0, 10, 40]), config=made, max_response_len=CAP)
  np.testing.assert_allclose(got, [0.0, -0.25, -1.0], rtol=1e-6)


def test_a_masked_response_has_no_gradient_but_counts_in_statistics():
  rewards = jnp.float32([1.0, 0.0, 0.0, 1.0])
  lengths, groups = jnp.int32([4, 8, 3, 5]), jnp.int32([0, 0, 1, 1])
  keep = overlong.keep(
      lengths, jnp.bool_([True, False, True, True]),
      config=config('mask_truncated'))
  weights = loss.response_weights(
      lengths, groups, keep, loss_norm='batch_tokens', num_groups=2,
      max_response_len=8)
  np.testing.assert_allclose(weights, [1 / 20, 0.0, 1 / 20, 1 / 20])
  made = advantage.advantages(
      rewards, groups, groups, lengths > 0, method='none', num_groups=2,
      num_stats=2, epsilon=1e-6, min_stat_n=2)
  np.testing.assert_allclose(made.advantages, [0.5, -0.5, -0.5, 0.5])


@pytest.mark.parametrize('overrides, message', [
    (dict(mode='hard'), "mode='hard' is unknown; use one of off, soft"),
    (dict(buffer_len=0), 'buffer_len=0 must be >= 1'),
    (dict(factor=0.0), 'factor=0.0 must be positive'),
    (dict(factor=float('nan')), 'factor=nan must be positive'),
])
def test_a_mistake_names_the_field(overrides, message):
  with pytest.raises(types.UserError, match=message):
    overlong.OverlongConfig(**overrides)


def test_a_buffer_longer_than_the_cap_is_refused_where_it_is_used():
  with pytest.raises(types.UserError, match='buffer_len=41 is more than'):
    overlong.check(config('soft', buffer_len=41), max_response_len=CAP)
  overlong.check(config('off', buffer_len=41), max_response_len=CAP)

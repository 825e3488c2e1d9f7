"""Tests for longjax.rollout.token_sampling."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from longjax.rollout import token_sampling

NUM_DRAWS = 40_000
LOGITS = np.float32([0.3, -1.2, 2.0, 0.9, -4.0, 1.1, -0.4, 0.0, 1.9])

sample = jax.jit(
    token_sampling.sample, static_argnames=('temperature', 'top_p', 'top_k'))


def exact_probabilities(logits, temperature):
  """Softmax in float64."""
  z = np.asarray(logits, np.float64) / temperature
  weights = np.exp(z - z.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def exact_nucleus(p, top_p):
  """The smallest set with mass `top_p`, token by token."""
  inside, mass = np.zeros(len(p), bool), 0.0
  for v in sorted(range(len(p)), key=lambda v: -p[v]):
    if mass >= top_p:
      break
    inside[v] = True
    mass += p[v]
  return inside


def exact_eligible(logits, temperature, top_p, top_k=0, banned=()):
  """Probabilities of what may be drawn, in the order the docstring says."""
  p = exact_probabilities(logits, temperature)
  p[list(banned)] = 0.0
  if top_k:
    lowest = sorted(p, reverse=True)[min(top_k, len(p)) - 1]
    p[p < lowest] = 0.0
  p /= p.sum()
  p[~exact_nucleus(p, top_p)] = 0.0
  return p / p.sum()


def draws(logits, banned=(), **kwargs):
  """Many draws from one distribution."""
  keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
  shape = NUM_DRAWS, len(logits)
  if banned:
    kwargs['banned'] = np.broadcast_to(
        np.isin(np.arange(len(logits)), list(banned)), shape)
  return sample(jnp.broadcast_to(logits, shape), keys, **kwargs)


@pytest.mark.parametrize('temperature, top_p', [
    (1.0, 1.0), (0.7, 1.0), (2.5, 1.0), (1.0, 0.8), (0.7, 0.95)])
def test_tokens_follow_the_exact_distribution(temperature, top_p):
  p = exact_probabilities(LOGITS, temperature)
  inside = exact_nucleus(p, top_p)
  p = np.where(inside, p, 0.0) / p[inside].sum()
  drawn = draws(LOGITS, temperature=temperature, top_p=top_p)
  counts = np.bincount(drawn.token, minlength=len(p))
  assert counts[~inside].sum() == 0
  result = scipy.stats.chisquare(counts[inside], NUM_DRAWS * p[inside])
  assert result.pvalue > 1e-3
  # The test can tell: a temperature 5 % off is rejected.
  wrong = exact_probabilities(LOGITS, 1.05 * temperature)[inside]
  wrong = scipy.stats.chisquare(
      counts[inside], NUM_DRAWS * wrong / wrong.sum())
  assert wrong.pvalue < 1e-3


@pytest.mark.parametrize('top_p', [1.0, 0.5])
@pytest.mark.parametrize('temperature', [1.0, 0.7, 3.0])
def test_logprob_and_entropy_are_those_before_truncation(temperature, top_p):
  rng = np.random.default_rng(0)
  logits = np.float32(3.0 * rng.normal(size=(4, 5, 33)))
  keys = jax.random.split(jax.random.key(1), (4, 5))
  drawn = sample(logits, keys, temperature=temperature, top_p=top_p)
  p = exact_probabilities(logits, temperature)
  p_t1 = exact_probabilities(logits, 1.0)
  for i in np.ndindex(4, 5):
    np.testing.assert_allclose(
        drawn.logprob[i], np.log(p[i][drawn.token[i]]),
        rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        drawn.entropy[i], -(p[i] * np.log(p[i])).sum(), rtol=1e-5)
    np.testing.assert_allclose(
        drawn.entropy_t1[i], -(p_t1[i] * np.log(p_t1[i])).sum(), rtol=1e-5)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(st.integers(-8, 8), min_size=7, max_size=7, unique=True),
    st.sampled_from([0.02, 0.3, 0.6, 0.9]))
def test_the_nucleus_is_the_smallest_set_with_the_mass(quarters, top_p):
  logits = np.float32(quarters) / 4.0
  p = exact_probabilities(logits, 1.0)
  # No boundary so near that float32 may fall on its other side.
  mass = np.cumsum(np.sort(p)[::-1])
  hypothesis.assume(np.abs(mass - top_p).min() > 1e-4)
  inside = exact_nucleus(p, top_p)
  # Rarely drawn tokens are drawn too: the smallest has odds of 1 in 400.
  seen = np.unique(draws(logits, temperature=1.0, top_p=top_p).token)
  np.testing.assert_array_equal(seen, np.flatnonzero(inside))


@pytest.mark.parametrize('temperature, top_p, top_k, banned', [
    (1.0, 1.0, 3, ()), (0.7, 1.0, 5, ()), (1.0, 1.0, 0, (2, 8)),
    # The nucleus is one of what is left, not of all tokens.
    (1.0, 0.8, 4, ()), (1.0, 0.6, 0, (2,)), (1.3, 0.75, 4, (8, 0)),
    (1.0, 1.0, 50, ()), (1.0, 0.9, 1, (2,))])
def test_tokens_follow_the_exact_distribution_of_those_that_may_be_drawn(
    temperature, top_p, top_k, banned):
  p = exact_eligible(LOGITS, temperature, top_p, top_k, banned)
  drawn = draws(
      LOGITS, temperature=temperature, top_p=top_p, top_k=top_k,
      banned=banned)
  counts = np.bincount(drawn.token, minlength=len(p))
  assert counts[p == 0.0].sum() == 0
  inside = p > 0.0
  if inside.sum() > 1:
    result = scipy.stats.chisquare(counts[inside], NUM_DRAWS * p[inside])
    assert result.pvalue > 1e-3
  # What is reported is of the distribution before anything was left out.
  whole = exact_probabilities(LOGITS, temperature)
  np.testing.assert_allclose(
      drawn.logprob, np.log(whole)[drawn.token], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
      drawn.entropy, -(whole * np.log(whole)).sum(), rtol=1e-5)
  at_t1 = exact_probabilities(LOGITS, 1.0)
  np.testing.assert_allclose(
      drawn.entropy_t1, -(at_t1 * np.log(at_t1)).sum(), rtol=1e-5)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(st.integers(-8, 8), min_size=7, max_size=7, unique=True),
    st.sampled_from([(1.0, 0), (1.0, 1), (1.0, 4), (0.6, 0), (0.6, 2),
                     (0.9, 4)]),
    st.sets(st.integers(0, 6), max_size=5))
def test_what_may_be_drawn_is_what_is_drawn(quarters, top, banned):
  top_p, top_k = top
  logits = np.float32(quarters) / 4.0
  # No boundary so near that float32 may fall on its other side.
  mass = np.cumsum(np.sort(exact_eligible(
      logits, 1.0, 1.0, top_k, banned))[::-1])
  hypothesis.assume(
      top_p == 1.0 or np.abs(mass - top_p).min() > 1e-4)
  p = exact_eligible(logits, 1.0, top_p, top_k, banned)
  seen = np.unique(draws(
      logits, temperature=1.0, top_p=top_p, top_k=top_k,
      banned=banned).token)
  np.testing.assert_array_equal(seen, np.flatnonzero(p))


def test_tokens_as_likely_as_the_last_of_the_top_are_among_them():
  logits = np.float32([1.0, 2.0, 0.0, 1.0, -1.0])
  seen = np.unique(
      draws(logits, temperature=1.0, top_p=1.0, top_k=2).token)
  np.testing.assert_array_equal(seen, [0, 1, 3])


def test_greedy_takes_the_likeliest_token_that_is_not_banned():
  banned = np.zeros((3, len(LOGITS)), bool)
  banned[1, 2] = banned[2, [2, 8, 5]] = True
  logits = np.tile(LOGITS, (3, 1))
  for top_k in (0, 1, 4):
    drawn = sample(
        logits, jax.random.split(jax.random.key(0), 3), temperature=0.0,
        top_p=1.0, top_k=top_k, banned=banned)
    assert drawn.token.tolist() == [2, 8, 3]
    np.testing.assert_allclose(
        drawn.logprob, np.log(exact_probabilities(LOGITS, 1.0))[[2, 8, 3]],
        rtol=1e-5)


def test_a_tiny_nucleus_is_the_likeliest_token():
  assert set(np.asarray(draws(LOGITS, temperature=1.0, top_p=1e-6).token)) == {
      2}


def test_tokens_as_likely_as_the_last_of_the_nucleus_belong_to_it():
  logits = np.float32([1.0, 1.0, 0.0, 1.0])
  seen = np.unique(draws(logits, temperature=1.0, top_p=0.4).token)
  np.testing.assert_array_equal(seen, [0, 1, 3])


def test_temperature_zero_is_greedy_and_reports_temperature_one():
  rng = np.random.default_rng(2)
  logits = np.float32(rng.normal(size=(6, 17)))
  keys = jax.random.split(jax.random.key(3), 6)
  drawn = sample(logits, keys, temperature=0.0, top_p=0.9)
  p = exact_probabilities(logits, 1.0)
  np.testing.assert_array_equal(drawn.token, logits.argmax(axis=-1))
  np.testing.assert_allclose(drawn.logprob, np.log(p.max(axis=-1)), rtol=1e-5)
  np.testing.assert_allclose(
      drawn.entropy, -(p * np.log(p)).sum(axis=-1), rtol=1e-5)


def test_a_draw_depends_on_its_own_key_and_logits_only():
  rng = np.random.default_rng(4)
  logits = np.float32(rng.normal(size=(3, 4, 50)))
  keys = jax.random.split(jax.random.key(5), (3, 4))
  together = sample(logits, keys, temperature=1.3, top_p=0.9).token
  for i in np.ndindex(3, 4):
    alone = sample(logits[i], keys[i], temperature=1.3, top_p=0.9)
    assert alone.token == together[i]
  # The keys do matter.
  other = sample(
      logits, keys[::-1], temperature=1.3, top_p=0.9).token
  assert (np.asarray(other) != np.asarray(together)).any()


def test_bfloat16_logits_are_computed_in_float32():
  logits = jnp.bfloat16(LOGITS)
  drawn = sample(logits, jax.random.key(0), temperature=0.7, top_p=1.0)
  p = exact_probabilities(np.float32(logits), 0.7)
  assert drawn.logprob.dtype == jnp.float32
  np.testing.assert_allclose(
      drawn.logprob, np.log(p[int(drawn.token)]), rtol=1e-5)


def test_an_impossible_token_is_never_drawn():
  logits = np.float32([0.0, -1e30, 1.0])
  for top_p in (1.0, 0.999):
    drawn = draws(logits, temperature=1.0, top_p=top_p)
    assert set(np.unique(drawn.token)) == {0, 2}
    assert np.isfinite(drawn.entropy).all()

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from longjax import types
from longjax.rl import clipping

N, R = 8, 10


def batch(seed):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(0, R + 1, N)
  mask = np.arange(R) < lengths[:, None]
  entropy = rng.gamma(1.0, size=(N, R)).astype(np.float32)
  advantages = rng.normal(size=N).astype(np.float32)
  return entropy, mask, advantages


def reference(entropy, mask, advantages, method):
  """Negative-gradient clipping (Sec. 4.3), token by token in float64."""
  entropy = entropy.astype(np.float64)
  keep = np.ones(mask.shape, bool)
  rows = [i for i in range(N) if advantages[i] < 0 and mask[i].any()]
  if not rows or method == 'off':
    return keep
  means = {i: entropy[i][mask[i]].mean() for i in rows}
  pool = np.concatenate([entropy[i][mask[i]] for i in rows])
  for i in rows:
    for t in np.flatnonzero(mask[i]):
      keep[i, t] = {
          'token_high': entropy[i, t] <= np.quantile(pool, 0.8),
          'token_low': entropy[i, t] >= np.quantile(pool, 0.2),
          'seq_high': means[i] <= np.median(list(means.values())) + 1e-9,
          'seq_low': means[i] >= np.median(list(means.values())) - 1e-9,
      }[method]
  return keep


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('method', clipping.METHODS)
def test_every_method_equals_float64_loops(method, seed):
  entropy, mask, advantages = batch(seed)
  got = clipping.keep_tokens(
      jnp.array(entropy), jnp.array(mask), jnp.array(advantages),
      method=method)
  expected = reference(entropy, mask, advantages, method)
  np.testing.assert_array_equal(
      np.asarray(got)[mask], expected[mask])


@pytest.mark.parametrize('method', clipping.METHODS)
def test_responses_without_negative_advantage_are_never_touched(method):
  entropy, mask, advantages = batch(5)
  got = np.asarray(clipping.keep_tokens(
      jnp.array(entropy), jnp.array(mask), jnp.array(advantages),
      method=method))
  assert got[advantages >= 0].all()
  if method != 'off':
    assert not got.all()


@pytest.mark.parametrize('method', clipping.METHODS)
def test_equal_entropies_lose_nothing(method):
  mask = jnp.ones((N, R), bool)
  got = clipping.keep_tokens(
      jnp.full((N, R), 0.1), mask, -jnp.ones(N), method=method)
  assert bool(got.all())


@pytest.mark.parametrize('method', clipping.METHODS)
def test_a_batch_without_failures_loses_nothing(method):
  entropy, mask, _ = batch(0)
  got = clipping.keep_tokens(
      jnp.array(entropy), jnp.array(mask), jnp.ones(N), method=method)
  assert bool(got.all())


VALUES = hnp.arrays(
    np.float32, 12, elements=st.floats(0, 4, width=16))


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(VALUES, hnp.arrays(bool, 12), st.floats(0, 1))
def test_the_masked_quantile_equals_numpy(values, mask, q):
  got = clipping.quantile(jnp.array(values), jnp.array(mask), q)
  if not mask.any():
    assert np.isnan(got)
    return
  expected = np.quantile(values[mask].astype(np.float64), q)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kwargs, word', [
    (dict(method='high'), 'high'),
    (dict(token_fraction=1.5), 'token_fraction=1.5'),
    (dict(seq_fraction=-0.1), 'seq_fraction=-0.1'),
])
def test_bad_configuration_is_one_line_naming_the_value(kwargs, word):
  with pytest.raises(types.UserError, match=word):
    clipping.NegativeClipConfig(**kwargs)

import jax.numpy as jnp
import numpy as np

from longjax.rl import diagnostics


def test_the_mismatch_equals_float64_loops_and_adds_up():
  rng = np.random.default_rng(0)
  trainer = -rng.gamma(1.0, size=(3, 5)).astype(np.float32)
  sampler = trainer + rng.normal(scale=0.3, size=(3, 5)).astype(np.float32)
  mask = rng.uniform(size=(3, 5)) < 0.7
  d = (trainer.astype(np.float64) - sampler)[mask]
  w = np.exp(d)
  trainer[~mask], sampler[~mask] = -np.inf, np.nan

  got = diagnostics.zero_mismatch()
  for row in range(3):
    got += diagnostics.mismatch(
        jnp.array(trainer[row]), jnp.array(sampler[row]), jnp.array(mask[row]))
  np.testing.assert_allclose(got.gap.mean(), np.abs(d).mean(), rtol=1e-5)
  np.testing.assert_allclose(got.gap_max, np.abs(d).max(), rtol=1e-5)
  np.testing.assert_allclose(got.kl.mean(), (w - 1 - d).mean(), rtol=1e-4)
  np.testing.assert_allclose(got.ratio.mean(), w.mean(), rtol=1e-5)
  np.testing.assert_allclose(
      got.effective_sample_size(),
      w.sum() ** 2 / (len(w) * (w**2).sum()), rtol=1e-5)


def test_no_mismatch_is_zero_kl_and_a_full_sample():
  logprobs = jnp.float32([-0.5, -2.0])
  got = diagnostics.mismatch(logprobs, logprobs, jnp.ones(2, bool))
  assert float(got.kl.mean()) == 0.0
  assert float(got.effective_sample_size()) == 1.0
  assert float(diagnostics.zero_mismatch().effective_sample_size()) == 0.0


def test_the_balance_counts_what_is_kept():
  got = diagnostics.balance(
      jnp.float32([2.0, -1.0, -3.0, 0.0, 5.0]),
      jnp.array([True, True, False, True, True]),
      jnp.int32([4, 2, 6, 8, 0]))
  assert float(got.positive_total) == 2.0
  assert float(got.negative_total) == -1.0
  assert float(got.positive_rows.mean()) == 0.25
  assert float(got.kept_rows.mean()) == 0.75
  np.testing.assert_allclose(got.kept_tokens.mean(), 14 / 20)


def test_four_entropies_are_told_apart():
  mask = jnp.array([[True, True], [True, False]])
  tempered = jnp.float32([[1.0, 3.0], [5.0, 99.0]])
  got = diagnostics.entropies(tempered, 2.0 * tempered, mask)
  means = {name: float(value.mean()) for name, value in got.items()}
  assert means == {
      'seq_mean': 3.5, 'token_mean': 3.0,
      'seq_mean_t1': 7.0, 'token_mean_t1': 6.0}

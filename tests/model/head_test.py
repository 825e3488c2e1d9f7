from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import types
from longjax.model import head
from longjax.parallel import mesh, rules

B, T, D, V = 8, 7, 8, 20


def reference(hidden, weights, targets, mask, temperature):
  """logprobs, entropy and entropy at temperature 1, a token at a time, f64."""
  hidden, weights = np.float64(hidden), np.float64(weights)
  logprobs, entropy, entropy_t1 = (np.zeros(targets.shape) for _ in range(3))
  for b, t in np.argwhere(mask):
    logits = np.array([hidden[b, t] @ weights[:, v] for v in range(V)])
    p = np.exp(logits / temperature)
    p /= p.sum()
    p_t1 = np.exp(logits) / np.exp(logits).sum()
    logprobs[b, t] = np.log(p[targets[b, t]])
    entropy[b, t] = -sum(p * np.log(p))
    entropy_t1[b, t] = -sum(p_t1 * np.log(p_t1))
  return logprobs, entropy, entropy_t1


def inputs(seed=0, density=0.4):
  rng = np.random.default_rng(seed)
  return (
      np.float32(rng.normal(size=(B, T, D))),
      np.float32(rng.normal(size=(D, V))),
      np.int32(rng.integers(0, V, size=(B, T))),
      rng.random((B, T)) < density,
  )


def run(hidden, weights, targets, mask, **kwargs):
  return jax.jit(lambda *args: head.logprobs_and_entropy(*args, **kwargs))(
      hidden, weights, targets, mask)


def gradients(hidden, weights, targets, mask, d_logprobs, **kwargs):
  def total(hidden, weights):
    output = head.logprobs_and_entropy(
        hidden, weights, targets, mask, **kwargs)
    return jnp.sum(output.logprobs * d_logprobs)
  return jax.jit(jax.grad(total, (0, 1)))(hidden, weights)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('chunk_len', [1, 5, 512])
def test_values_are_those_of_float64_loops(temperature, chunk_len):
  args = inputs()
  got = run(*args, temperature=temperature, chunk_len=chunk_len)
  want = reference(*args, temperature)
  for g, w in zip((got.logprobs, got.entropy, got.entropy_t1), want):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
  hidden, weights, targets, mask = inputs()
  temperature, step = 0.7, 1e-6
  d_logprobs = np.random.default_rng(1).normal(size=(B, T))

  def total(hidden, weights):
    return np.sum(d_logprobs * reference(
        hidden, weights, targets, mask, temperature)[0])

  got_hidden, got_weights = gradients(
      hidden, weights, targets, mask, np.float32(d_logprobs),
      temperature=temperature, chunk_len=5)
  rng = np.random.default_rng(2)
  for got, which in ((got_hidden, 0), (got_weights, 1)):
    for _ in range(8):
      index = tuple(rng.integers(0, n) for n in got.shape)
      bumped = [np.float64(hidden), np.float64(weights)]
      bumped[which] = bumped[which].copy()
      bumped[which][index] += step
      above = total(*bumped)
      bumped[which][index] -= 2 * step
      want = (above - total(*bumped)) / (2 * step)
      np.testing.assert_allclose(got[index], want, rtol=1e-4, atol=1e-6)


def test_gradients_are_those_of_log_softmax():
  hidden, weights, targets, mask = inputs()
  d_logprobs = jnp.float32(np.random.default_rng(1).normal(size=(B, T)))

  def total(hidden, weights):
    logprobs = jax.nn.log_softmax(head.logits(hidden, weights) / 0.7)
    logprobs = jnp.take_along_axis(logprobs, targets[..., None], 2)[..., 0]
    return jnp.sum(logprobs * d_logprobs, where=mask)

  got = gradients(
      hidden, weights, targets, mask, d_logprobs, temperature=0.7, chunk_len=5)
  for g, w in zip(got, jax.grad(total, (0, 1))(hidden, weights)):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_entropy_passes_on_no_gradient():
  hidden, weights, targets, mask = inputs()

  def total(hidden, weights):
    output = head.logprobs_and_entropy(hidden, weights, targets, mask)
    return jnp.sum(output.entropy) + jnp.sum(output.entropy_t1)

  for gradient in jax.grad(total, (0, 1))(hidden, weights):
    np.testing.assert_array_equal(gradient, 0.0)


def test_an_empty_mask_gives_zeros():
  hidden, weights, targets, _ = inputs()
  mask = np.zeros((B, T), bool)
  output = run(hidden, weights, targets, mask, chunk_len=5)
  for x in jax.tree.leaves(output):
    np.testing.assert_array_equal(x, 0.0)
  for gradient in gradients(
      hidden, weights, targets, mask, np.ones((B, T), np.float32)):
    np.testing.assert_array_equal(gradient, 0.0)


def test_tokens_outside_the_mask_may_hold_nan():
  # Padding may hold anything; a chunk that used it would spread the NaN.
  hidden, weights, targets, mask = inputs()
  spoiled = np.where(mask[..., None], hidden, np.nan)
  chunk_len = 5
  d_logprobs = np.where(mask, 1.0, np.nan).astype(np.float32)
  output = run(spoiled, weights, targets, mask, chunk_len=chunk_len)
  clean = run(hidden, weights, targets, mask, chunk_len=chunk_len)
  for got, want in zip(jax.tree.leaves(output), jax.tree.leaves(clean)):
    np.testing.assert_array_equal(got, want)
  got = gradients(
      spoiled, weights, targets, mask, d_logprobs, chunk_len=chunk_len)
  want = gradients(
      hidden, weights, targets, mask, np.float32(mask), chunk_len=chunk_len)
  for g, w in zip(got, want):
    np.testing.assert_array_equal(g, w)


def test_targets_outside_the_mask_may_be_anything():
  hidden, weights, targets, mask = inputs()
  spoiled = np.where(mask, targets, -1)
  np.testing.assert_array_equal(
      run(hidden, weights, spoiled, mask).logprobs,
      run(hidden, weights, targets, mask).logprobs)


def test_tied_embeddings_get_the_gradient_of_the_head():
  hidden, weights, targets, mask = inputs()
  embedding = weights.T.copy()

  def total(embedding):
    return jnp.sum(head.logprobs_and_entropy(
        hidden, embedding.T, targets, mask).logprobs)

  _, d_weights = gradients(
      hidden, weights, targets, mask, np.ones((B, T), np.float32))
  np.testing.assert_allclose(
      jax.grad(total)(embedding), d_weights.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('sizes', [
    dict(data=8), dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2)])
def test_a_mesh_changes_nothing(sizes):
  made = rules.Rules(mesh.make(mesh.MeshConfig(**sizes)))
  args = inputs()
  d_logprobs = np.float32(np.random.default_rng(1).normal(size=(B, T)))
  kwargs = dict(temperature=0.7, chunk_len=3)
  alone = run(*args, **kwargs), gradients(*args, d_logprobs, **kwargs)
  kwargs['rules'] = made
  weights = jax.device_put(args[1], made.sharding('embed', 'vocab')) if (
      D % made.size('embed') == 0) else args[1]
  args = (args[0], weights, *args[2:])
  spread = run(*args, **kwargs), gradients(*args, d_logprobs, **kwargs)
  for got, want in zip(jax.tree.leaves(spread), jax.tree.leaves(alone)):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_work_is_proportional_to_the_masked_tokens():
  # Counted, not timed: each visited chunk calls back to the host.
  hidden, weights, targets, _ = inputs()
  chunks = []
  original = head.logits

  def counted(*args):
    jax.debug.callback(lambda: chunks.append(1))
    return original(*args)

  mask = np.zeros((B, T), bool)
  mask[2, 3:] = mask[5, :2] = mask[7, 6] = True  # 7 tokens, 2 chunks of 5.
  with mock.patch.object(head, 'logits', counted):
    jax.block_until_ready(head.logprobs_and_entropy(
        hidden, weights, targets, mask, chunk_len=5))
    jax.effects_barrier()
  assert len(chunks) == 2


def temporary_bytes(row_len, vocab_size, **sizes):
  """Memory of one device's forward and backward beside arguments, results."""
  made = rules.Rules(
      mesh.make(mesh.MeshConfig(**sizes)) if sizes else
      mesh.make(mesh.MeshConfig(), jax.devices()[:1]))

  def total(hidden, weights, targets, mask):
    return jnp.sum(head.logprobs_and_entropy(
        hidden, weights, targets, mask, chunk_len=64, rules=made).logprobs)

  def array(*shape, names, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=made.sharding(*names))

  tokens = ('batch', 'seq')
  shapes = (
      array(4, row_len, 8, names=(*tokens, None)),
      array(8, vocab_size, names=('embed', 'vocab')),
      array(4, row_len, names=tokens, dtype=jnp.int32),
      array(4, row_len, names=tokens, dtype=bool),
  )
  compiled = jax.jit(jax.grad(total, (0, 1))).lower(*shapes).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_hold_the_logits():
  short, long = temporary_bytes(512, 4096), temporary_bytes(2048, 4096)
  # 1,536 more positions of 4 rows would be 100 MB of logits; what grows is a
  # few numbers and D = 8 channels a token.
  assert long - short < 4 * 1536 * 4 * 40
  assert long < 4 * 2048 * 4096 * 4 / 10


def test_memory_is_a_chunk_of_logits_split_over_the_vocabulary():
  few, many = temporary_bytes(2048, 4096), temporary_bytes(2048, 16_384)
  # One chunk of 64 tokens, a few arrays of it, and the gradient of the head.
  assert many - few < (64 * 6 + 8 * 3) * 12_288 * 4
  whole = temporary_bytes(512, 65_536)
  split = temporary_bytes(512, 65_536, data=1, tensor=8)
  assert split < whole / 6


def test_a_temperature_of_zero_is_refused():
  with pytest.raises(types.UserError, match='temperature=0.0 must be > 0'):
    head.logprobs_and_entropy(*inputs(), temperature=0.0)


def test_bfloat16_scores_near_float32():
  hidden, weights, targets, mask = inputs()
  got = run(jnp.bfloat16(hidden), weights, targets, mask)
  want = reference(hidden, weights, targets, mask, 1.0)
  assert got.logprobs.dtype == jnp.float32
  np.testing.assert_allclose(got.logprobs, want[0], atol=0.1)
  d_hidden, d_weights = gradients(
      jnp.bfloat16(hidden), weights, targets, mask,
      np.ones((B, T), np.float32))
  assert d_hidden.dtype == jnp.bfloat16
  assert d_weights.dtype == jnp.float32

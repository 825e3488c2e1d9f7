"""Attention over rows split along `seq`, against float64 loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import rows, types
from longjax.model import attention, context_parallel
from tests import tiny_model
from tests.model import numpy_attention

STRATEGIES = ('ring', 'all_gather', 'merge')
N, K, H, T = 8, 2, 4, 32


def token_meta(fields):
  return rows.TokenMeta(*(jnp.int32(field) for field in fields))


@functools.cache
def case():
  """Arrays of four rows of awkward kinds, tokens in random order, and truth."""
  rng = np.random.default_rng(0)
  meta = np.stack(numpy_attention.row_kinds(T))
  for b in range(4):
    meta[:, b] = meta[:, b, rng.permutation(T)]
  shapes = ((4, T, N, H), (4, T, K, H), (4, T, K, H), (4, T, N, H), (4, T, N))
  arrays = [np.float32(rng.normal(size=shape)) for shape in shapes]
  q, k, v, d_out, d_lse = arrays
  want = numpy_attention.attention(q, k, v, meta, meta, d_out, d_lse)
  return meta, arrays, want


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('mesh', [
    dict(seq=8),
    dict(data=2, seq=2, tensor=2),
    dict(fsdp=2, seq=4),
    dict(seq=2, tensor=4),  # Twice as many devices as key heads.
], ids=str)
def test_values_and_gradients_are_those_of_one_device(mesh, strategy):
  meta, (q, k, v, d_out, d_lse), want = case()
  rules = tiny_model.rules(**mesh)

  @jax.jit
  def both(q, k, v, meta):
    results, pull = jax.vjp(
        lambda q, k, v: attention.attention(
            q, k, v, meta, meta, backend='blockwise', block_len=4,
            context_parallel=strategy, rules=rules), q, k, v)
    return *results, *pull((d_out, d_lse))

  got = both(q, k, v, token_meta(meta))
  assert got[0].sharding.spec[1] == 'seq'
  for name, g, w in zip(('out', 'lse', 'dq', 'dk', 'dv'), got, want):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-6, err_msg=name)


def compiled(strategy, length, num_devices, mesh_devices=8):
  """Forward and backward of one causal row over `num_devices`."""
  rules = tiny_model.rules(
      seq=num_devices, data=mesh_devices // num_devices)

  def array(*shape, names):
    return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=rules.sharding(*names))

  num_rows = rules.size('batch')
  q = array(num_rows, length, 4, 16, names=('batch', 'seq', 'heads', None))
  k = array(num_rows, length, 2, 16, names=('batch', 'seq', 'kv_heads', None))
  field = jax.ShapeDtypeStruct(
      (num_rows, length), jnp.int32, sharding=rules.sharding('batch', 'seq'))

  def total(q, k, v, meta):
    out, _ = attention.attention(
        q, k, v, meta, meta, backend='blockwise', block_len=64,
        context_parallel=strategy, rules=rules)
    return jnp.sum(out**2)

  return jax.jit(jax.grad(total, (0, 1, 2))).lower(
      q, k, k, rows.TokenMeta(field, field, field)).compile()


def temporary_bytes(strategy, length, num_devices):
  """Of one device."""
  analysis = compiled(strategy, length, num_devices).memory_analysis()
  return analysis.temp_size_in_bytes


def test_memory_of_the_ring_is_linear_in_a_devices_tokens():
  got = [temporary_bytes('ring', length, 8) / length
         for length in (4096, 8192, 16_384, 32_768)]
  assert max(got) < 1.3 * min(got), got
  # Four times the devices: a quarter of the memory.
  assert temporary_bytes('ring', 8192, 2) > 3.0 * temporary_bytes(
      'ring', 8192, 8)


def test_gathering_all_keys_takes_memory_for_them():
  assert temporary_bytes('all_gather', 16_384, 8) > 1.5 * temporary_bytes(
      'ring', 16_384, 8)


def test_only_the_ring_passes_keys_on():
  ring, gathered, merged = (
      compiled(strategy, 1024, 8).as_text() for strategy in STRATEGIES)
  assert 'collective-permute' in ring and 'all-gather' not in ring
  assert 'collective-permute' not in gathered and 'all-gather' in gathered
  assert 'collective-permute' not in merged and 'all-gather' in merged


def test_the_choice_follows_the_size_of_keys_and_values():
  rules = tiny_model.rules(seq=4, tensor=2)
  choose = functools.partial(
      context_parallel.choose, dtype=jnp.bfloat16, rules=rules)
  # Qwen3-30B-A3B: 4 key heads of 128; 2 of them a device.
  assert choose((1, 1 << 18, 4, 128)) == 'all_gather'  # 256 MiB.
  assert choose((1, 1 << 20, 4, 128)) == 'ring'  # 1 GiB.


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('backend, length, block_len', [
    ('tpu', 2048, 128), ('gpu', 512, 32)])
def test_kernels_go_around_too(backend, length, block_len, strategy):
  rules = tiny_model.rules(data=2, seq=2, tensor=2)
  rng = np.random.default_rng(0)
  meta = token_meta(numpy_attention.stack(
      numpy_attention.shared_prefix(
          length // 2, [length // 8, length // 4], length),
      numpy_attention.packed([length // 3, length // 2], length)))
  q, k, v, weight = (
      jnp.float32(rng.normal(size=(2, length, n, 16))) for n in (4, 2, 2, 4))

  def results(q, k, v, **kwargs):
    def total(q, k, v):
      out, lse = attention.attention(q, k, v, meta, meta, **kwargs)
      return jnp.sum(out * weight), (out, lse)
    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)

  got = results(
      q, k, v, backend=backend, block_len=block_len,
      context_parallel=strategy, rules=rules)
  want = results(q, k, v, backend='reference')
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5)


def test_a_kernel_that_cannot_run_is_refused_by_name_or_replaced():
  rules = tiny_model.rules(data=4, seq=2)
  meta = token_meta(numpy_attention.stack(
      *[numpy_attention.packed([64], 64)] * 4))
  x = jnp.ones((4, 64, 2, 16))
  with pytest.raises(types.UserError, match=r"attention='tpu'.*128 lanes"):
    attention.attention(x, x, x, meta, meta, backend='tpu', rules=rules)
  out, _ = attention.attention(x, x, x, meta, meta, rules=rules)
  np.testing.assert_allclose(out, 1.0, rtol=1e-6)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import rows
from longjax.model import attention, flash_attention
from longjax.parallel import mesh, rules
from tests.model import numpy_attention

BACKENDS = ('reference', 'blockwise')
N, K, H = 6, 2, 8


def arrays(num_rows, query_len, key_len, seed=0):
  rng = np.random.default_rng(seed)
  shapes = (
      (num_rows, query_len, N, H), (num_rows, key_len, K, H),
      (num_rows, key_len, K, H), (num_rows, query_len, N, H),
      (num_rows, query_len, N))
  return [np.float32(rng.normal(size=shape)) for shape in shapes]


def token_meta(fields):
  return rows.TokenMeta(*(jnp.int32(field) for field in fields))


def with_gradients(q, k, v, query_meta, key_meta, d_out, d_lse, **kwargs):
  """out, lse, dq, dk, dv."""

  def run(q, k, v, query_meta, key_meta):
    return attention.attention(q, k, v, query_meta, key_meta, **kwargs)

  @jax.jit
  def both(*args):
    results, pull = jax.vjp(lambda *qkv: run(*qkv, *args[3:]), *args[:3])
    return *results, *pull((d_out, d_lse))

  return both(q, k, v, token_meta(query_meta), token_meta(key_meta))


def assert_all_close(got, want):
  for name, g, w in zip(('out', 'lse', 'dq', 'dk', 'dv'), got, want):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize('backend', BACKENDS)
def test_values_and_gradients_are_those_of_float64_loops(backend):
  row_len = 37  # No multiple of block_len.
  meta = numpy_attention.row_kinds(row_len)
  q, k, v, d_out, d_lse = arrays(4, row_len, row_len)
  want = numpy_attention.attention(q, k, v, meta, meta, d_out, d_lse)
  got = with_gradients(
      q, k, v, meta, meta, d_out, d_lse, backend=backend, block_len=8)
  assert_all_close(got, want)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('query_len, key_len', [(1, 21), (21, 5)])
def test_queries_and_keys_may_differ_in_number(backend, query_len, key_len):
  key_meta = numpy_attention.row_kinds(max(query_len, key_len))
  query_meta = tuple(x[:, -query_len:] for x in key_meta)
  key_meta = tuple(x[:, :key_len] for x in key_meta)
  q, k, v, d_out, d_lse = arrays(4, query_len, key_len)
  want = numpy_attention.attention(
      q, k, v, query_meta, key_meta, d_out, d_lse)
  got = with_gradients(
      q, k, v, query_meta, key_meta, d_out, d_lse, backend=backend,
      block_len=4)
  assert_all_close(got, want)


@pytest.mark.parametrize('backend', BACKENDS)
def test_a_query_that_sees_nothing_gives_zero_and_zero_gradients(backend):
  query_meta = numpy_attention.packed([4], 6)
  key_meta = list(query_meta)
  key_meta[2] = key_meta[2] + 2  # Queries 0 and 1 are before every key.
  query_meta, key_meta = (
      numpy_attention.stack(x) for x in (query_meta, key_meta))
  q, k, v, d_out, _ = arrays(1, 6, 6)
  # What arrives through lse = -inf is often NaN and must not spread.
  d_lse = np.full((1, 6, N), 0.5)
  d_lse[:, [0, 1, 4, 5]] = np.nan
  out, lse, dq, dk, dv = with_gradients(
      q, k, v, query_meta, key_meta, d_out, np.float32(d_lse),
      backend=backend, block_len=4)
  blind = np.array([0, 1, 4, 5])
  np.testing.assert_array_equal(out[:, blind], 0.0)
  np.testing.assert_array_equal(lse[:, blind], -np.inf)
  assert np.all(np.isfinite(lse[:, [2, 3]]))
  np.testing.assert_array_equal(dq[:, blind], 0.0)
  # Keys 2 and 3 are later than every query; 4 and 5 are padding.
  np.testing.assert_array_equal(dk[:, 2:], 0.0)
  np.testing.assert_array_equal(dv[:, 2:], 0.0)
  assert np.all(np.isfinite(dk))
  assert np.all(np.abs(dk[:, :2]).sum(axis=-1) > 0)


@pytest.mark.parametrize('backend', BACKENDS)
def test_large_scores_do_not_overflow(backend):
  meta = numpy_attention.row_kinds(20)
  q, k, v, d_out, d_lse = arrays(4, 20, 20)
  q = q * 300
  want = numpy_attention.attention(q, k, v, meta, meta, d_out, d_lse)
  got = with_gradients(
      q, k, v, meta, meta, d_out, d_lse, backend=backend, block_len=8)
  # float32 scores near 1,000 carry errors of 1e-4, which weights inherit.
  np.testing.assert_allclose(got[0], want[0], rtol=2e-3, atol=2e-3)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
  for x in got[2:]:
    assert np.all(np.isfinite(x))


@pytest.mark.parametrize('backend', BACKENDS)
def test_bfloat16_goes_in_and_comes_out_near_float32(backend):
  meta = numpy_attention.row_kinds(24)
  q, k, v, d_out, d_lse = arrays(4, 24, 24)
  q, k, v = (jnp.bfloat16(x) for x in (q, k, v))
  want = numpy_attention.attention(
      *(np.float32(x) for x in (q, k, v)), meta, meta, d_out, d_lse)
  got = with_gradients(
      q, k, v, meta, meta, jnp.bfloat16(d_out), d_lse, backend=backend,
      block_len=8)
  assert got[0].dtype == got[2].dtype == got[3].dtype == jnp.bfloat16
  assert got[1].dtype == jnp.float32
  for g, w in zip(got, want):
    np.testing.assert_allclose(np.float32(g), w, rtol=0.05, atol=0.05)


def test_merging_attention_over_halves_of_the_keys_gives_the_whole():
  meta = numpy_attention.row_kinds(20)
  q, k, v, *_ = arrays(4, 20, 20)

  def over(keys):
    return jax.jit(attention.attention, static_argnames='backend')(
        q, k[:, keys], v[:, keys], token_meta(meta),
        token_meta(x[:, keys] for x in meta), backend='reference')

  out, lse = flash_attention.merge(*over(slice(0, 9)), *over(slice(9, 20)))
  whole_out, whole_lse = over(slice(0, 20))
  np.testing.assert_allclose(out, whole_out, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(lse, whole_lse, rtol=1e-5, atol=1e-6)
  assert np.isinf(lse).any()  # The case of two empty halves is covered.


def test_merge_passes_finite_gradients_where_nothing_was_seen():
  def total(lse1, lse2):
    out, lse = flash_attention.merge(
        jnp.ones((3, H)), lse1, 2 * jnp.ones((3, H)), lse2)
    return jnp.sum(out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

  gradients = jax.grad(total, (0, 1))(
      jnp.array([0.0, -jnp.inf, -jnp.inf]), jnp.array([1.0, 1.0, -jnp.inf]))
  assert np.all(np.isfinite(gradients))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('sizes', [
    dict(data=8), dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2)])
def test_a_mesh_changes_nothing(backend, sizes):
  made = rules.Rules(mesh.make(mesh.MeshConfig(**sizes)))
  meta = tuple(np.tile(x, (2, 1)) for x in numpy_attention.row_kinds(20))
  q, k, v, d_out, d_lse = arrays(8, 20, 20)
  alone = with_gradients(
      q, k, v, meta, meta, d_out, d_lse, backend=backend, block_len=8)
  names = (
      ('batch', None, 'heads', None), ('batch', None, 'kv_heads', None),
      ('batch', None, 'kv_heads', None), ('batch', None, 'heads', None),
      ('batch', None, 'heads'))
  q, k, v, d_out, d_lse = (
      jax.device_put(x, made.sharding(*logical))
      for x, logical in zip((q, k, v, d_out, d_lse), names))
  spread = with_gradients(
      q, k, v, meta, meta, d_out, d_lse, backend=backend, block_len=8,
      rules=made)
  if backend == 'blockwise':
    assert spread[0].sharding.spec[0] == ('data', 'fsdp', 'expert')
  for g, w in zip(spread, alone):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


def test_an_unknown_backend_is_refused():
  q, k, v, *_ = arrays(4, 9, 9)
  meta = token_meta(numpy_attention.row_kinds(9))
  with pytest.raises(ValueError, match='flash3'):
    attention.attention(q, k, v, meta, meta, backend='flash3')

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longjax import rows
from longjax.model import attention, flash_attention
from tests.model import numpy_attention

meeting_blocks = jax.jit(
    flash_attention.meeting_blocks, static_argnames='block_len')


def token_meta(fields):
  return rows.TokenMeta(*(jnp.int32(field) for field in fields))


def one_row(fields):
  return token_meta(numpy_attention.stack(fields))


@pytest.mark.parametrize('fields, executed', [
    # Causal: block x sees blocks 0..x.
    (numpy_attention.packed([64], 64), 36),
    # Two sequences of four blocks each.
    (numpy_attention.packed([32, 32], 64), 20),
    # Padding is not visited: five blocks are, the fifth half full.
    (numpy_attention.packed([36], 64), 15),
    # Two blocks of prefix and three branches of two blocks that see the
    # prefix and themselves: 3 + 3 * (2 * 2 + 3).
    (numpy_attention.shared_prefix(16, [16, 16, 16], 64), 24),
    # The fifth block holds the end of the first sequence, which sees five
    # blocks, and the beginning of the second, of which no earlier one does.
    (numpy_attention.packed([36, 28], 64), 15 + 10 - 1),
    (numpy_attention.packed([], 64), 0),
])
def test_only_blocks_that_meet_are_executed(fields, executed):
  meta = one_row(fields)
  np.testing.assert_array_equal(
      flash_attention.num_executed_blocks(meta, meta, block_len=8), [executed])


@st.composite
def token_fields(draw):
  length = draw(st.sampled_from([1, 13]))

  def integers(low, high):
    return draw(st.lists(
        st.integers(low, high), min_size=length, max_size=length))

  return integers(-1, 2), integers(0, 3), integers(0, 9)


@settings(max_examples=60, deadline=None)
@given(token_fields(), token_fields(), st.sampled_from([1, 4]))
def test_no_visible_pair_is_ever_skipped(query, key, block_len):
  query, key = (
      rows.TokenMeta(*map(np.int32, fields)) for fields in (query, key))
  meets = np.asarray(meeting_blocks(query, key, block_len=block_len))
  for t, s in np.argwhere(rows.visible(query, key)):
    assert meets[t // block_len, s // block_len]


def test_skipped_blocks_are_not_touched_at_run_time():
  # Were a skipped block computed and masked, NaN times 0 would show.
  meta = one_row(numpy_attention.packed([16, 16], 32))
  rng = np.random.default_rng(0)
  q, k, v = (
      jnp.float32(rng.normal(size=(1, 32, n, 4))) for n in (2, 1, 1))
  k, v = k.at[:, 16:].set(jnp.nan), v.at[:, 16:].set(jnp.nan)

  @jax.jit
  def run(q, k, v, weight):
    def total(q, k, v):
      out, _ = attention.attention(
          q, k, v, meta, meta, backend='blockwise', block_len=8)
      return jnp.sum(out[:, :16] * weight[:, :16]), out
    return jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)

  (dq, dk, dv), out = run(q, k, v, jnp.ones_like(q))
  assert np.all(np.isfinite(out[:, :16]))
  assert np.all(np.isnan(out[:, 16:]))
  for gradient in (dq, dk, dv):
    assert np.all(np.isfinite(gradient[:, :16]))


def test_each_row_skips_for_itself():
  # A full row beside an empty one: the empty row visits nothing.
  meta = token_meta(numpy_attention.stack(
      numpy_attention.packed([16], 16), numpy_attention.packed([], 16)))
  x = jnp.ones((2, 16, 1, 4)).at[1].set(jnp.nan)
  out, lse = jax.jit(
      lambda x: attention.attention(
          x, x, x, meta, meta, backend='blockwise', block_len=8))(x)
  np.testing.assert_allclose(out[0], 1.0, rtol=1e-6)
  np.testing.assert_array_equal(out[1], 0.0)
  np.testing.assert_array_equal(lse[1], -np.inf)


@pytest.mark.parametrize('block_len', [1, 5, 64])
def test_the_block_length_changes_nothing(block_len):
  meta = token_meta(numpy_attention.row_kinds(16))
  rng = np.random.default_rng(0)
  q, k, v = (
      jnp.float32(rng.normal(size=(4, 16, n, 4))) for n in (4, 2, 2))

  def total(q, k, v, backend):
    out, _ = attention.attention(
        q, k, v, meta, meta, backend=backend, block_len=block_len)
    return jnp.sum(jnp.sin(out)), out

  grad = jax.jit(
      jax.grad(total, (0, 1, 2), has_aux=True), static_argnums=3)
  for got, want in zip(
      jax.tree.leaves(grad(q, k, v, 'blockwise')),
      jax.tree.leaves(grad(q, k, v, 'reference'))):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def temporary_bytes(backend, length):
  """Memory the compiled forward and backward need beside their arguments."""
  shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
  meta = one_row(numpy_attention.packed([length], length))

  def total(q, k, v):
    out, _ = attention.attention(q, k, v, meta, meta, backend=backend)
    return jnp.sum(out**2)

  compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(
      shape, shape, shape).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly_with_length():
  assert temporary_bytes('blockwise', 2048) < 2.5 * temporary_bytes(
      'blockwise', 1024)
  assert temporary_bytes('reference', 2048) > 3.5 * temporary_bytes(
      'reference', 1024)

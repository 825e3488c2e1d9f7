"""What every attention kernel must do, checked against the reference.

`forward` and `backward` are a kernel's two functions with the block length
filled in; see `flash_attention` for their contract.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from longjax import rows
from longjax.model import attention, flash_attention
from tests.model import numpy_attention


def as_meta(fields):
  return rows.TokenMeta(*map(jnp.int32, fields))


def packed_rows(row_len):
  """Two groups with shared prefixes, packed into one row by `rows.pack`."""

  def group(prompt_len, *response_lens):
    return rows.Group(prompt=[1] * prompt_len, branches=[
        rows.Branch(response=[2] * length, trajectory=0)
        for length in response_lens])

  packed = rows.pack(
      [group(row_len // 4, row_len // 8, row_len // 5),
       group(row_len // 8, row_len // 16, row_len // 9)],
      row_len=row_len, num_rows=1)
  meta = packed.meta
  return meta.group, meta.branch, meta.position


def row_kinds(row_len):
  """i32[6, row_len]: also causal order, and what `rows.pack` makes."""
  kinds = [
      numpy_attention.stack(numpy_attention.packed([row_len], row_len)),
      packed_rows(row_len),
      numpy_attention.row_kinds(row_len),
  ]
  return as_meta(map(np.concatenate, zip(*kinds)))


def normal(shape, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.normal(size=shape), dtype)


def arrays(meta_q, meta_k, *, heads, head_size, dtype=jnp.float32):
  num_heads, kv_heads = heads
  q_shape = (*meta_q.group.shape, num_heads, head_size)
  k_shape = (*meta_k.group.shape, kv_heads, head_size)
  return (
      normal(q_shape, dtype, 0), normal(k_shape, dtype, 1),
      normal(k_shape, dtype, 2), normal(q_shape, dtype, 3))


@functools.partial(jax.jit, static_argnames='backend')
def reference(q, k, v, meta_q, meta_k, d_out, d_lse, backend='reference'):
  """out, lse, (dq, dk, dv) of all keys at once."""
  (out, lse), vjp = jax.vjp(
      lambda q, k, v: attention.attention(
          q, k, v, meta_q, meta_k, backend=backend), q, k, v)
  return out, lse, vjp((d_out, d_lse))


def offset_of(out, lse, d_out, d_lse):
  offset = jnp.sum(
      out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=3)
  return offset - jnp.where(jnp.isfinite(lse), d_lse, 0.0)


def check_equals_reference(
    forward, backward, meta_q, meta_k, *, heads, head_size):
  """One set of keys: out, lse and gradients in float32."""
  q, k, v, d_out = arrays(meta_q, meta_k, heads=heads, head_size=head_size)
  d_lse = normal(q.shape[:3], seed=4)
  want = reference(q, k, v, meta_q, meta_k, d_out, d_lse)
  out, lse = forward(q, k, v, meta_q, meta_k)
  gradients = backward(
      q, k, v, meta_q, meta_k, lse, d_out, offset_of(out, lse, d_out, d_lse))
  for got, value in zip(
      jax.tree.leaves((out, lse, gradients)), jax.tree.leaves(want)):
    np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5)


def check_halves_add_up(forward, backward, meta, *, heads, head_size):
  """Outputs for two halves of the keys merge, and their gradients add up."""
  q, k, v, d_out = arrays(meta, meta, heads=heads, head_size=head_size)
  d_lse = normal(q.shape[:3], seed=4)
  want_out, want_lse, want = reference(q, k, v, meta, meta, d_out, d_lse)
  middle = k.shape[1] // 2
  halves = [
      jax.tree.map(lambda x, half=half: x[:, half], (k, v, meta))
      for half in (slice(None, middle), slice(middle, None))]
  parts = [forward(q, k, v, meta, key_meta) for k, v, key_meta in halves]
  out, lse = flash_attention.merge(*parts[0], *parts[1])
  np.testing.assert_allclose(out, want_out, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)

  offset = offset_of(out, lse, d_out, d_lse)
  (dq1, dk1, dv1), (dq2, dk2, dv2) = (
      backward(q, k, v, meta, key_meta, lse, d_out, offset)
      for k, v, key_meta in halves)
  got = (
      dq1 + dq2, jnp.concatenate([dk1, dk2], 1), jnp.concatenate([dv1, dv2], 1))
  for one, value in zip(got, want):
    np.testing.assert_allclose(one, value, rtol=1e-5, atol=1e-5)


def check_blind_queries(forward, backward, *, row_len):
  """A query that sees nothing gives and gets no gradient."""
  # Queries of group 1 beside keys of group 0 and padding.
  half = row_len // 2
  query = as_meta(numpy_attention.stack(
      numpy_attention.packed([half, half], row_len)))
  key = as_meta(numpy_attention.stack(
      numpy_attention.packed([half], row_len)))
  q, k, v, d_out = arrays(query, key, heads=(2, 1), head_size=16)
  out, lse = forward(q, k, v, query, key)
  np.testing.assert_array_equal(out[:, half:], 0.0)
  np.testing.assert_array_equal(lse[:, half:], -np.inf)
  offset = offset_of(out, lse, d_out, 0.0)
  dq, dk, dv = backward(q, k, v, query, key, lse, d_out, offset)
  np.testing.assert_array_equal(dq[:, half:], 0.0)
  louder = d_out.at[:, half:].multiply(10.0)
  _, dk_again, dv_again = backward(q, k, v, query, key, lse, louder, offset)
  np.testing.assert_array_equal(dk, dk_again)
  np.testing.assert_array_equal(dv, dv_again)


def check_skipped_blocks_are_not_read(forward, backward, *, row_len):
  """Were a skipped block computed and masked, NaN times 0 would show."""
  half = row_len // 2
  meta = as_meta(numpy_attention.stack(
      numpy_attention.packed([half, half], row_len)))
  q, k, v, d_out = arrays(meta, meta, heads=(2, 1), head_size=16)
  k, v = k.at[:, half:].set(jnp.nan), v.at[:, half:].set(jnp.nan)
  out, lse = forward(q, k, v, meta, meta)
  assert np.all(np.isfinite(out[:, :half]))
  assert np.all(np.isnan(out[:, half:]))
  gradients = backward(
      q, k, v, meta, meta, lse, d_out, offset_of(out, lse, d_out, 0.0))
  for gradient in gradients:
    assert np.all(np.isfinite(gradient[:, :half]))


def check_bfloat16(forward, backward, meta, *, heads, head_size):
  """As close to float32 as the rounding of weights explains."""
  q, k, v, d_out = arrays(
      meta, meta, heads=heads, head_size=head_size, dtype=jnp.bfloat16)
  want_out, want_lse, want = reference(
      *(x.astype(jnp.float32) for x in (q, k, v)), meta, meta,
      d_out.astype(jnp.float32), jnp.zeros(q.shape[:3]))
  out, lse = forward(q, k, v, meta, meta)
  assert out.dtype == jnp.bfloat16
  gradients = backward(
      q, k, v, meta, meta, lse, d_out, offset_of(out, lse, d_out, 0.0))
  # Scores are exact products summed in float32; weights and d_scores are
  # rounded to 8 bits, 2**-8, before they are multiplied, and so is `out`.
  np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
      out.astype(jnp.float32), want_out, rtol=2**-7, atol=2**-7)
  for got, value in zip(gradients, want):
    assert got.dtype == jnp.float32
    error = jnp.linalg.norm(got - value) / jnp.linalg.norm(value)
    assert error < 2**-7

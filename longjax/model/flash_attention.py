"""Blockwise attention in plain XLA: memory linear in length, on any platform.

Forward: FlashAttention-2 (arXiv:2307.08691), Algorithm 1: each block of
queries keeps a running maximum, sum and output while it visits key blocks.
Backward: Algorithm 2, from the saved output and log-sum-exp.

We differ in what is visited. The mask is not causal order but
`rows.visible`, so each query block first lists the key blocks whose ranges of
group, branch and position overlap its own, and loops over that list only; the
length of the loop is data, so skipped blocks cost nothing at run time but
their entry in the lists: one integer for each pair of blocks of a row. Rows
are visited one after another: under `vmap` the loops of all rows would run as
long as the longest.

B rows, T query positions, S key positions, N query heads, K key/value heads,
H head size, J = N / K query heads per key head, C tokens a block, X query
blocks, Y key blocks. Inside a row, heads lead and the J query heads of one key
head are stacked along the tokens, so that scores are K plain matrix products:
q f[X, K, J * C, H], k and v f[Y, K, C, H].
"""

import functools

import chex
import jax
import jax.numpy as jnp

from longjax import rows

_LOWEST = float(jnp.finfo(jnp.float32).min)


def forward(
    q: jax.Array,  # f[B, T, N, H]
    k: jax.Array,  # f[B, S, K, H]
    v: jax.Array,  # f[B, S, K, H]
    query_meta: rows.TokenMeta,  # i32[B, T]
    key_meta: rows.TokenMeta,  # i32[B, S]
    *,
    block_len: int,
) -> tuple[jax.Array, jax.Array]:  # f[B, T, N, H], f32[B, T, N]
  """Output and log-sum-exp of attention to these keys."""
  row = functools.partial(_forward_row, block_len=block_len)
  return jax.lax.map(
      lambda one: row(*one), (q, k, v, query_meta, key_meta))


def backward(
    q: jax.Array,  # f[B, T, N, H]
    k: jax.Array,  # f[B, S, K, H]
    v: jax.Array,  # f[B, S, K, H]
    query_meta: rows.TokenMeta,  # i32[B, T]
    key_meta: rows.TokenMeta,  # i32[B, S]
    lse: jax.Array,  # f32[B, T, N]
    d_out: jax.Array,  # f[B, T, N, H]
    offset: jax.Array,  # f32[B, T, N]
    *,
    block_len: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients through attention to some of the keys that queries see.

  Args:
    q: queries.
    k: keys.
    v: values.
    query_meta: who the queries are.
    key_meta: who the keys are.
    lse: log-sum-exp over *all* keys a query sees, not only these; -inf where
      it sees none, which gives no gradient.
    d_out: gradient of the output over all keys.
    offset: sum_h out * d_out minus the gradient of `lse`: with weights p,
      d score = p * (d_out . v - offset).
    block_len: tokens of a block.

  Returns:
    Gradients of q, k and v, float32: the caller adds up parts.
  """
  row = functools.partial(_backward_row, block_len=block_len)
  return jax.lax.map(
      lambda one: row(*one),
      (q, k, v, query_meta, key_meta, lse, d_out, offset))


def merge(
    out1: jax.Array,  # f[..., H]
    lse1: jax.Array,  # f32[...]
    out2: jax.Array,  # f[..., H]
    lse2: jax.Array,  # f32[...]
) -> tuple[jax.Array, jax.Array]:  # f[..., H], f32[...]
  """Attention over the union of two disjoint sets of keys.

  Where neither side saw a key the result is again 0 and -inf.
  """
  chex.assert_equal_shape([out1, out2])
  chex.assert_shape([lse1, lse2], out1.shape[:-1])
  top = jnp.maximum(lse1, lse2)
  top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
  weight1 = jnp.exp(lse1 - top)
  weight2 = jnp.exp(lse2 - top)
  total = weight1 + weight2
  sees_any = total > 0.0
  safe = jnp.where(sees_any, total, 1.0)
  out = (
      out1.astype(jnp.float32) * (weight1 / safe)[..., None]
      + out2.astype(jnp.float32) * (weight2 / safe)[..., None]
  )
  lse = jnp.where(sees_any, jnp.log(safe) + top, -jnp.inf)
  return out.astype(out1.dtype), lse


def meeting_blocks(
    query_meta: rows.TokenMeta,  # i32[T]
    key_meta: rows.TokenMeta,  # i32[S]
    *,
    block_len: int,
) -> jax.Array:  # bool[X, Y]
  """True where a block of queries may see something in a block of keys.

  Decided from the smallest and largest group, branch and position over the
  tokens of a block's first group, and over those of groups after it. Never
  False for a visible pair; may be True for blocks without one, e.g. when a
  block holds several branches. A block in which one group ends and the next
  begins meets what these two meet, and not the whole row.
  """
  query = jax.tree.map(
      lambda x: x[:, None, :, None], _ranges(_blocks(query_meta, block_len)))
  key = jax.tree.map(
      lambda x: x[None, :, None], _ranges(_blocks(key_meta, block_len)))

  def overlap(a, b):
    return (a[0] <= b[1]) & (b[0] <= a[1])

  is_prefix = key.branch[0] == 0
  is_past = key.position[0] <= query.position[1]
  meets = (
      overlap(query.group, key.group)
      & (is_prefix | overlap(query.branch, key.branch))
      & is_past
  )
  return jnp.any(meets, axis=(2, 3))


def num_executed_blocks(
    query_meta: rows.TokenMeta,  # i32[B, T]
    key_meta: rows.TokenMeta,  # i32[B, S]
    *,
    block_len: int,
) -> jax.Array:  # i32[B]
  """Block pairs computed for each row; ceil(T / C) * ceil(S / C) at most."""
  meets = jax.vmap(
      functools.partial(meeting_blocks, block_len=block_len)
  )(query_meta, key_meta)
  return jnp.sum(meets, axis=(1, 2))


def _blocks(meta: rows.TokenMeta, block_len: int) -> rows.TokenMeta:
  """i32[T] -> i32[X, C], the last block filled up with padding."""
  extra = -meta.group.shape[0] % block_len

  def split(x, fill):
    return jnp.pad(x, (0, extra), constant_values=fill).reshape(-1, block_len)

  return rows.TokenMeta(
      group=split(meta.group, -1),
      branch=split(meta.branch, 0),
      position=split(meta.position, 0),
  )


def _ranges(blocks: rows.TokenMeta) -> rows.TokenMeta:
  """(smallest, largest) i32[X, 2] of each field: first group, those after it.

  Padding belongs to neither. Where there are no tokens the range is empty and
  overlaps nothing.
  """
  is_token = blocks.group >= 0
  info = jnp.iinfo(jnp.int32)
  first = jnp.min(
      blocks.group, axis=1, where=is_token, initial=info.max, keepdims=True)
  is_first = blocks.group == first
  among = jnp.stack([is_token & is_first, is_token & ~is_first], axis=1)

  def one(x):
    return (
        jnp.min(x[:, None], axis=2, where=among, initial=info.max),
        jnp.max(x[:, None], axis=2, where=among, initial=info.min),
    )

  return jax.tree.map(one, blocks)


def _split(
    x: jax.Array,  # f[T, N, ...]
    kv_heads: int,
    block_len: int,
) -> jax.Array:  # f[X, K, J * C, ...]
  """Cuts a row into blocks, heads first."""
  extra = -x.shape[0] % block_len
  x = jnp.pad(x, ((0, extra),) + ((0, 0),) * (x.ndim - 1))
  x = x.reshape(-1, block_len, kv_heads, x.shape[1] // kv_heads, *x.shape[2:])
  x = jnp.moveaxis(x, 1, 3)  # f[X, K, J, C, ...]
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _join(
    x: jax.Array,  # f[X, K, J * C, ...]
    length: int,
    block_len: int,
) -> jax.Array:  # f[T, N, ...]
  """Undoes `_split`."""
  x = x.reshape(*x.shape[:2], -1, block_len, *x.shape[3:])
  x = jnp.moveaxis(x, 3, 1)  # f[X, C, K, J, ...]
  x = x.reshape(-1, x.shape[2] * x.shape[3], *x.shape[4:])
  return x[:length]


def _meeting_lists(query_meta, key_meta, block_len):
  """For each query block its key blocks, i32[X, Y], and their number."""
  meets = meeting_blocks(query_meta, key_meta, block_len=block_len)
  order = jnp.argsort(~meets, axis=1, stable=True)
  return order, jnp.sum(meets, axis=1)


def _scores(q, k, query_block, key_block):
  """Scaled scores f32[K, J * C, C] and who is visible, bool[1, J * C, C]."""
  scores = jnp.einsum(
      'kqh,ksh->kqs', q, k, preferred_element_type=jnp.float32)
  is_visible = rows.visible(query_block, key_block)  # bool[C, C]
  stacked = q.shape[1] // is_visible.shape[0]
  return scores * q.shape[-1] ** -0.5, jnp.tile(is_visible, (stacked, 1))[None]


def _at(tree, index):
  """Entry `index` of the leading dimension of every leaf."""
  return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _forward_row(q, k, v, query_meta, key_meta, *, block_len):
  """One row: f[T, N, H], f[S, K, H] twice -> f[T, N, H], f32[T, N]."""
  length, kv_heads = q.shape[0], k.shape[1]
  order, counts = _meeting_lists(query_meta, key_meta, block_len)
  keys = (
      _split(k, kv_heads, block_len),
      _split(v, kv_heads, block_len),
      _blocks(key_meta, block_len),
  )

  def query_block(args):
    q, query_block, order, count = args

    def visit(i, carry):
      out, total, top = carry
      k, v, key_block = _at(keys, order[i])
      scores, is_visible = _scores(q, k, query_block, key_block)
      new_top = jnp.maximum(
          top, jnp.max(scores, axis=2, where=is_visible, initial=_LOWEST))
      weights = jnp.where(is_visible, jnp.exp(scores - new_top[..., None]), 0.0)
      scale = jnp.exp(top - new_top)
      out = out * scale[..., None] + jnp.einsum(
          'kqs,ksh->kqh', weights.astype(v.dtype), v,
          preferred_element_type=jnp.float32)
      return out, total * scale + jnp.sum(weights, axis=2), new_top

    zeros = jnp.zeros(q.shape[:2], jnp.float32)
    out, total, top = jax.lax.fori_loop(
        0, count, visit,
        (jnp.zeros(q.shape, jnp.float32), zeros, zeros + _LOWEST))
    sees_any = total > 0.0
    total = jnp.where(sees_any, total, 1.0)
    lse = jnp.where(sees_any, jnp.log(total) + top, -jnp.inf)
    return (out / total[..., None]).astype(q.dtype), lse

  out, lse = jax.lax.map(query_block, (
      _split(q, kv_heads, block_len),
      _blocks(query_meta, block_len), order, counts))
  return _join(out, length, block_len), _join(lse, length, block_len)


def _backward_row(
    q, k, v, query_meta, key_meta, lse, d_out, offset, *, block_len
):
  """Gradients of one row: f[T, N, H], f[S, K, H] twice."""
  length, key_len, kv_heads = q.shape[0], k.shape[0], k.shape[1]
  order, counts = _meeting_lists(query_meta, key_meta, block_len)
  k_blocks = _split(k, kv_heads, block_len)
  keys = (
      k_blocks, _split(v, kv_heads, block_len), _blocks(key_meta, block_len))
  lse = jnp.where(jnp.isfinite(lse), lse, 0.0)  # -inf: all pairs are hidden.
  scale = q.shape[2] ** -0.5

  def query_block(carry, args):
    q, d_out, lse, offset, query_block, order, count = args
    # Else the compiler may undo it where a row is a single block, and then
    # lack a product of bfloat16.
    q_columns, d_out_columns = jax.lax.optimization_barrier(
        (_columns(q), _columns(d_out)))

    def visit(i, carry):
      dq, dk, dv = carry
      k, v, key_block = _at(keys, order[i])
      scores, is_visible = _scores(q, k, query_block, key_block)
      weights = jnp.where(is_visible, jnp.exp(scores - lse[..., None]), 0.0)
      d_weights = jnp.einsum(
          'kqh,ksh->kqs', d_out, v, preferred_element_type=jnp.float32)
      d_scores = weights * (d_weights - offset[..., None]) * scale
      d_scores = d_scores.astype(q.dtype)
      dq += jnp.einsum(
          'kqs,ksh->kqh', d_scores, k, preferred_element_type=jnp.float32)
      dk = dk.at[order[i]].add(jnp.einsum(
          'khq,kqs->khs', q_columns, d_scores,
          preferred_element_type=jnp.float32))
      dv = dv.at[order[i]].add(jnp.einsum(
          'khq,kqs->khs', d_out_columns, weights.astype(d_out.dtype),
          preferred_element_type=jnp.float32))
      return dq, dk, dv

    dq, dk, dv = jax.lax.fori_loop(
        0, count, visit, (jnp.zeros(q.shape, jnp.float32), *carry))
    return (dk, dv), dq

  zeros = jnp.zeros(_columns(k_blocks).shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(query_block, (zeros, zeros), (
      _split(q, kv_heads, block_len),
      _split(d_out, kv_heads, block_len),
      _split(lse, kv_heads, block_len),
      _split(offset, kv_heads, block_len),
      _blocks(query_meta, block_len), order, counts))
  return (
      _join(dq, length, block_len),
      _join(_columns(dk), key_len, block_len),
      _join(_columns(dv), key_len, block_len),
  )


def _columns(x):
  """f[..., C, H] <-> f[..., H, C].

  A CPU multiplies matrices of which the first lies by rows two to four times as
  fast as one that lies by columns.
  """
  return jnp.swapaxes(x, -1, -2)

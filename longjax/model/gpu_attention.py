"""Attention over one block of keys on GPU: Pallas Triton kernels.

FlashAttention-2 (arXiv:2307.08691), Algorithms 1 and 2, under `rows.visible`.
The backward pass is given the log-sum-exp from outside, so the keys may be one
shard of many.

A program keeps one block of results: of queries for the output and dq, of keys
for dk and dv. It loops over the blocks of the other side that it meets, a list
made from data (`meeting_blocks`), first those that need no mask, then the
others. Blocks not in the list cost their place in it, one integer.

Checked in interpret mode, and compiled for an H100 and an A100 that were not
there; it has never run on a GPU. Block length and warps are not tuned.

B rows, T query positions, S key positions, N query heads, K key/value heads,
H head size, J = N / K, C tokens a block, X query blocks and Y key blocks of a
row. Lists are i32[B, X, Y] or [B, Y, X], metadata i32[3, B, T].
"""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from longjax import rows
from longjax.model import meeting_blocks as blocks


def why_not(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    *,
    block_len: int,
) -> str | None:
  """Why these shapes cannot run, in one line; None where they can.

  Args:
    q_shape: (B, T, N, H).
    k_shape: (B, S, K, H).
    dtype: of q, k and v.
    block_len: tokens a block.
  """
  del k_shape
  # Tensor cores multiply tiles of 16, and Triton's tensors are powers of two.
  for name, size in (('block_len', block_len), ('head size', q_shape[3])):
    if size < 16 or size & (size - 1):
      return f'{name} {size} is not a power of two from 16.'
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f'{jnp.dtype(dtype).name} is not bfloat16, float16 or float32.'
  return None


def forward(
    q: jax.Array,  # f[B, T, N, H]
    k: jax.Array,  # f[B, S, K, H]
    v: jax.Array,  # f[B, S, K, H]
    query_meta: rows.TokenMeta,  # i32[B, T]
    key_meta: rows.TokenMeta,  # i32[B, S]
    *,
    block_len: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # f[B, T, N, H], f32[B, T, N]
  """Softmax attention over these keys, scores scaled by 1 / sqrt(H).

  Args:
    q: queries.
    k: keys.
    v: values.
    query_meta: who the queries are.
    key_meta: who the keys are.
    block_len: tokens a block, a power of two.
    interpret: run the kernel as ordinary XLA operations, on any platform.

  Returns:
    The output in q's dtype and the log-sum-exp of the scaled scores. A query
    that sees no key gives 0 and -inf.

  Raises:
    ValueError: with the reason from `why_not`.
  """
  _check(q, k, v, query_meta, key_meta, block_len)
  length = q.shape[1]
  visits, counts = block_lists(query_meta, key_meta, block_len=block_len)
  q, k, v = (blocks.fill_up(x, block_len) for x in (q, k, v))
  num_rows, padded_len, num_heads, _ = q.shape
  specs = _query_block_specs(q.shape, k.shape, block_len)
  out, lse = pl.pallas_call(
      functools.partial(_forward_kernel, scale=blocks.score_scale(q.shape[3])),
      grid=(padded_len // block_len, num_heads, num_rows),
      in_specs=specs.inputs,
      out_specs=(specs.heads, specs.statistics),
      out_shape=(
          jax.ShapeDtypeStruct(q.shape, q.dtype),
          jax.ShapeDtypeStruct((num_rows, num_heads, padded_len), jnp.float32),
      ),
      compiler_params=_compiler_params(q),
      cost_estimate=_cost(q, k, num_matmuls=2),
      interpret=interpret,
      name='attention_forward',
  )(
      visits, counts, q, k, v,
      blocks.meta_rows(query_meta, block_len),
      blocks.meta_rows(key_meta, block_len),
  )
  return out[:, :length], jnp.swapaxes(lse, 1, 2)[:, :length]


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # f32[B, T, N, H], f32[B, S, K, H]
  """Gradients of q, k and v that pass through these keys.

  With weight = exp(score - lse) and d_score = weight * (d_out . v - offset),
  which is Algorithm 2 where offset = d_out . out - d_lse. Summed over disjoint
  sets of keys, the results are the gradients of attention over their union.

  Args:
    q: queries.
    k: keys.
    v: values.
    query_meta: who the queries are.
    key_meta: who the keys are.
    lse: log-sum-exp over every key a query sees, here or elsewhere. Where it
      is -inf the query gets no gradient and gives none.
    d_out: gradient of the output over all those keys.
    offset: see above.
    block_len: tokens a block, a power of two.
    interpret: run the kernels as ordinary XLA operations, on any platform.

  Returns:
    dq, dk and dv in float32, to be added up.

  Raises:
    ValueError: with the reason from `why_not`.
  """
  _check(q, k, v, query_meta, key_meta, block_len)
  chex.assert_equal_shape([q, d_out])
  chex.assert_shape([lse, offset], q.shape[:3])
  length, key_len = q.shape[1], k.shape[1]
  d_out = d_out.astype(q.dtype)
  q, k, v, d_out, lse, offset = (
      blocks.fill_up(x, block_len)
      for x in (q, k, v, d_out, lse, offset))
  # exp2(score - inf) is zero for every key.
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * math.log2(math.e))
  arrays = (
      q, k, v,
      blocks.meta_rows(query_meta, block_len),
      blocks.meta_rows(key_meta, block_len),
      d_out, jnp.swapaxes(lse, 1, 2), jnp.swapaxes(offset, 1, 2))
  num_rows, padded_len, num_heads, _ = q.shape
  _, padded_key_len, kv_heads, _ = k.shape

  specs = _query_block_specs(q.shape, k.shape, block_len)
  dq = pl.pallas_call(
      functools.partial(_dq_kernel, scale=blocks.score_scale(q.shape[3])),
      grid=(padded_len // block_len, num_heads, num_rows),
      in_specs=(
          *specs.inputs, specs.heads, specs.statistics, specs.statistics),
      out_specs=specs.heads,
      out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
      compiler_params=_compiler_params(q),
      cost_estimate=_cost(q, k, num_matmuls=3),
      interpret=interpret,
      name='attention_dq',
  )(*block_lists(query_meta, key_meta, block_len=block_len), *arrays)

  specs = _key_block_specs(q.shape, k.shape, block_len)
  dk, dv = pl.pallas_call(
      functools.partial(_dkv_kernel, scale=blocks.score_scale(q.shape[3])),
      grid=(padded_key_len // block_len, kv_heads, num_rows),
      in_specs=specs.inputs,
      out_specs=(specs.heads, specs.heads),
      out_shape=(jax.ShapeDtypeStruct(k.shape, jnp.float32),) * 2,
      compiler_params=_compiler_params(q),
      cost_estimate=_cost(q, k, num_matmuls=4),
      interpret=interpret,
      name='attention_dkv',
  )(
      *block_lists(query_meta, key_meta, block_len=block_len, by_key=True),
      *arrays)
  return dq[:, :length], dk[:, :key_len], dv[:, :key_len]


def block_lists(
    query_meta: rows.TokenMeta,  # i32[B, T]
    key_meta: rows.TokenMeta,  # i32[B, S]
    *,
    block_len: int,
    by_key: bool = False,
) -> tuple[jax.Array, jax.Array]:  # i32[B, X, Y], i32[B, X, 2]
  """For each block those it meets, and how many are full and meet.

  Args:
    query_meta: who the queries are.
    key_meta: who the keys are.
    block_len: tokens a block.
    by_key: list the query blocks of each key block, i32[B, Y, X] and
      i32[B, Y, 2].

  Returns:
    Indices of blocks, first those that need no mask, then others that meet,
    then the rest; and how many there are of the first, and of both.
  """
  meets, is_full = blocks.meets_and_full(
      query_meta, key_meta, block_len=block_len)
  if by_key:
    meets, is_full = (jnp.swapaxes(x, 1, 2) for x in (meets, is_full))
  order = jnp.argsort(
      jnp.where(is_full, 0, jnp.where(meets, 1, 2)), axis=2, stable=True)
  counts = jnp.stack([jnp.sum(x, axis=2) for x in (is_full, meets)], axis=2)
  return order.astype(jnp.int32), counts.astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Specs:
  """What a program sees: all inputs, and one block of its results."""

  inputs: tuple[pl.BlockSpec, ...]
  heads: pl.BlockSpec
  statistics: pl.BlockSpec | None = None


def _query_block_specs(q_shape, k_shape, block_len):
  """For a grid of query blocks, query heads and rows."""
  key_len, kv_heads, head_size = k_shape[1:]
  stacked = q_shape[2] // kv_heads
  heads = pl.BlockSpec(
      (None, block_len, None, head_size), lambda x, n, b: (b, x, n, 0))
  keys = pl.BlockSpec(
      (None, key_len, None, head_size), lambda x, n, b: (b, 0, n // stacked, 0))
  return _Specs(
      inputs=(
          *_list_specs(key_len // block_len),
          heads, keys, keys,
          pl.BlockSpec((3, None, block_len), lambda x, n, b: (0, b, x)),
          pl.BlockSpec((3, None, key_len), lambda x, n, b: (0, b, 0)),
      ),
      heads=heads,
      statistics=pl.BlockSpec(
          (None, None, block_len), lambda x, n, b: (b, n, x)),
  )


def _key_block_specs(q_shape, k_shape, block_len):
  """For a grid of key blocks, key heads and rows."""
  length, num_heads, head_size = q_shape[1:]
  stacked = num_heads // k_shape[2]
  heads = pl.BlockSpec(
      (None, block_len, None, head_size), lambda y, k, b: (b, y, k, 0))
  queries = pl.BlockSpec(
      (None, length, stacked, head_size), lambda y, k, b: (b, 0, k, 0))
  statistics = pl.BlockSpec(
      (None, stacked, length), lambda y, k, b: (b, k, 0))
  return _Specs(
      inputs=(
          *_list_specs(length // block_len),
          queries, heads, heads,
          pl.BlockSpec((3, None, length), lambda y, k, b: (0, b, 0)),
          pl.BlockSpec((3, None, block_len), lambda y, k, b: (0, b, y)),
          queries, statistics, statistics,
      ),
      heads=heads,
  )


def _list_specs(num_others):
  return (
      pl.BlockSpec((None, None, num_others), lambda x, n, b: (b, x, 0)),
      pl.BlockSpec((None, None, 2), lambda x, n, b: (b, x, 0)),
  )


def _forward_kernel(
    visits, counts, q, k, v, query, key,  # inputs
    out, lse,  # outputs
    *, scale,
):
  """Algorithm 1 for one query block and head."""
  block_len = q.shape[0]
  queries = q[...]
  query_block = _meta(query, slice(None))

  def visit(i, carry, *, is_full):
    out, total, top = carry
    at = _tokens(visits[i], block_len)
    scores = blocks.dot(queries, k[at], blocks.NT) * scale
    if not is_full:
      scores = _mask(scores, query_block, _meta(key, at))
    new_top = jnp.maximum(top, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - new_top[:, None])
    shrink = jnp.exp2(top - new_top)
    values = v[at]
    out = out * shrink[:, None] + blocks.dot(
        weights.astype(values.dtype), values, blocks.NN)
    return out, total * shrink + jnp.sum(weights, axis=1), new_top

  acc, total, top = _visit_all(counts, visit, (
      jnp.zeros(q.shape, jnp.float32),
      jnp.zeros(block_len, jnp.float32),
      jnp.full(block_len, blocks.LOWEST, jnp.float32)))
  sees_any = total > 0.0
  total = jnp.where(sees_any, total, 1.0)
  out[...] = (acc / total[:, None]).astype(out.dtype)
  lse[...] = jnp.where(
      sees_any, jnp.log(total) + top * math.log(2.0), -jnp.inf)


def _dq_kernel(
    visits, counts, q, k, v, query, key, d_out, lse, offset,  # inputs
    dq,  # output
    *, scale,
):
  """Algorithm 2, dq of one query block and head."""
  block_len = q.shape[0]
  of_queries = q[...], d_out[...], lse[...], offset[...]
  query_block = _meta(query, slice(None))

  def visit(i, dq, *, is_full):
    at = _tokens(visits[i], block_len)
    keys = k[at]
    _, d_scores = _weights(
        *of_queries, keys, v[at], query_block,
        None if is_full else _meta(key, at), scale)
    return dq + blocks.dot(d_scores.astype(keys.dtype), keys, blocks.NN)

  result = _visit_all(counts, visit, jnp.zeros(q.shape, jnp.float32))
  dq[...] = result * q.shape[1] ** -0.5


def _dkv_kernel(
    visits, counts, q, k, v, query, key, d_out, lse, offset,  # inputs
    dk, dv,  # outputs
    *, scale,
):
  """Algorithm 2, dk and dv of one key block and key head."""
  block_len = k.shape[0]
  keys, values = k[...], v[...]
  key_block = _meta(key, slice(None))

  def head(j, carry):

    def visit(i, carry, *, is_full):
      dk, dv = carry
      at = _tokens(visits[i], block_len)
      queries, d_outs = q[at, j], d_out[at, j]
      weights, d_scores = _weights(
          queries, d_outs, lse[j, at], offset[j, at], keys, values,
          _meta(query, at), None if is_full else key_block, scale)
      return (
          dk + blocks.dot(d_scores.astype(queries.dtype), queries, blocks.TN),
          dv + blocks.dot(weights.astype(d_outs.dtype), d_outs, blocks.TN),
      )

    return _visit_all(counts, visit, carry)

  zeros = jnp.zeros(k.shape, jnp.float32)
  dk_sum, dv_sum = jax.lax.fori_loop(0, q.shape[1], head, (zeros, zeros))
  dk[...] = dk_sum * k.shape[1] ** -0.5
  dv[...] = dv_sum


def _visit_all(counts, visit, carry):
  """Visits blocks that need no mask, then the others, in two loops."""
  num_full, num_meeting = counts[0], counts[1]
  carry = jax.lax.fori_loop(
      0, num_full, functools.partial(visit, is_full=True), carry)
  return jax.lax.fori_loop(
      num_full, num_meeting, functools.partial(visit, is_full=False), carry)


def _weights(
    queries, d_out, lse, offset, keys, values, query_block, key_block, scale
):
  """Weights and, but for `scale`, gradients of scores, f32[C, C] each."""
  scores = blocks.dot(queries, keys, blocks.NT) * scale
  if key_block is not None:
    scores = _mask(scores, query_block, key_block)
  weights = jnp.exp2(scores - lse[:, None])
  d_weights = blocks.dot(d_out, values, blocks.NT)
  return weights, weights * (d_weights - offset[:, None])


def _tokens(block, block_len):
  return pl.ds(block * block_len, block_len)


def _meta(ref, at):
  """i32[C] thrice, out of i32[3, tokens]."""
  return rows.TokenMeta(
      group=ref[0, at], branch=ref[1, at], position=ref[2, at])


def _mask(scores, query_block, key_block):
  return jnp.where(
      rows.visible(query_block, key_block), scores, blocks.INVISIBLE)


def _compiler_params(q):
  return pltriton.CompilerParams(
      num_warps=4 if q.shape[3] <= 64 else 8, num_stages=2)


def _cost(q, k, *, num_matmuls):
  # What runs is data. Half of all pairs is what causal order leaves.
  num_scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] // 2
  return pl.CostEstimate(
      flops=2 * num_matmuls * num_scores * q.shape[3],
      transcendentals=num_scores,
      bytes_accessed=2 * (q.size + k.size) * q.dtype.itemsize,
  )


def _check(q, k, v, query_meta, key_meta, block_len):
  blocks.check_shapes(q, k, v, query_meta, key_meta)
  reason = why_not(q.shape, k.shape, q.dtype, block_len=block_len)
  if reason is not None:
    raise ValueError(reason)

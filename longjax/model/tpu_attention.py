"""Attention over one block of keys on TPU: Pallas kernels of `rows.visible`.

FlashAttention-2 (arXiv:2307.08691), Algorithms 1 and 2. The backward pass is
given the log-sum-exp from outside, so the keys may be one shard of many.

What is visited is data. The pairs of a query block and a key block that can
meet (`flash_attention.meeting_blocks`) stand in one flat list, prefetched into
scalar memory, and the kernel's grid is as long as that list: a pair left out
costs nothing but its place in memory. A pair is one integer,

  bits 17..29  the block whose results stay in vector memory while the other
               changes: queries for the output and dq, keys for dk and dv
  bits  4..16  the other block
  bits  0.. 3  first and last pair of that result, whether the blocks meet,
               and whether every query of one sees every key of the other

so sorting the integers sorts the pairs. A block that meets none has one pair
that does not meet, because its zeros must be written too. Blocks that see each
other entirely skip the mask.

Scores are held transposed, keys by queries. Maxima and sums of the softmax
then reduce over sublanes and are rows along the lanes, so nothing is repeated
128 times and log-sum-exps travel as [heads, tokens]. The J query heads of a
key head share a step, which reads K, V and the mask once for all. Scores carry
a factor log2(e): exp2 is the exponential the hardware has.

B rows, T query positions, S key positions, N query heads, K key/value heads,
H head size, J = N / K, C tokens a block, X query blocks and Y key blocks of
all rows together. Kernels see queries f[K, J, X * C, H], keys f[K, Y * C, H],
statistics f32[K, J, X * C] and metadata i32[3, X * C] or [3, Y * C].
"""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longjax import rows
from longjax.model import meeting_blocks as blocks

_FIRST, _LAST, _MEETS, _FULL = 1, 2, 4, 8
_FLAG_BITS, _INDEX_BITS = 4, 13
# Scalar memory is 1 MiB; the compiler needs some of it.
_MAX_PAIRS = 250_000

# Each generation since v5 has 64 MiB of vector memory or more; a kernel gets 16
# unless it asks.
_VMEM_BYTES = 56 * 2**20


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
  num_rows, q_len, num_heads, head_size = q_shape
  key_len, kv_heads = k_shape[1:3]
  query_blocks, key_blocks = (
      num_rows * pl.cdiv(length, block_len) for length in (q_len, key_len))
  num_pairs = query_blocks * key_blocks // num_rows
  if block_len % 128:
    return f'block_len={block_len} is not a multiple of 128 lanes.'
  if head_size % 8:
    return f'head size {head_size} is not a multiple of 8 sublanes.'
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
    return f'{jnp.dtype(dtype).name} is neither bfloat16 nor float32.'
  item_bytes = jnp.dtype(dtype).itemsize
  if _vmem_bytes(num_heads // kv_heads, head_size, block_len, item_bytes) > (
      _VMEM_BYTES):
    return (
        f'blocks of {block_len} tokens for {num_heads // kv_heads} query heads '
        f'of {head_size} do not fit into vector memory; use smaller blocks.')
  if max(query_blocks, key_blocks) > 2**_INDEX_BITS:
    return (
        f'{max(query_blocks, key_blocks)} blocks of {block_len} tokens are '
        f'more than {2**_INDEX_BITS}; use larger blocks.')
  if num_pairs > _MAX_PAIRS:
    return (
        f'{num_pairs} pairs of blocks of {block_len} tokens do not fit into '
        f'scalar memory, {_MAX_PAIRS} do; use larger blocks or more shards.')
  return None


def _vmem_bytes(stacked, head_size, block_len, item_bytes):
  """What dq, the largest kernel, takes, within a few MiB."""
  lanes = -(-head_size // 128) * 128
  # q, d_out and dq, the next block of each being on its way meanwhile.
  windows = 2 * stacked * block_len * lanes * (2 * item_bytes + 4)
  # The mask and what of scores and weights does not fit into registers.
  return windows + 3 * 4 * block_len**2


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
    block_len: tokens a block, a multiple of 128.
    interpret: run the kernel as ordinary XLA operations, on any platform.

  Returns:
    The output in q's dtype and the log-sum-exp of the scaled scores. A query
    that sees no key gives 0 and -inf.

  Raises:
    ValueError: with the reason from `why_not`.
  """
  _check(q, k, v, query_meta, key_meta, block_len)
  queries = _query_heads(q, k.shape[2], block_len)
  _, stacked, _, head_size = queries.shape
  pairs, num_pairs = block_pairs(query_meta, key_meta, block_len=block_len)
  query, key = _specs(_kept, _other, stacked, head_size, block_len)
  out, lse = _call(
      functools.partial(_forward_kernel, scale=blocks.score_scale(head_size)),
      pairs, num_pairs,
      [
          (query.heads, queries),
          (key.heads, _key_heads(k, block_len)),
          (key.heads, _key_heads(v, block_len)),
          (query.meta, _meta_rows(query_meta, block_len)),
          (key.meta, _meta_rows(key_meta, block_len)),
      ],
      [
          (query.heads, jax.ShapeDtypeStruct(queries.shape, q.dtype)),
          (query.statistics, jax.ShapeDtypeStruct(
              queries.shape[:3], jnp.float32)),
      ],
      scratch=[
          pltpu.VMEM((stacked, head_size, block_len), jnp.float32),
          pltpu.VMEM((stacked, block_len), jnp.float32),
          pltpu.VMEM((stacked, block_len), jnp.float32),
          pltpu.VMEM((block_len, block_len), jnp.float32),
      ],
      num_matmuls=2, interpret=interpret)
  return _from_query_heads(out, q.shape), _from_statistics(lse, q.shape[:3])


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
    block_len: tokens a block, a multiple of 128.
    interpret: run the kernels as ordinary XLA operations, on any platform.

  Returns:
    dq, dk and dv in float32, to be added up.

  Raises:
    ValueError: with the reason from `why_not`.
  """
  _check(q, k, v, query_meta, key_meta, block_len)
  chex.assert_equal_shape([q, d_out])
  chex.assert_shape([lse, offset], q.shape[:3])
  kv_heads = k.shape[2]
  queries = _query_heads(q, kv_heads, block_len)
  keys = _key_heads(k, block_len)
  _, stacked, _, head_size = queries.shape
  # exp2(score - inf) is zero for every key.
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * math.log2(math.e))
  arrays = [
      queries, keys, _key_heads(v, block_len),
      _meta_rows(query_meta, block_len), _meta_rows(key_meta, block_len),
      _query_heads(d_out.astype(q.dtype), kv_heads, block_len),
      _query_statistics(lse, kv_heads, block_len),
      _query_statistics(offset, kv_heads, block_len),
  ]

  def specs(query, key):
    return [
        query.heads, key.heads, key.heads, query.meta, key.meta,
        query.heads, query.statistics, query.statistics]

  scratch = [pltpu.VMEM((block_len, block_len), jnp.float32)]
  scale = blocks.score_scale(head_size)
  query, key = _specs(_kept, _other, stacked, head_size, block_len)
  pairs, num_pairs = block_pairs(query_meta, key_meta, block_len=block_len)
  dq, = _call(
      functools.partial(_dq_kernel, scale=scale), pairs, num_pairs,
      list(zip(specs(query, key), arrays, strict=True)),
      [(query.transposed, jax.ShapeDtypeStruct(
          (kv_heads, stacked, head_size, queries.shape[2]), jnp.float32))],
      scratch=scratch, num_matmuls=3, interpret=interpret)

  query, key = _specs(_other, _kept, stacked, head_size, block_len)
  pairs, num_pairs = block_pairs(
      query_meta, key_meta, block_len=block_len, by_key=True)
  dk, dv = _call(
      functools.partial(_dkv_kernel, scale=scale), pairs, num_pairs,
      list(zip(specs(query, key), arrays, strict=True)),
      [(key.heads, jax.ShapeDtypeStruct(keys.shape, jnp.float32))] * 2,
      scratch=scratch, num_matmuls=4, interpret=interpret)
  # The kernels leave out the scale of d_score: here it is fused with a copy.
  scale = head_size ** -0.5
  return (
      _from_query_heads(jnp.swapaxes(dq, 2, 3), q.shape) * scale,
      _from_key_heads(dk, k.shape) * scale,
      _from_key_heads(dv, v.shape),
  )


def block_pairs(
    query_meta: rows.TokenMeta,  # i32[B, T]
    key_meta: rows.TokenMeta,  # i32[B, S]
    *,
    block_len: int,
    by_key: bool = False,
) -> tuple[jax.Array, jax.Array]:  # i32[P], i32[]
  """The list of pairs to visit, and how many of its entries count.

  Args:
    query_meta: who the queries are.
    key_meta: who the keys are.
    block_len: tokens a block.
    by_key: whether the results belong to blocks of keys, not of queries.

  Returns:
    Pairs as the module's docstring packs them, in order, and their number.
  """
  meets, is_full = blocks.meets_and_full(
      query_meta, key_meta, block_len=block_len)
  flags = jnp.where(meets, _MEETS, 0) | jnp.where(is_full, _FULL, 0)
  if by_key:
    flags = jnp.swapaxes(flags, 1, 2)
  num_rows, num_kept, num_other = flags.shape
  meets = flags & _MEETS > 0
  # A block that meets none keeps its first pair.
  visits = jnp.cumsum(
      meets.at[:, :, 0].max(~jnp.any(meets, axis=2)), axis=2)
  is_visited = jnp.diff(visits, axis=2, prepend=0) > 0
  flags |= jnp.where(visits == 1, _FIRST, 0)
  flags |= jnp.where(visits == visits[:, :, -1:], _LAST, 0)
  row = jnp.arange(num_rows)[:, None, None]
  kept = row * num_kept + jnp.arange(num_kept)[None, :, None]
  other = row * num_other + jnp.arange(num_other)[None, None, :]
  pairs = (((kept << _INDEX_BITS) | other) << _FLAG_BITS) | flags
  pairs = jnp.where(is_visited, pairs, jnp.iinfo(jnp.int32).max)
  return jnp.sort(pairs.reshape(-1)), jnp.sum(is_visited)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Specs:
  """How a kernel sees one block of each array of queries or of keys."""

  heads: pl.BlockSpec
  transposed: pl.BlockSpec
  statistics: pl.BlockSpec
  meta: pl.BlockSpec


def _kept(pair):
  return pair >> (_FLAG_BITS + _INDEX_BITS)


def _other(pair):
  return (pair >> _FLAG_BITS) & (2**_INDEX_BITS - 1)


def _specs(query_index, key_index, stacked, head_size, block_len):
  """`_Specs` of queries and of keys, given which half of a pair each is."""

  def specs(block, *stacked):
    zeros = (0,) * len(stacked)

    def spec(shape, *index):
      def index_map(head, step, pairs):
        place = {'head': head, 'block': block(pairs[step])}
        return tuple(place.get(i, i) for i in index)
      return pl.BlockSpec(shape, index_map)

    return _Specs(
        heads=spec((None, *stacked, block_len, head_size),
                   'head', *zeros, 'block', 0),
        transposed=spec((None, *stacked, head_size, block_len),
                        'head', *zeros, 0, 'block'),
        statistics=spec((None, *stacked, block_len),
                        'head', *zeros, 'block'),
        meta=spec((3, block_len), 0, 'block'),
    )

  return specs(query_index, stacked), specs(key_index)


def _call(
    kernel, pairs, num_pairs, inputs, outputs, *,
    scratch, num_matmuls, interpret,
):
  """Runs `kernel` for each key head and each pair of blocks."""
  in_specs, arrays = zip(*inputs, strict=True)
  out_specs, out_shape = zip(*outputs, strict=True)
  kv_heads, stacked, num_queries, head_size = arrays[0].shape
  num_keys = arrays[1].shape[1]
  # What runs is data. Half of all pairs is what causal order leaves.
  num_scores = kv_heads * stacked * num_queries * num_keys // 2
  return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(kv_heads, num_pairs),
          in_specs=in_specs,
          out_specs=out_specs,
          scratch_shapes=scratch,
      ),
      out_shape=out_shape,
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'),
          vmem_limit_bytes=_VMEM_BYTES,
      ),
      cost_estimate=pl.CostEstimate(
          flops=2 * num_matmuls * num_scores * head_size,
          transcendentals=num_scores,
          bytes_accessed=sum(
              x.size * x.dtype.itemsize for x in (*arrays, *out_shape)),
      ),
      interpret=interpret,
  )(pairs, *arrays)


def _forward_kernel(
    pairs, q, k, v, query, key,  # inputs
    out, lse,  # outputs
    acc, top, total, bias,  # scratch
    *, scale,
):
  """Algorithm 1: one key block more for one query block."""
  flags = pairs[pl.program_id(1)]
  num_heads = q.shape[0]

  @pl.when(flags & _FIRST > 0)
  def _():
    acc[...] = jnp.zeros(acc.shape, acc.dtype)
    top[...] = jnp.full(top.shape, blocks.LOWEST, top.dtype)
    total[...] = jnp.zeros(total.shape, total.dtype)

  def visit(scores_of):
    def head(j, _):
      row = pl.ds(j, 1)
      scores = scores_of(j)
      old_top = top[row]
      new_top = jnp.maximum(old_top, jnp.max(scores, axis=0, keepdims=True))
      weights = jnp.exp2(scores - new_top)
      shrink = jnp.exp2(old_top - new_top)
      top[row] = new_top
      total[row] = total[row] * shrink + jnp.sum(
          weights, axis=0, keepdims=True)
      acc[j] = acc[j] * shrink + blocks.dot(
          v[...], weights.astype(v.dtype), blocks.TN)

    jax.lax.fori_loop(0, num_heads, head, None)

  _visit(flags, visit, q, k, query, key, bias, scale)

  @pl.when(flags & _LAST > 0)
  def _():
    def head(j, _):
      row = pl.ds(j, 1)
      sees_any = total[row] > 0.0
      safe = jnp.where(sees_any, total[row], 1.0)
      out[j] = (acc[j] / safe).T.astype(out.dtype)
      lse[row] = jnp.where(
          sees_any, jnp.log(safe) + top[row] * math.log(2.0), -jnp.inf)

    jax.lax.fori_loop(0, num_heads, head, None)


def _dq_kernel(
    pairs, q, k, v, query, key, d_out, lse, offset,  # inputs
    dq,  # output
    bias,  # scratch
    *, scale,
):
  """Algorithm 2, dq: one key block more for one query block."""
  flags = pairs[pl.program_id(1)]

  @pl.when(flags & _FIRST > 0)
  def _():
    dq[...] = jnp.zeros(dq.shape, dq.dtype)

  def visit(scores_of):
    def head(j, _):
      _, d_scores = _weights(j, scores_of, v, d_out, lse, offset)
      dq[j] += blocks.dot(k[...], d_scores.astype(k.dtype), blocks.TN)

    jax.lax.fori_loop(0, q.shape[0], head, None)

  _visit(flags, visit, q, k, query, key, bias, scale)


def _dkv_kernel(
    pairs, q, k, v, query, key, d_out, lse, offset,  # inputs
    dk, dv,  # outputs
    bias,  # scratch
    *, scale,
):
  """Algorithm 2, dk and dv: one query block more for one key block."""
  flags = pairs[pl.program_id(1)]

  @pl.when(flags & _FIRST > 0)
  def _():
    dk[...] = jnp.zeros(dk.shape, dk.dtype)
    dv[...] = jnp.zeros(dv.shape, dv.dtype)

  def visit(scores_of):
    def head(j, _):
      weights, d_scores = _weights(j, scores_of, v, d_out, lse, offset)
      dv[...] += blocks.dot(weights.astype(d_out.dtype), d_out[j], blocks.NN)
      dk[...] += blocks.dot(d_scores.astype(q.dtype), q[j], blocks.NN)

    jax.lax.fori_loop(0, q.shape[0], head, None)

  _visit(flags, visit, q, k, query, key, bias, scale)


def _visit(flags, visit, q, k, query, key, bias, scale):
  """Calls `visit` with scores of a head, masked only where they must be."""

  def scores_of(j):
    return blocks.dot(k[...], q[j], blocks.NT) * scale  # f32[C keys, C queries]

  @pl.when(flags & _FULL > 0)
  def _():
    visit(scores_of)

  @pl.when(flags & (_MEETS | _FULL) == _MEETS)
  def _():
    columns = key[...].T
    k_group, k_branch, k_position = (columns[:, i:i + 1] for i in range(3))
    q_group, q_branch, q_position = (query[i:i + 1] for i in range(3))
    is_visible = (
        (k_group == q_group)
        & (k_group >= 0)
        & ((k_branch == 0) | (k_branch == q_branch))
        & (k_position <= q_position)
    )
    bias[...] = jnp.where(is_visible, 0.0, blocks.INVISIBLE)
    visit(lambda j: scores_of(j) + bias[...])


def _weights(j, scores_of, v, d_out, lse, offset):
  """Weights of head j and the gradient of its scores, f32[C, C] each."""
  row = pl.ds(j, 1)
  weights = jnp.exp2(scores_of(j) - lse[row])
  d_weights = blocks.dot(v[...], d_out[j], blocks.NT)
  return weights, weights * (d_weights - offset[row])


def _check(q, k, v, query_meta, key_meta, block_len):
  blocks.check_shapes(q, k, v, query_meta, key_meta)
  reason = why_not(q.shape, k.shape, q.dtype, block_len=block_len)
  if reason is not None:
    raise ValueError(reason)


def _end_to_end(
    x: jax.Array,  # [B, T, ...]
    block_len: int,
) -> jax.Array:  # [X * C, ...]
  """Rows of whole blocks, one after another."""
  x = blocks.fill_up(x, block_len)
  return x.reshape(-1, *x.shape[2:])


def _meta_rows(meta, block_len):
  """i32[B, T] thrice -> i32[3, X * C]."""
  return blocks.meta_rows(meta, block_len).reshape(3, -1)


def _key_heads(x, block_len):
  """f[B, S, K, H] -> f[K, Y * C, H]."""
  return jnp.swapaxes(_end_to_end(x, block_len), 0, 1)


def _from_key_heads(x, shape):
  """Undoes `_key_heads` for an array of `shape`."""
  num_rows, length = shape[:2]
  x = jnp.swapaxes(x, 0, 1).reshape(num_rows, -1, *shape[2:])
  return x[:, :length]


def _query_heads(x, kv_heads, block_len):
  """f[B, T, N, H] -> f[K, J, X * C, H]."""
  x = _key_heads(x, block_len)
  return x.reshape(kv_heads, -1, *x.shape[1:])


def _from_query_heads(x, shape):
  """Undoes `_query_heads` for an array of `shape`."""
  return _from_key_heads(x.reshape(-1, *x.shape[2:]), shape)


def _query_statistics(x, kv_heads, block_len):
  """f32[B, T, N] -> f32[K, J, X * C]."""
  x = _end_to_end(x, block_len).T
  return x.reshape(kv_heads, -1, x.shape[1])


def _from_statistics(x, shape):
  """Undoes `_query_statistics` for an array of `shape`."""
  num_rows, length, num_heads = shape
  x = x.reshape(num_heads, -1).T.reshape(num_rows, -1, num_heads)
  return x[:, :length]

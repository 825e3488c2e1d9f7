"""What the attention kernels of all platforms share.

Which pairs of a query block and a key block to visit, which of them need no
mask, arrays filled up to whole blocks, and products of blocks.

B rows, T query positions, S key positions, C tokens a block, X = ceil(T / C)
query blocks, Y = ceil(S / C) key blocks of a row.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp

from longjax import rows
from longjax.model import flash_attention

# Finite stand-ins for -inf. What is invisible is so far below any running
# maximum that its weight, exp2 of the difference, is exactly zero, even where
# no key has been seen yet.
INVISIBLE = -3e38
LOWEST = -1e30

# Which dimensions `dot` contracts, of x and of y.
NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


def dot(
    x: jax.Array, y: jax.Array, dimension_numbers: jax.lax.DotDimensionNumbers
) -> jax.Array:
  """Matrix product in the operands' precision, summed in float32."""
  # Never None: that is jax's default, and kernels of bfloat16 fail to compile
  # where a user has set it to 'highest'.
  precision = jax.lax.Precision
  return jax.lax.dot_general(
      x, y, dimension_numbers,
      precision=(
          precision.HIGHEST if x.dtype == jnp.float32 else precision.DEFAULT),
      preferred_element_type=jnp.float32)


def score_scale(head_size: int) -> float:
  """Of scores whose weights are taken by exp2, the hardware's exponential."""
  return head_size**-0.5 * math.log2(math.e)


def meets_and_full(
    query_meta: rows.TokenMeta,  # i32[B, T]
    key_meta: rows.TokenMeta,  # i32[B, S]
    *,
    block_len: int,
) -> tuple[jax.Array, jax.Array]:  # bool[B, X, Y] twice
  """Where some query may see some key, and where each sees every one.

  The first is `flash_attention.meeting_blocks`. The second holds for blocks of
  one group without padding whose keys are all prefix, or of the same branch as
  all queries, and all past.
  """
  meets = jax.vmap(functools.partial(
      flash_attention.meeting_blocks, block_len=block_len))

  def ranges(meta, axis):
    blocks = meta_rows(meta, block_len)
    blocks = blocks.reshape(*blocks.shape[:2], -1, block_len)
    first, last = jnp.min(blocks, axis=3), jnp.max(blocks, axis=3)
    return (
        rows.TokenMeta(*jnp.expand_dims(first, axis)),
        rows.TokenMeta(*jnp.expand_dims(last, axis)),
    )

  query, query_end = ranges(query_meta, 3)
  key, key_end = ranges(key_meta, 2)

  def is_same(field):
    value = getattr(key, field)
    return (
        (value == getattr(key_end, field))
        & (value == getattr(query, field))
        & (value == getattr(query_end, field)))

  is_prefix = (key.branch == 0) & (key_end.branch == 0)
  full = (
      is_same('group')
      & (key.group >= 0)
      & (is_prefix | is_same('branch'))
      & (key_end.position <= query.position)
  )
  return meets(query_meta, key_meta), full


def meta_rows(
    meta: rows.TokenMeta,  # i32[B, T]
    block_len: int,
) -> jax.Array:  # i32[3, B, X * C]
  """Group, branch and position, filled up with padding."""
  return jnp.stack([
      fill_up(meta.group, block_len, value=-1),
      fill_up(meta.branch, block_len),
      fill_up(meta.position, block_len),
  ])


def fill_up(
    x: jax.Array,  # [B, T, ...]
    block_len: int,
    *,
    value: int = 0,
) -> jax.Array:  # [B, X * C, ...]
  """Adds tokens of `value` until every row is made of whole blocks."""
  extra = -x.shape[1] % block_len
  return jnp.pad(
      x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2),
      constant_values=value)


def check_shapes(
    q: jax.Array,  # f[B, T, N, H]
    k: jax.Array,  # f[B, S, K, H]
    v: jax.Array,  # f[B, S, K, H]
    query_meta: rows.TokenMeta,  # i32[B, T]
    key_meta: rows.TokenMeta,  # i32[B, S]
) -> None:
  """Asserts that the arguments of attention fit together."""
  dims = chex.Dimensions()
  dims['BTNH'] = q.shape
  dims['BSKH'] = k.shape
  chex.assert_shape(q, dims['BTNH'])
  chex.assert_shape(v, dims['BSKH'])
  chex.assert_shape(jax.tree.leaves(query_meta), dims['BT'])
  chex.assert_shape(jax.tree.leaves(key_meta), dims['BS'])

"""Attention over rows of groups and branches, one contract for all backends.

`rows.visible` decides who sees whom. Every backend returns the log-sum-exp of
the scores beside the output, so partial results over disjoint keys `merge`.

B rows, T query positions, S key positions, N query heads, K key/value heads,
H head size. Query head n reads key/value head n // (N / K).
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from longjax import rows
from longjax.model import flash_attention
from longjax.parallel import rules as rules_lib

Backend = Literal['reference', 'blockwise']


def attention(
    q: jax.Array,  # f[B, T, N, H]
    k: jax.Array,  # f[B, S, K, H]
    v: jax.Array,  # f[B, S, K, H]
    query_meta: rows.TokenMeta,  # i32[B, T]
    key_meta: rows.TokenMeta,  # i32[B, S]
    *,
    backend: Backend = 'blockwise',
    block_len: int = flash_attention.BLOCK_LEN,
    rules: rules_lib.Rules | None = None,
) -> tuple[jax.Array, jax.Array]:  # f[B, T, N, H], f32[B, T, N]
  """Softmax attention, scores scaled by 1 / sqrt(H), softmax in float32.

  Args:
    q: queries.
    k: keys.
    v: values.
    query_meta: who the queries are.
    key_meta: who the keys are.
    backend: 'reference' holds all T * S scores; 'blockwise' holds one block
      of them and skips blocks that cannot meet.
    block_len: tokens a block of 'blockwise'.
    rules: where rows and heads live; None means on one device. 'blockwise'
      loops over rows, so under a mesh it must know which are its own.

  Returns:
    The output in q's dtype and the log-sum-exp of the scaled scores. A query
    that sees no key gives 0 and -inf, and passes on zero gradients.
  """
  dims = chex.Dimensions()
  dims['BTNH'] = q.shape
  dims['BSKH'] = k.shape
  chex.assert_shape(q, dims['BTNH'])
  chex.assert_shape(v, dims['BSKH'])
  chex.assert_shape(jax.tree.leaves(query_meta), dims['BT'])
  chex.assert_shape(jax.tree.leaves(key_meta), dims['BS'])
  if q.shape[2] % k.shape[2]:
    raise ValueError(
        f'{q.shape[2]} query heads do not share {k.shape[2]} key heads.')
  if backend == 'reference':
    return _reference(q, k, v, query_meta, key_meta)
  if backend == 'blockwise':
    return flash_attention.attention(
        q, k, v, query_meta, key_meta, block_len=block_len, rules=rules)
  raise ValueError(f'backend={backend!r} is neither reference nor blockwise.')


def _reference(q, k, v, query_meta, key_meta):
  """All scores at once: short, and the yardstick of the other backends."""
  kv_heads = k.shape[2]
  q_grouped = q.reshape(*q.shape[:2], kv_heads, -1, q.shape[3])
  scores = jnp.einsum(
      'btkgh,bskh->bkgts', q_grouped, k,
      preferred_element_type=jnp.float32) * q.shape[3] ** -0.5
  is_visible = rows.visible(query_meta, key_meta)[:, None, None]
  # A finite stand-in for -inf: -inf - -inf is NaN, in the gradient too.
  lowest = jnp.finfo(jnp.float32).min
  top = jax.lax.stop_gradient(
      jnp.max(scores, axis=-1, where=is_visible, initial=lowest, keepdims=True))
  weights = jnp.exp(jnp.where(is_visible, scores - top, 0.0))
  weights = jnp.where(is_visible, weights, 0.0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  sees_any = total > 0.0
  total = jnp.where(sees_any, total, 1.0)
  out = jnp.einsum(
      'bkgts,bskh->btkgh', (weights / total).astype(v.dtype), v,
      preferred_element_type=jnp.float32)
  lse = jnp.where(sees_any, jnp.log(total) + top, -jnp.inf)[..., 0]
  lse = jnp.moveaxis(lse, 3, 1)  # f32[B, T, K, N/K]
  return (
      out.reshape(q.shape).astype(q.dtype),
      lse.reshape(q.shape[:3]),
  )


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

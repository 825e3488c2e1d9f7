"""Attention over rows of groups and branches, one contract for all backends.

`rows.visible` decides who sees whom. Every backend returns the log-sum-exp of
the scores beside the output, so partial results over disjoint keys merge.

B rows, T query positions, S key positions, N query heads, K key/value heads,
H head size. Query head n reads key/value head n // (N / K).
"""

import functools
import math
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from absl import logging

from longjax import rows, types
from longjax.model import context_parallel as context_parallel_lib
from longjax.model import flash_attention, gpu_attention, tpu_attention
from longjax.parallel import rules as rules_lib
from longjax.parallel import token_order

Backend = Literal['auto', 'reference', 'blockwise', 'tpu', 'gpu']
ContextParallel = Literal['auto', 'ring', 'all_gather', 'merge']

_BLOCK_BACKENDS: dict[str, Any] = {
    'blockwise': flash_attention,
    'tpu': tpu_attention,
    'gpu': gpu_attention,
}
_BY_PLATFORM = {'cpu': 'blockwise', 'tpu': 'tpu', 'gpu': 'gpu'}

# Tokens of a block by platform. On two CPU cores 64 is the fastest of 32 to
# 256 at 512 to 2,048 tokens: what is skipped outweighs larger products.
_BLOCK_LEN = {'cpu': 64, 'tpu': 512, 'gpu': 64}


def attention(
    q: jax.Array,  # f[B, T, N, H]
    k: jax.Array,  # f[B, S, K, H]
    v: jax.Array,  # f[B, S, K, H]
    query_meta: rows.TokenMeta,  # i32[B, T]
    key_meta: rows.TokenMeta,  # i32[B, S]
    *,
    backend: Backend = 'auto',
    block_len: int = 0,
    context_parallel: ContextParallel = 'auto',
    is_dealt: bool = True,
    rules: rules_lib.Rules | None = None,
) -> tuple[jax.Array, jax.Array]:  # f[B, T, N, H], f32[B, T, N]
  """Softmax attention, scores scaled by 1 / sqrt(H), softmax in float32.

  Args:
    q: queries.
    k: keys.
    v: values.
    query_meta: who the queries are.
    key_meta: who the keys are.
    backend: 'reference' holds all T * S scores. The others hold one block of
      them and skip blocks that cannot meet: 'blockwise' runs anywhere, 'tpu'
      and 'gpu' are kernels. 'auto' takes the platform's.
    block_len: tokens of a block; 0 takes the platform's.
    context_parallel: how keys travel where tokens are split; see
      `context_parallel`. 'reference' leaves that to the compiler.
    is_dealt: tokens stand as `order` says, so blocks are those it dealt out;
      else blocks are as long as suits the platform.
    rules: where rows, tokens and heads live; None means on one device.

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
  if rules is not None:
    k, v = (_enough_heads(x, rules) for x in (k, v))
  chosen = settings(
      q, k, backend=backend, block_len=block_len, strategy=context_parallel,
      is_dealt=is_dealt, rules=rules)
  return context_parallel_lib.attend(
      q, k, v, query_meta, key_meta, chosen)


def to_cache(
    q: jax.Array,  # f[B, T, N, H]
    k: jax.Array,  # f[B, K, S, H]
    v: jax.Array,  # f[B, K, S, H]
    is_visible: jax.Array,  # bool[B, T, S]
) -> tuple[jax.Array, jax.Array]:  # f[B, T, N, H], f32[B, T, N]
  """Attention of a few queries to the keys of a cache; see `attention`.

  All scores are held at once. Where keys are split over devices, the compiler
  merges what each device finds for its own.
  """
  dims = chex.Dimensions()
  dims['BTNH'] = q.shape
  dims['BKSH'] = k.shape
  chex.assert_shape(v, dims['BKSH'])
  chex.assert_shape(is_visible, dims['BTS'])
  # The queries of one key head are rows of one matrix.
  rows_of_head = jnp.moveaxis(
      q.reshape(dims.B, dims.T, dims.K, -1, dims.H), 2, 1)
  scores = jnp.einsum(
      'bkmh,bksh->bkms', rows_of_head.reshape(dims.B, dims.K, -1, dims.H), k,
      preferred_element_type=jnp.float32) * dims.H ** -0.5
  scores = scores.reshape(dims.B, dims.K, dims.T, -1, dims.S)
  scores = jnp.where(
      is_visible[:, None, :, None], scores, jnp.finfo(jnp.float32).min)
  top = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  out = jnp.einsum(
      'bkms,bksh->bkmh',
      weights.astype(v.dtype).reshape(dims.B, dims.K, -1, dims.S), v,
      preferred_element_type=jnp.float32)
  sees_any = jnp.any(is_visible, axis=2)[:, None, :, None, None]
  out = out.reshape(*total.shape[:4], dims.H) / total
  out = jnp.where(sees_any, out, 0.0)
  lse = jnp.where(sees_any, jnp.log(total) + top, -jnp.inf)
  return (
      jnp.moveaxis(out, 1, 2).reshape(q.shape).astype(q.dtype),
      jnp.moveaxis(lse[..., 0], 1, 2).reshape(q.shape[:3]))


def order(
    meta: rows.TokenMeta,  # i32[B, T]
    *,
    block_len: int,
    rules: rules_lib.Rules,
) -> jax.Array | None:  # i32[B, X]
  """Order of a row's blocks that gives devices along `seq` equal work.

  Args:
    meta: who the tokens are, in any order.
    block_len: of `attention`.
    rules: the mesh.

  Returns:
    See `token_order.deal`; None if there is one device along `seq`.
  """
  num_devices = rules.size('seq')
  if num_devices == 1:
    return None
  rules.check('rows', meta.group.shape, 'batch', 'seq')
  size = _block_len(meta.group.shape[1], block_len, rules)
  meets = jax.vmap(functools.partial(
      flash_attention.meeting_blocks, block_len=size))(meta, meta)
  work = jnp.sum(meets, axis=2, dtype=jnp.int32)
  return token_order.deal(rules.constrain(work, 'batch', None), num_devices)


def _block_len(
    length: int, block_len: int, rules: rules_lib.Rules | None
) -> int:
  """Tokens of a block for rows of `length`; see `attention`."""
  platform = _platform(rules)
  block_len = block_len or _BLOCK_LEN[platform]
  num_devices = rules.size('seq') if rules else 1
  if num_devices == 1:
    return block_len
  # The blocks that are dealt out are those that attention skips by.
  return token_order.block_len(length, num_devices, max_len=block_len)


def _platform(rules: rules_lib.Rules | None) -> str:
  if rules is None:
    return jax.default_backend()
  return rules.mesh.devices.flat[0].platform


def _enough_heads(x: jax.Array, rules: rules_lib.Rules) -> jax.Array:
  """Repeats key heads until every device along `tensor` has one of its own."""
  num_heads, num_devices = x.shape[2], rules.size('kv_heads')
  copies = math.lcm(num_heads, num_devices) // num_heads
  return x if copies == 1 else jnp.repeat(x, copies, axis=2)


def settings(
    q: jax.Array | jax.ShapeDtypeStruct,  # f[B, T, N, H]
    k: jax.Array | jax.ShapeDtypeStruct,  # f[B, S, K, H]
    *,
    backend: Backend,
    block_len: int,
    strategy: ContextParallel,
    is_dealt: bool = True,
    rules: rules_lib.Rules | None,
) -> context_parallel_lib.Settings:
  """What 'auto' and 0 stand for, for arrays of these shapes.

  Raises:
    UserError: the backend asked for cannot run these shapes.
  """
  if backend != 'auto' and backend not in _BLOCK_BACKENDS:
    raise ValueError(
        f'backend={backend!r} is none of auto, reference, '
        f'{", ".join(_BLOCK_BACKENDS)}.')
  platform = _platform(rules)
  if is_dealt:
    block_len = _block_len(q.shape[1], block_len, rules)
  else:
    block_len = block_len or _BLOCK_LEN[platform]
  num_devices = rules.size('seq') if rules else 1
  if strategy == 'auto':
    strategy = (
        context_parallel_lib.choose(k.shape, k.dtype, rules)
        if rules and num_devices > 1 else 'ring')
  chosen = _BY_PLATFORM[platform] if backend == 'auto' else backend
  if chosen != 'blockwise':
    reason = _BLOCK_BACKENDS[chosen].why_not(
        *_local_shapes(q.shape, k.shape, strategy, rules), q.dtype,
        block_len=block_len)
    if reason and backend != 'auto':
      raise types.UserError(
          f'compute.attention={backend!r} cannot run here: {reason}')
    if reason:
      _say(f'Attention is blockwise, not {chosen!r}: {reason}')
      chosen = 'blockwise'
  over = f' over seq={num_devices} by {strategy}' if num_devices > 1 else ''
  if platform != 'cpu' or over:
    _say(f'Attention: {chosen}, blocks of {block_len} tokens{over}.')
  return context_parallel_lib.Settings(
      backend=_BLOCK_BACKENDS[chosen], block_len=block_len, strategy=strategy,
      rules=rules, is_interpreted=chosen not in ('blockwise', platform))


def _local_shapes(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    strategy: context_parallel_lib.Strategy,
    rules: rules_lib.Rules | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Shapes of the queries and keys that one device sees at a time."""
  if rules is None:
    return q_shape, k_shape

  def local(shape, heads, is_split):
    batch, length, num_heads, head_dim = shape
    seq = rules.size('seq') if is_split else 1
    return (batch // rules.size('batch'), length // seq,
            num_heads // rules.size(heads), head_dim)

  return (local(q_shape, 'heads', strategy != 'merge'),
          local(k_shape, 'kv_heads', strategy != 'all_gather'))


@functools.cache
def _say(text: str) -> None:
  """Logs a choice once."""
  logging.info(text)


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

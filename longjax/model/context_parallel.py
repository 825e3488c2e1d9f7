"""Attention over rows whose tokens are split over the mesh axis `seq`.

Every device holds some tokens' queries, keys and values, in any order, with
their group, branch and position. Three strategies, one contract:

  ring        keys, values and their metadata are passed on from device to
              device; outputs are merged by log-sum-exp (Ring Attention,
              arXiv:2310.01889). Memory is that of one device's tokens.
  all_gather  every device collects all keys and values first. Fewer, larger
              messages; memory grows with the row.
  merge       every device collects all queries, attends to its own keys, and
              outputs are merged by log-sum-exp. For queries much fewer than
              keys: a chunk of a long prompt.

All are built on a block backend's `forward` and `backward`, the latter with
an external log-sum-exp, and have a backward pass of their own: gradients of
keys and values travel around the ring with them and end at home, or are
summed and scattered, as those of queries are that travelled.

A step of the ring first sends what the next one needs and computes after,
so that the network and the matrix units work at the same time.

B rows, T positions, S key positions, N query heads, K key/value heads, H head
size; all are one device's inside `shard_map`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longjax import rows
from longjax.model import compute, flash_attention
from longjax.parallel import rules as rules_lib

Strategy = Literal['ring', 'all_gather', 'merge']

# K and V of all tokens of a device's rows; more is passed around a ring.
_MAX_GATHERED_BYTES = 512 * 1024**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What is static: hashable, for `custom_vjp`.

  Attributes:
    backend: a module with `forward` and `backward`, see `flash_attention`.
    block_len: tokens of its blocks.
    strategy: see the module's docstring; means nothing if `seq` is 1.
    rules: where rows, tokens and heads live; None means on one device.
    is_interpreted: the backend is a kernel for another platform, run as
      ordinary operations; for tests.
  """

  backend: Any
  block_len: int
  strategy: Strategy
  rules: rules_lib.Rules | None
  is_interpreted: bool = False

  @property
  def options(self) -> dict[str, Any]:
    """What the backend's functions are called with."""
    interpret = {'interpret': True} if self.is_interpreted else {}
    return {'block_len': self.block_len} | interpret


def choose(
    key_shape: tuple[int, ...],  # [B, S, K, H], of all devices
    dtype: jax.typing.DTypeLike,
    rules: rules_lib.Rules,
) -> Strategy:
  """'all_gather' while a device can hold all keys and values of its rows."""
  shards = rules.size('batch') * rules.size('kv_heads')
  size = 2 * jnp.dtype(dtype).itemsize
  for n in key_shape:
    size *= n
  return 'all_gather' if size <= shards * _MAX_GATHERED_BYTES else 'ring'


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    q: jax.Array,  # f[B, T, N, H]
    k: jax.Array,  # f[B, S, K, H]
    v: jax.Array,  # f[B, S, K, H]
    query_meta: rows.TokenMeta,  # i32[B, T]
    key_meta: rows.TokenMeta,  # i32[B, S]
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:  # f[B, T, N, H], f32[B, T, N]
  """Attention of all queries to all keys; see `attention.attention`."""
  local = functools.partial(_local_forward, settings=settings)
  return _on_each_device(
      local, (q, k, v, query_meta, key_meta), 'qkkmm', 'ql', settings.rules)


def _attend_forward(q, k, v, query_meta, key_meta, settings):
  out, lse = attend(q, k, v, query_meta, key_meta, settings)
  # Named here, where the backward pass takes them from.
  out = checkpoint_name(out, compute.ATTENTION)
  lse = checkpoint_name(lse, compute.ATTENTION)
  return (out, lse), (q, k, v, query_meta, key_meta, out, lse)


def _attend_backward(settings, residuals, cotangents):
  q, k, v, query_meta, key_meta, out, lse = residuals
  d_out, d_lse = cotangents
  offset = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=3)
  offset -= jnp.where(jnp.isfinite(lse), d_lse, 0.0)
  local = functools.partial(_local_backward, settings=settings)
  dq, dk, dv = _on_each_device(
      local, (q, k, v, query_meta, key_meta, lse, d_out, offset), 'qkkmmlql',
      'qkk', settings.rules)
  return (
      dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None)


attend.defvjp(_attend_forward, _attend_backward)


def _on_each_device(
    local: Callable[..., Any],
    args: tuple[Any, ...],
    inputs: str,
    outputs: str,
    rules: rules_lib.Rules | None,
) -> Any:
  """Calls `local` on each device's part.

  Args:
    local: the function.
    args: what it takes.
    inputs: a letter for each argument: 'q' is [B, T, N, H], 'k' [B, S, K, H],
      'l' [B, T, N] and 'm' metadata [B, T].
    outputs: a letter for each result.
    rules: where rows, tokens and heads live; None means on one device.

  Returns:
    The results, global.
  """
  if rules is None:
    return local(*args)
  names = {
      'q': ('batch', 'seq', 'heads', None),
      'k': ('batch', 'seq', 'kv_heads', None),
      'l': ('batch', 'seq', 'heads'),
      'm': ('batch', 'seq'),
  }
  for arg, letter in zip(args, inputs, strict=True):
    for leaf in jax.tree.leaves(arg):
      rules.check('attention', leaf.shape, *names[letter])
  specs = {letter: rules.spec(*logical) for letter, logical in names.items()}
  return jax.shard_map(
      local,
      mesh=rules.mesh,
      in_specs=tuple(specs[letter] for letter in inputs),
      out_specs=tuple(specs[letter] for letter in outputs),
      check_vma=False,
  )(*args)


def _seq(settings: Settings) -> tuple[str, ...]:
  """Mesh axes that split the tokens."""
  return settings.rules.split_axes('seq') if settings.rules else ()


def _local_forward(q, k, v, query_meta, key_meta, *, settings):
  forward = functools.partial(settings.backend.forward, **settings.options)
  axes = _seq(settings)
  if not axes:
    return forward(q, k, v, query_meta, key_meta)
  if settings.strategy == 'all_gather':
    return forward(q, *_gathered((k, v), axes), query_meta,
                   _gathered(key_meta, axes))
  if settings.strategy == 'merge':
    q, query_meta = _gathered((q, query_meta), axes)
    out, lse = forward(q, k, v, query_meta, key_meta)
    return _merged(out, lse, axes)
  pass_on = _pass_on(axes)

  def visit(carry, _):
    out, lse, keys = carry
    k, v, key_meta = keys
    following = pass_on(keys)
    new = forward(q, k, v, query_meta, key_meta)
    (new_out, new_lse), following = _together(new, following)
    out, lse = flash_attention.merge(
        out, lse, new_out.astype(jnp.float32), new_lse)
    return (out, lse, following), None

  start = (
      jnp.zeros(q.shape, jnp.float32),
      jnp.full(q.shape[:3], -jnp.inf, jnp.float32),
      (k, v, key_meta))
  (out, lse, _), _ = jax.lax.scan(
      visit, start, None, length=jax.lax.axis_size(axes))
  return out.astype(q.dtype), lse


def _local_backward(
    q, k, v, query_meta, key_meta, lse, d_out, offset, *, settings
):
  backward = functools.partial(settings.backend.backward, **settings.options)
  axes = _seq(settings)
  if not axes:
    return backward(q, k, v, query_meta, key_meta, lse, d_out, offset)
  if settings.strategy == 'all_gather':
    dq, dk, dv = backward(
        q, *_gathered((k, v), axes), query_meta, _gathered(key_meta, axes),
        lse, d_out, offset)
    return dq, _scattered(dk, axes), _scattered(dv, axes)
  if settings.strategy == 'merge':
    q, query_meta, lse, d_out, offset = _gathered(
        (q, query_meta, lse, d_out, offset), axes)
    dq, dk, dv = backward(q, k, v, query_meta, key_meta, lse, d_out, offset)
    return _scattered(dq, axes), dk, dv
  pass_on = _pass_on(axes)

  def visit(carry, _):
    dq, sums, keys = carry
    k, v, key_meta = keys
    # What other devices found for these keys arrives while this one computes.
    arrived = pass_on((keys, sums))
    found = backward(q, k, v, query_meta, key_meta, lse, d_out, offset)
    (more_dq, *found), (following, sums) = _together(found, arrived)
    sums = jax.tree.map(jnp.add, sums, tuple(found))
    return (dq + more_dq, sums, following), None

  zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
  start = (jnp.zeros(q.shape, jnp.float32), zeros, (k, v, key_meta))
  (dq, sums, _), _ = jax.lax.scan(
      visit, start, None, length=jax.lax.axis_size(axes))
  return dq, *pass_on(sums)


def _together(results: Any, arrived: Any) -> Any:
  """Both, nothing that follows using one before the other is there.

  So the compiler must begin to send before it computes: left alone it hides
  the way of the keys behind the sums after the kernel, which are too short.
  """
  return jax.lax.optimization_barrier((results, arrived))


def _gathered(tree: Any, axes: tuple[str, ...]) -> Any:
  """All tokens of [b, t, ...] leaves, from every device along `seq`."""
  return jax.tree.map(
      lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True), tree)


def _scattered(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Sums [b, T, ...] over the devices along `seq`; each keeps its tokens."""
  return jax.lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True)


def _merged(out, lse, axes):
  """Attention of all queries to the keys of all devices, for own tokens."""
  top = jax.lax.pmax(lse, axes)
  # Where no device saw a key, the result is again 0 and -inf.
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  weight = jnp.exp(lse - top)
  summed, total = (
      _scattered(x, axes)
      for x in (out.astype(jnp.float32) * weight[..., None], weight))
  num_tokens = total.shape[1]
  top = jax.lax.dynamic_slice_in_dim(
      top, jax.lax.axis_index(axes) * num_tokens, num_tokens, axis=1)
  sees_any = total > 0.0
  total = jnp.where(sees_any, total, 1.0)
  return (
      (summed / total[..., None]).astype(out.dtype),
      jnp.where(sees_any, jnp.log(total) + top, -jnp.inf))


def _pass_on(axes: tuple[str, ...]) -> Callable[[Any], Any]:
  """Sends a tree to the next device of the ring."""
  num_devices = jax.lax.axis_size(axes)
  ring = [(i, (i + 1) % num_devices) for i in range(num_devices)]
  return functools.partial(
      jax.tree.map, lambda x: jax.lax.ppermute(x, axes, ring))

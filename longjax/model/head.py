"""Log-probability and exact entropy of tokens without holding their logits.

With logits s f32[V], temperature tau and z = s / tau, a token a has

  logprob(a) = z_a - log sum_v exp z_v
  entropy    = log sum_v exp z_v - sum_v p_v z_v,    p = softmax(z)

over the full vocabulary. Only tokens under the mask are worked on: they are
gathered, and a loop as long as their number demands computes the logits of
one chunk at a time. The backward pass computes them again:

  d logprob(a) / d s_v = ([v = a] - p_v) / tau.

B rows, T positions, D model, V vocabulary, M = B * T tokens, C tokens a chunk.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from longjax import types
from longjax.model import projection
from longjax.parallel import rules as rules_lib


@struct.dataclass
class HeadOutput:
  """Per token, in nats; 0 where the mask is False.

  Attributes:
    logprobs: f32[B, T], log-probability of the target at the temperature.
    entropy: f32[B, T], at the temperature; passes on no gradient.
    entropy_t1: f32[B, T], at temperature 1; passes on no gradient.
  """

  logprobs: jax.Array
  entropy: jax.Array
  entropy_t1: jax.Array


def logits(
    hidden: jax.Array,  # f[..., D]
    head: jax.Array,  # f[D, V]
) -> jax.Array:  # f32[..., V]
  """All logits, multiplied in hidden's dtype and summed in float32."""
  return jnp.einsum(
      '...d,dv->...v', hidden, head.astype(hidden.dtype),
      preferred_element_type=jnp.float32)


def logprobs_and_entropy(
    hidden: jax.Array,  # f[B, T, D]
    head: jax.Array,  # f[D, V]
    targets: jax.Array,  # i32[B, T]
    mask: jax.Array,  # bool[B, T]
    *,
    temperature: float = 1.0,
    chunk_len: int = 512,
    rules: rules_lib.Rules | None = None,
) -> HeadOutput:
  """Scores `targets`; memory C * V, work proportional to the masked tokens.

  Args:
    hidden: normalised hidden states.
    head: output projection; tied models pass the transposed embedding.
    targets: the token whose log-probability is asked.
    mask: True where it is asked.
    temperature: divides the logits; a Python number > 0.
    chunk_len: C.
    rules: where tokens and vocabulary live; None means on one device. Under
      a mesh each device works on its own tokens and, if the vocabulary is
      split, its part of the logits.

  Returns:
    See `HeadOutput`. Gradients flow through `logprobs` to hidden and head.
  """
  dims = chex.Dimensions()
  dims['BTD'] = hidden.shape
  chex.assert_shape(head, (dims.D, None))
  chex.assert_shape([targets, mask], dims['BT'])
  if not temperature > 0:
    raise types.UserError(f'temperature={temperature} must be > 0.')
  # Rows often come as NumPy arrays, which traced indices cannot read.
  targets, mask = jnp.asarray(targets), jnp.asarray(mask)
  return _score(
      jnp.asarray(hidden), jnp.asarray(head), targets, mask,
      _Settings(
          temperature=float(temperature), chunk_len=chunk_len, rules=rules))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
  """What is static: hashable, for `custom_vjp`."""

  temperature: float
  chunk_len: int
  rules: rules_lib.Rules | None

  def axes(self, *logical: str) -> tuple[str, ...]:
    """Mesh axes of size > 1 behind logical axes."""
    if self.rules is None:
      return ()
    return tuple(
        axis for name in logical for axis in self.rules.axes(name)
        if self.rules.mesh.shape[axis] > 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _score(hidden, head, targets, mask, settings):
  return _score_forward(hidden, head, targets, mask, settings)[0]


def _score_forward(hidden, head, targets, mask, settings):
  local = functools.partial(_local_forward, settings=settings)
  output, logsumexp = _on_each_device(
      local, (hidden, head, targets, mask), 'dwtt', 'tt', settings.rules)
  return output, (hidden, head, targets, mask, logsumexp)


def _score_backward(settings, residuals, cotangent):
  local = functools.partial(_local_backward, settings=settings)
  d_hidden, d_head = _on_each_device(
      local, (*residuals, cotangent.logprobs), 'dwtttt', 'dw', settings.rules)
  return d_hidden, d_head, None, None


_score.defvjp(_score_forward, _score_backward)


def _on_each_device(
    local: Callable[..., Any],
    args: tuple[jax.Array, ...],
    inputs: str,
    outputs: str,
    rules: rules_lib.Rules | None,
) -> Any:
  """Calls `local` on each device's tokens and part of the vocabulary.

  Args:
    local: the function.
    args: what it takes.
    inputs: a letter for each argument: 'd' is [B, T, D], 't' [B, T] and 'w'
      [D, V].
    outputs: a letter for each result.
    rules: where rows and vocabulary live; None means on one device.

  Returns:
    The results, global.
  """
  if rules is None:
    return local(*args)
  names = {
      'd': ('batch', 'seq', None),
      't': ('batch', 'seq'),
      'w': ('embed', 'vocab'),
  }
  for arg, letter in zip(args, inputs, strict=True):
    rules.check('head', arg.shape, *names[letter])
  return jax.shard_map(
      local,
      mesh=rules.mesh,
      in_specs=tuple(rules.spec(*names[letter]) for letter in inputs),
      out_specs=tuple(rules.spec(*names[letter]) for letter in outputs),
      check_vma=False,
  )(*args)


def _masked_first(mask, chunk_len):
  """Order that puts masked tokens first, i32[M'], M' = M rounded up to C.

  Returns:
    That order, the place i32[M] of each token in it, the number of masked
    tokens and the number of chunks that hold any.
  """
  order = jnp.argsort(~mask, stable=True)
  place = jnp.argsort(order)
  count = jnp.sum(mask)
  order = jnp.pad(order, (0, -mask.shape[0] % chunk_len))
  return order, place, count, (count + chunk_len - 1) // chunk_len


def _chunk(i, order, count, chunk_len, hidden, *arrays):
  """Chunk i of each array, and which of its tokens are masked."""
  ids = jax.lax.dynamic_slice_in_dim(order, i * chunk_len, chunk_len)
  is_masked = i * chunk_len + jnp.arange(chunk_len) < count
  # The last chunk is filled up with tokens that may hold NaN.
  h = jnp.where(is_masked[:, None], hidden[ids], 0.0)
  return is_masked, h, *(x[ids] for x in arrays)


def _sum_exp(z, axes):
  """Log-sum-exp and entropy f32[C] of z f32[C, V], V split over mesh `axes`."""
  top = jnp.max(z, axis=1)
  top = jax.lax.pmax(top, axes) if axes else top
  centred = z - top[:, None]
  weights = jnp.exp(centred)
  total = _all_sum(jnp.sum(weights, axis=1), axes)
  mean = _all_sum(jnp.sum(weights * centred, axis=1), axes) / total
  return jnp.log(total) + top, jnp.log(total) - mean


def _all_sum(x, axes):
  return jax.lax.psum(x, axes) if axes else x


def _local_targets(targets, vocab_len, axes):
  """Index of each target in this device's vocabulary, and if it is there."""
  first = jax.lax.axis_index(axes) * vocab_len if axes else 0
  targets = targets - first
  is_here = (targets >= 0) & (targets < vocab_len)
  return jnp.where(is_here, targets, 0), is_here


def _local_forward(hidden, head, targets, mask, *, settings):
  """HeadOutput and log-sum-exp f32[b, t] of one device's tokens."""
  chunk_len = min(settings.chunk_len, mask.size)
  vocab_axes = settings.axes('vocab')
  order, place, count, num_chunks = _masked_first(mask.reshape(-1), chunk_len)
  hidden = hidden.reshape(-1, hidden.shape[-1])
  targets = targets.reshape(-1)
  weights = projection.whole(
      head, 0, settings.axes('embed'), hidden.dtype)

  def visit(i, results):
    is_masked, h, target = _chunk(
        i, order, count, chunk_len, hidden, targets)
    s = logits(h, weights)
    z = s / settings.temperature
    logsumexp, entropy = _sum_exp(z, vocab_axes)
    entropy_t1 = (
        entropy if settings.temperature == 1.0 else _sum_exp(s, vocab_axes)[1])
    local, is_here = _local_targets(target, z.shape[1], vocab_axes)
    target_z = jnp.take_along_axis(z, local[:, None], axis=1)[:, 0]
    target_z = _all_sum(jnp.where(is_here, target_z, 0.0), vocab_axes)
    new = (target_z - logsumexp, entropy, entropy_t1, logsumexp)
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(
            old, jnp.where(is_masked, x, 0.0), i * chunk_len, axis=0)
        for old, x in zip(results, new, strict=True))

  results = jax.lax.fori_loop(
      0, num_chunks, visit, (jnp.zeros(order.shape, jnp.float32),) * 4)
  logprobs, entropy, entropy_t1, logsumexp = (
      x[place].reshape(mask.shape) for x in results)
  return HeadOutput(
      logprobs=logprobs, entropy=entropy, entropy_t1=entropy_t1), logsumexp


def _local_backward(
    hidden, head, targets, mask, logsumexp, d_logprobs, *, settings
):
  """Gradients of one device's tokens: f[b, t, D] and f[D, V]."""
  chunk_len = min(settings.chunk_len, mask.size)
  vocab_axes = settings.axes('vocab')
  order, place, count, num_chunks = _masked_first(mask.reshape(-1), chunk_len)
  flat = hidden.reshape(-1, hidden.shape[-1])
  per_token = [x.reshape(-1) for x in (targets, logsumexp, d_logprobs)]
  pieces = settings.axes('embed')
  weights = projection.whole(head, 0, pieces, hidden.dtype)

  def visit(i, carry):
    d_flat, d_head = carry
    is_masked, h, target, lse, cotangent = _chunk(
        i, order, count, chunk_len, flat, *per_token)
    cotangent = jnp.where(is_masked, cotangent, 0.0) / settings.temperature
    z = logits(h, weights) / settings.temperature
    local, is_here = _local_targets(target, z.shape[1], vocab_axes)
    is_target = (
        jnp.arange(z.shape[1])[None] == local[:, None]) & is_here[:, None]
    d_logits = cotangent[:, None] * (is_target - jnp.exp(z - lse[:, None]))
    d_logits = d_logits.astype(hidden.dtype)
    d_h = jnp.einsum(
        'cv,dv->cd', d_logits, weights, preferred_element_type=jnp.float32)
    d_flat = jax.lax.dynamic_update_slice_in_dim(
        d_flat, _all_sum(d_h, vocab_axes).astype(d_flat.dtype),
        i * chunk_len, axis=0)
    d_head += jnp.einsum(
        'cd,cv->dv', h, d_logits, preferred_element_type=jnp.float32)
    return d_flat, d_head

  zeros = jnp.zeros((order.shape[0], flat.shape[1]), hidden.dtype)
  d_flat, d_head = jax.lax.fori_loop(
      0, num_chunks, visit, (zeros, jnp.zeros(weights.shape, jnp.float32)))
  d_head = projection.summed_piece(d_head, 0, pieces)
  d_head = _all_sum(d_head, tuple(
      axis for axis in settings.axes('batch', 'seq') if axis not in pieces))
  return d_flat[place].reshape(hidden.shape), d_head.astype(head.dtype)

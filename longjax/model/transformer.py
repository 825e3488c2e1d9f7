"""The Qwen3 decoder as functions of a parameter tree.

Qwen3 (arXiv:2505.09388): pre-norm residual blocks, grouped-query attention
with RMS-normalised queries and keys, rotary positions, SwiGLU or a mixture of
experts. Qwen2 (arXiv:2407.10671) has biases in place of those norms. Layers
are stacked on a leading axis and scanned, so compile time does not grow with
depth.

One `block` serves training, prefill and decoding (`incremental`); they differ
by the `attend` function they hand it.

Shapes: B rows, T positions, V vocabulary, D model, F ffn, N query heads, K KV
heads, H head size, E experts, A active experts, L layers.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from longjax import rows, types
from longjax.model import (
  architecture,
  attention,
  moe,
  parameters,
  projection,
  rope,
)
from longjax.model import compute as compute_lib
from longjax.parallel import rules as rules_lib


@struct.dataclass
class Hidden:
  """What the layers make of rows.

  Attributes:
    states: f[B, T, D] normalised, ready for the head.
    routing: where tokens went, leaves [L, ...]; None without experts.
  """

  states: jax.Array
  routing: moe.Routing | None


def rms_norm(
    x: jax.Array,  # f[..., D]
    weight: jax.Array,  # f32[D]
    *,
    epsilon: float,
) -> jax.Array:  # f[..., D]
  """x / rms(x) * weight, computed in float32."""
  x32 = x.astype(jnp.float32)
  inverse_rms = jax.lax.rsqrt(
      jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
  weight = jnp.expand_dims(weight, tuple(range(x.ndim - 1)))
  return (x32 * inverse_rms * weight).astype(x.dtype)


def angles(
    position: jax.Array,  # i32[..., T]
    config: architecture.ModelConfig,
) -> jax.Array:  # f32[..., T, H/2]
  """Rotary angles of positions."""
  return rope.angles(
      position, head_dim=config.head_dim, theta=config.rope_theta,
      yarn=config.yarn)


def block(
    layer: dict[str, jax.Array],  # Parameters of one layer, without L.
    x: jax.Array,  # f[B, T, D]
    angle: jax.Array,  # f32[B, T, H/2]
    attend: Callable[..., tuple[jax.Array, Any]],
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    is_token: jax.Array | None = None,  # bool[B, T]
    expert_ids: jax.Array | None = None,  # i32[B, T, A]
) -> tuple[jax.Array, Any, moe.Routing | None]:
  """One residual block.

  Args:
    layer: see `parameters.layer_axes`.
    x: residual stream; dimensions ('batch', 'seq', None).
    angle: rotary angles of the tokens' positions.
    attend: (q f[B, T, N, H], k f[B, T, K, H], v f[B, T, K, H]) -> attended
      f[B, T, N, H] and anything the caller wants back.
    config: of the network.
    rules: logical axes to mesh axes.
    is_token: False on padding; None means there is none.
    expert_ids: experts to use again; None chooses them. See `moe.mixture`.

  Returns:
    The new residual stream, what `attend` passed back, and the routing if
    there are experts.
  """
  axes = parameters.layer_axes(config)

  def project(equation, x, name):
    return projection.project(equation, x, layer[name], axes[name], rules)

  def normed(x, name):
    return rms_norm(x, layer[name], epsilon=config.norm_epsilon)

  def heads(equation, name):
    x = project(equation, inputs, name)
    if config.qkv_bias:
      bias = layer[f'{name}_bias'][None, None]
      # In float32, so that its gradient is summed over tokens in float32.
      x = (x.astype(jnp.float32) + bias).astype(x.dtype)
    return x

  def turned(x, name):
    if config.qk_norm:
      x = normed(x, f'{name}_norm')
    return rope.rotate(
        x, angle, scale=config.yarn.scale if config.yarn else 1.0)

  inputs = normed(x, 'attention_norm')
  q = turned(heads('btd,dnh->btnh', 'query'), 'query')
  k = turned(heads('btd,dkh->btkh', 'key'), 'key')
  v = heads('btd,dkh->btkh', 'value')
  attended, passed_back = attend(q, k, v)
  x = x + project('btnh,nhd->btd', attended, 'output')

  inputs = normed(x, 'ffn_norm')
  if config.moe:
    out, routing = moe.mixture(
        layer, inputs, config=config.moe, rules=rules, is_token=is_token,
        expert_ids=expert_ids)
    return x + out, passed_back, routing
  gate = jax.nn.silu(project('btd,df->btf', inputs, 'gate'))
  up = project('btd,df->btf', inputs, 'up')
  return x + project('btf,fd->btd', gate * up, 'down'), passed_back, None


def hidden_states(
    params: types.Params,
    tokens: jax.Array,  # i32[B, T]
    meta: rows.TokenMeta,  # i32[B, T]
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
    expert_ids: jax.Array | None = None,  # i32[L, B, T, A]
) -> Hidden:
  """Normalised hidden states, ready for the head.

  Args:
    params: the parameter tree.
    tokens: ids, in any order along T.
    meta: who they are.
    config: of the network.
    rules: logical axes to mesh axes.
    compute: backends, dtype, remat.
    expert_ids: experts to use again, e.g. the sampler's; None chooses them.
  """
  dims = chex.Dimensions()
  dims['BT'] = tokens.shape
  chex.assert_shape([meta.group, meta.branch, meta.position], dims['BT'])
  angle = angles(meta.position, config)

  def attend(q, k, v):
    out, _ = attention.attention(
        q, k, v, meta, meta, backend=compute.attention,
        block_len=compute.block_len,
        context_parallel=compute.context_parallel, rules=rules)
    return out, None

  def step(x, layer_and_ids):
    layer, ids = layer_and_ids
    x = checkpoint_name(x, compute_lib.RESIDUAL)
    x, _, routing = block(
        layer, x, angle, attend, config=config, rules=rules,
        is_token=meta.group >= 0, expert_ids=ids)
    x = rules.constrain(x, 'batch', 'seq', 'activation_embed')
    return x, routing

  step = compute_lib.checkpointed(step, compute.remat)
  x = projection.lookup(
      params['embedding'], tokens, dtype=compute.activation_dtype,
      rules=rules)
  x = rules.constrain(x, 'batch', 'seq', 'activation_embed')
  x, routing = jax.lax.scan(step, x, (params['layers'], expert_ids))
  states = rms_norm(x, params['final_norm'], epsilon=config.norm_epsilon)
  return Hidden(states=states, routing=routing)

"""The Qwen3 decoder as functions of a parameter tree.

Qwen3 (arXiv:2505.09388): pre-norm residual blocks, grouped-query attention
with RMS-normalised queries and keys, rotary positions, SwiGLU. Layers are
stacked on a leading axis and scanned, so compile time does not grow with depth.

One `block` serves training, prefill and decoding (`incremental`); they differ
by the `attend` function they hand it. Flax Linen only names, shapes and
initialises parameters (`Transformer`); everything else takes the tree as an
argument.

Shapes: B rows, T positions, S prefix positions, V vocabulary, D model, F ffn,
N query heads, K KV heads, H head size, L layers, P prompts.
"""

import enum
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from longjax import rows, types
from longjax.model import architecture, attention, rope
from longjax.parallel import rules as rules_lib


class Remat(enum.StrEnum):
  """What the backward pass recomputes."""

  NONE = 'none'  # Keep every intermediate.
  BLOCK = 'block'  # Keep only the residual stream between blocks.


@struct.dataclass
class KeyValues:
  """Rotated keys and values of all layers, f[L, ..., K, H]."""

  key: jax.Array
  value: jax.Array


# Logical axes of every parameter; `parallel.rules` maps them to the mesh.
LAYER_AXES = {
    'attention_norm': ('layers', None),
    'query': ('layers', 'embed', 'heads', None),
    'key': ('layers', 'embed', 'kv_heads', None),
    'value': ('layers', 'embed', 'kv_heads', None),
    'query_norm': ('layers', None),
    'key_norm': ('layers', None),
    'output': ('layers', 'heads', None, 'embed'),
    'ffn_norm': ('layers', None),
    'gate': ('layers', 'embed', 'ffn'),
    'up': ('layers', 'embed', 'ffn'),
    'down': ('layers', 'ffn', 'embed'),
}


def parameter_axes(config: architecture.ModelConfig) -> types.Params:
  """Names the logical axes of every parameter, as a tree of tuples."""
  axes: dict[str, Any] = {
      'embedding': ('vocab', 'embed'),
      'layers': dict(LAYER_AXES),
      'final_norm': (None,),
  }
  if not config.tied_embeddings:
    axes['head'] = ('embed', 'vocab')
  return axes


def _layer_shapes(c: architecture.ModelConfig) -> dict[str, tuple[int, ...]]:
  sizes = {
      'attention_norm': (c.embed_dim,),
      'query': (c.embed_dim, c.num_heads, c.head_dim),
      'key': (c.embed_dim, c.num_kv_heads, c.head_dim),
      'value': (c.embed_dim, c.num_kv_heads, c.head_dim),
      'query_norm': (c.head_dim,),
      'key_norm': (c.head_dim,),
      'output': (c.num_heads, c.head_dim, c.embed_dim),
      'ffn_norm': (c.embed_dim,),
      'gate': (c.embed_dim, c.ffn_dim),
      'up': (c.embed_dim, c.ffn_dim),
      'down': (c.ffn_dim, c.embed_dim),
  }
  return {name: (c.num_layers, *shape) for name, shape in sizes.items()}


def _init_layers(
    key: jax.Array, config: architecture.ModelConfig
) -> dict[str, jax.Array]:
  """Normal with variance 1 / fan-in; residual outputs 1 / (2L) of that."""
  shapes = _layer_shapes(config)
  depth_scale = (2 * config.num_layers) ** -0.5
  layers = {}
  for i, (name, shape) in enumerate(shapes.items()):
    if name.endswith('_norm'):
      layers[name] = jnp.ones(shape)
      continue
    fan_in = (
        config.num_heads * config.head_dim if name == 'output' else shape[1])
    scale = fan_in**-0.5
    if name in ('output', 'down'):
      scale *= depth_scale
    layers[name] = scale * jax.random.normal(jax.random.fold_in(key, i), shape)
  return layers


class Transformer(nn.Module):
  """Names, shapes and initialises the parameters; the maths is below."""

  config: architecture.ModelConfig

  @nn.compact
  def __call__(self) -> types.Params:
    """The parameter tree."""
    c = self.config
    normal = nn.initializers.normal(stddev=c.embed_dim**-0.5)
    params = {
        'embedding': self.param(
            'embedding', normal, (c.vocab_size, c.embed_dim)),
        'layers': self.param('layers', _init_layers, c),
        'final_norm': self.param(
            'final_norm', nn.initializers.ones, (c.embed_dim,)),
    }
    if not c.tied_embeddings:
      params['head'] = self.param('head', normal, (c.embed_dim, c.vocab_size))
    return params


def init(config: architecture.ModelConfig, key: jax.Array) -> types.Params:
  """Fresh float32 parameters from a PRNG key."""
  return Transformer(config).init(key)['params']


def abstract(config: architecture.ModelConfig) -> types.Params:
  """Shapes and dtypes of the parameters, without making them."""
  return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def head_weights(params: types.Params) -> jax.Array:  # f32[D, V]
  """The output projection, which may be the transposed embedding."""
  if 'head' in params:
    return params['head']
  return params['embedding'].T


def rms_norm(
    x: jax.Array,  # f[..., D]
    weight: jax.Array,  # f32[D]
    *,
    epsilon: float,
) -> jax.Array:  # f[..., D]
  """x / rms(x) * weight, in float32."""
  x32 = x.astype(jnp.float32)
  inverse_rms = jax.lax.rsqrt(
      jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
  weight = jnp.expand_dims(weight, tuple(range(x.ndim - 1)))
  return (x32 * inverse_rms * weight).astype(x.dtype)


def block(
    layer: dict[str, jax.Array],  # Parameters of one layer, without L.
    x: jax.Array,  # f[B, T, D]
    angle: jax.Array,  # f32[B, T, H/2]
    attend: Callable[..., tuple[jax.Array, Any]],
    *,
    epsilon: float,
) -> tuple[jax.Array, Any]:
  """One residual block.

  Args:
    layer: see `LAYER_AXES`.
    x: residual stream.
    angle: rotary angles of the tokens' positions.
    attend: (q f[B, T, N, H], k f[B, T, K, H], v f[B, T, K, H]) -> attended
      f[B, T, N, H] and anything the caller wants back.
    epsilon: of the norms.

  Returns:
    The new residual stream and what `attend` passed back.
  """
  normed = rms_norm(x, layer['attention_norm'], epsilon=epsilon)
  q = jnp.einsum('btd,dnh->btnh', normed, layer['query'])
  k = jnp.einsum('btd,dkh->btkh', normed, layer['key'])
  v = jnp.einsum('btd,dkh->btkh', normed, layer['value'])
  q = rope.rotate(rms_norm(q, layer['query_norm'], epsilon=epsilon), angle)
  k = rope.rotate(rms_norm(k, layer['key_norm'], epsilon=epsilon), angle)
  attended, passed_back = attend(q, k, v)
  x = x + jnp.einsum('btnh,nhd->btd', attended, layer['output'])

  normed = rms_norm(x, layer['ffn_norm'], epsilon=epsilon)
  gate = jax.nn.silu(jnp.einsum('btd,df->btf', normed, layer['gate']))
  up = jnp.einsum('btd,df->btf', normed, layer['up'])
  x = x + jnp.einsum('btf,fd->btd', gate * up, layer['down'])
  return x, passed_back


def _run_rows(
    params: types.Params,
    tokens: jax.Array,  # i32[B, T]
    meta: rows.TokenMeta,  # i32[B, T]
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    backend: attention.Backend,
    remat: Remat,
    keep_cache: bool,
) -> tuple[jax.Array, KeyValues | None]:
  """Runs all layers over rows; the cache is kept only for prefill."""
  dims = chex.Dimensions()
  dims['BT'] = tokens.shape
  chex.assert_shape([meta.group, meta.branch, meta.position], dims['BT'])
  angle = rope.angles(
      meta.position, head_dim=config.head_dim, theta=config.rope_theta)

  def attend(q, k, v):
    out, _ = attention.attention(
        q, k, v, meta, meta, backend=backend, rules=rules)
    return out, KeyValues(key=k, value=v) if keep_cache else None

  def step(x, layer):
    x, cache = block(
        layer, x, angle, attend, epsilon=config.norm_epsilon)
    return rules.constrain(x, 'batch', 'seq', 'activation_embed'), cache

  if remat is Remat.BLOCK:
    step = jax.checkpoint(step)
  x = jnp.take(params['embedding'], tokens, axis=0)
  x = rules.constrain(x, 'batch', 'seq', 'activation_embed')
  x, cache = jax.lax.scan(step, x, params['layers'])
  return rms_norm(x, params['final_norm'], epsilon=config.norm_epsilon), cache


def hidden_states(
    params: types.Params,
    tokens: jax.Array,  # i32[B, T]
    meta: rows.TokenMeta,  # i32[B, T]
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    backend: attention.Backend = 'blockwise',
    remat: Remat = Remat.NONE,
) -> jax.Array:  # f32[B, T, D]
  """Normalised hidden states, ready for the head."""
  hidden, _ = _run_rows(
      params, tokens, meta, config=config, rules=rules, backend=backend,
      remat=remat, keep_cache=False)
  return hidden


def prefill(
    params: types.Params,
    tokens: jax.Array,  # i32[P, S]
    meta: rows.TokenMeta,  # i32[P, S]
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    backend: attention.Backend = 'blockwise',
) -> KeyValues:  # f[L, P, S, K, H]
  """Keys and values of prompts, one prompt a row."""
  _, cache = _run_rows(
      params, tokens, meta, config=config, rules=rules, backend=backend,
      remat=Remat.NONE, keep_cache=True)
  assert cache is not None
  return cache

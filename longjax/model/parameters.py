"""The parameter tree: names, shapes, logical axes and fresh values.

Layers are stacked on a leading axis L. A mixture of experts keeps the names of
the MLP's matrices; they have a dimension E more.

Shapes: V vocabulary, D model, F ffn, N query heads, K KV heads, H head size,
E experts, L layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from longjax import types
from longjax.model import architecture


def layer_axes(
    config: architecture.ModelConfig,
) -> dict[str, tuple[str | None, ...]]:
  """Logical axes of a layer's parameters; `parallel.rules` maps them."""
  axes: dict[str, tuple[str | None, ...]] = {
      'attention_norm': (None,),
      'query': ('embed', 'heads', None),
      'key': ('embed', 'kv_heads', None),
      'value': ('embed', 'kv_heads', None),
      'output': ('heads', None, 'embed'),
      'ffn_norm': (None,),
  }
  if config.qkv_bias:
    axes |= {
        'query_bias': ('heads', None),
        'key_bias': ('kv_heads', None),
        'value_bias': ('kv_heads', None),
    }
  if config.qk_norm:
    axes |= {'query_norm': (None,), 'key_norm': (None,)}
  if config.moe:
    return axes | {
        'router': ('embed', None),
        'gate': ('experts', 'expert_embed', 'ffn'),
        'up': ('experts', 'expert_embed', 'ffn'),
        'down': ('experts', 'ffn', 'expert_embed'),
    }
  return axes | {
      'gate': ('embed', 'ffn'),
      'up': ('embed', 'ffn'),
      'down': ('ffn', 'embed'),
  }


def axes(config: architecture.ModelConfig) -> types.Params:
  """Names the logical axes of every parameter, as a tree of tuples."""
  tree: dict[str, Any] = {
      'embedding': ('vocab', 'embed'),
      'layers': {
          name: ('layers', *axes) for name, axes in layer_axes(config).items()},
      'final_norm': (None,),
  }
  if not config.tied_embeddings:
    tree['head'] = ('embed', 'vocab')
  return tree


def _layer_shapes(c: architecture.ModelConfig) -> dict[str, tuple[int, ...]]:
  experts = (c.moe.num_experts,) if c.moe else ()
  sizes = {
      'attention_norm': (c.embed_dim,),
      'query': (c.embed_dim, c.num_heads, c.head_dim),
      'key': (c.embed_dim, c.num_kv_heads, c.head_dim),
      'value': (c.embed_dim, c.num_kv_heads, c.head_dim),
      'query_norm': (c.head_dim,),
      'key_norm': (c.head_dim,),
      'output': (c.num_heads, c.head_dim, c.embed_dim),
      'ffn_norm': (c.embed_dim,),
      'gate': (*experts, c.embed_dim, c.ffn_dim),
      'up': (*experts, c.embed_dim, c.ffn_dim),
      'down': (*experts, c.ffn_dim, c.embed_dim),
      'router': (c.embed_dim, *experts),
      'query_bias': (c.num_heads, c.head_dim),
      'key_bias': (c.num_kv_heads, c.head_dim),
      'value_bias': (c.num_kv_heads, c.head_dim),
  }
  there = layer_axes(c)
  return {
      name: (c.num_layers, *shape) for name, shape in sizes.items()
      if name in there}


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
    if name.endswith('_bias'):
      layers[name] = jnp.zeros(shape)
      continue
    if name == 'output':
      fan_in = config.num_heads * config.head_dim
    elif name in ('gate', 'up', 'down'):
      fan_in = shape[-2]
    else:
      fan_in = shape[1]
    scale = fan_in**-0.5
    if name in ('output', 'down'):
      scale *= depth_scale
    layers[name] = scale * jax.random.normal(jax.random.fold_in(key, i), shape)
  return layers


class Transformer(nn.Module):
  """Names, shapes and initialises the parameters; the maths is elsewhere."""

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

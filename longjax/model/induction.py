"""An initialisation that starts a small model near an induction circuit.

Looking a value up takes two layers that need each other: one that tells every
token what stood before it, and one that finds the place whose *previous* token
is the current one and copies what stands there (Olsson et al. 2022,
arXiv:2209.11895). From an ordinary initialisation a model of under a million
parameters finds the pair only after a long plateau; here both begin near it.
Before training the first layer looks one token back; copying is not there yet
but forms within some hundred steps. The architecture is unchanged and every
weight is trained.

The residual stream of D channels begins as

  [ 0 ]          a constant: Qwen3 has no biases, so attention by position
                 alone needs a channel that is the same for all tokens
  [1, D - H]     the token's identity, random
  [D - H, D)     room for the identity of the previous token

and the output head as the transposed embedding.

Shapes: V vocabulary, D model, N query heads, K KV heads, H head size, L layers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from longjax import types
from longjax.model import architecture

# Strength of the circuit against the ordinary random weights around it.
_KEPT = 0.25  # Share of the random weights kept where the circuit is written.
_CONSTANT = 4.0  # The constant channel, in standard deviations of the others.
_COPY = 2.0  # What a copy adds to the stream, in the same unit.
_SHARPNESS = 2.0  # Gain of the query and key norms.
_POSITION_PAIRS = 3  # Fastest rotary pairs: they tell neighbours apart.
_MAX_DRIFT = 0.01  # Radians a token that a matching pair may turn.


def initialise(
    params: types.Params, config: architecture.ModelConfig, *, seed: int
) -> types.Params:
  """Writes the circuit over the first two layers of fresh parameters.

  Args:
    params: of `parameters.init`, unsharded.
    config: sizes; needs two layers and D >= 2H + 1.
    seed: of the embedding.

  Returns:
    New parameters.

  Raises:
    UserError: the network is too small.
  """
  head_dim, embed_dim = config.head_dim, config.embed_dim
  if config.num_layers < 2 or embed_dim < 2 * head_dim + 1:
    raise types.UserError(
        f'initialisation=induction needs num_layers >= 2 and embed_dim >= '
        f'{2 * head_dim + 1} (2 * head_dim + 1), got {config.num_layers} and '
        f'{embed_dim}.')
  layers = {k: np.array(v) for k, v in params['layers'].items()}
  scale = embed_dim**-0.5
  embedding = scale * np.random.default_rng(seed).normal(
      size=(config.vocab_size, embed_dim))
  embedding[:, 0] = _CONSTANT * scale
  embedding[:, embed_dim - head_dim:] *= 0.1
  _previous_token_layer(layers, config, scale)
  _matching_layer(layers, config, scale)
  out = dict(params, embedding=_float32(embedding),
             layers=jax.tree.map(_float32, layers))
  if not config.tied_embeddings:
    out['head'] = _float32(embedding.T.copy())
  return out


def _float32(x: np.ndarray) -> jax.Array:
  return jnp.asarray(x, jnp.float32)


def _frequencies(config: architecture.ModelConfig) -> np.ndarray:  # [H/2]
  half = config.head_dim // 2
  return config.rope_theta ** -(np.arange(half) / half)


def _previous_token_layer(
    layers: dict[str, np.ndarray], config: architecture.ModelConfig,
    scale: float,
) -> None:
  """Layer 0: the first KV head's queries look one token back and copy it.

  Of a constant query and a key turned by one position, the score is
  sum cos(f (distance - 1)), largest at distance 1.
  """
  head_dim, half = config.head_dim, config.head_dim // 2
  sharers = config.num_heads // config.num_kv_heads
  frequency = _frequencies(config)
  for name in ('query', 'key', 'value'):
    heads = slice(sharers) if name == 'query' else slice(1)
    layers[name][0][:, heads] *= _KEPT
  layers['output'][0][:sharers] *= _KEPT
  pairs = np.arange(min(_POSITION_PAIRS, half))
  layers['query'][0][0, :sharers, pairs] += 3.0
  layers['key'][0][0, 0, pairs] += 3.0 * np.cos(frequency[pairs])
  layers['key'][0][0, 0, pairs + half] += 3.0 * np.sin(frequency[pairs])
  channels = np.arange(head_dim)
  layers['value'][0][1 + channels, 0, channels] += 1.0
  room = config.embed_dim - head_dim + channels
  layers['output'][0][:sharers, channels, room] += _COPY * scale
  for name in ('query_norm', 'key_norm'):
    layers[name][0] *= _SHARPNESS


def _matching_layer(
    layers: dict[str, np.ndarray], config: architecture.ModelConfig,
    scale: float,
) -> None:
  """Layer 1: finds what followed the current token before, and copies it.

  Content is matched in rotary pairs so slow that distance hardly turns them;
  with theta 1e6 and H = 32 that is 10 of 16 pairs.
  """
  head_dim, half = config.head_dim, config.head_dim // 2
  slow = np.flatnonzero(_frequencies(config) < _MAX_DRIFT)
  slow = slow if len(slow) else np.asarray([half - 1])
  match = np.concatenate([slow, slow + half])
  identity = 1 + np.arange(len(match))
  room = config.embed_dim - head_dim + np.arange(len(match))
  for name in ('query', 'key', 'value', 'output'):
    layers[name][1] *= _KEPT
  channels = np.arange(head_dim)
  # Each KV head copies its own part of the identity channels.
  num_parts = max((config.embed_dim - head_dim - 1) // head_dim, 1)
  sharers = config.num_heads // config.num_kv_heads
  for n in range(config.num_heads):
    layers['query'][1][identity, n, match] += 1.0
  for k in range(config.num_kv_heads):
    part = 1 + (k % num_parts) * head_dim + channels
    layers['key'][1][room, k, match] += 1.0
    layers['value'][1][part, k, channels] += 1.0
    for n in range(k * sharers, (k + 1) * sharers):
      layers['output'][1][n, channels, part] += _COPY * scale
  for name in ('query_norm', 'key_norm'):
    layers[name][1] *= _SHARPNESS

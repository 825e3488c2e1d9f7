"""Qwen3 in float64 NumPy, one head at a time, over Hugging Face's tensors.

Written from the model's definition in transformers (`modeling_qwen3.py`: norm
before, rotate-half rotary embedding, q_norm and k_norm over each head before
it, repeat_kv, SwiGLU), without longjax: what our transformer is checked
against.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def logits(
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    tokens: np.ndarray,
) -> np.ndarray:
  """Logits f64[T, V] of one sequence i32[T].

  Args:
    tensors: by Hugging Face's names, as stored in model.safetensors.
    config: the content of config.json.
    tokens: the sequence; token t sees tokens 0..t.
  """
  weights = {name: value.astype(np.float64) for name, value in tensors.items()}
  epsilon = config['rms_norm_eps']
  x = weights['model.embed_tokens.weight'][tokens]
  for i in range(config['num_hidden_layers']):
    prefix = f'model.layers.{i}.'
    layer = {
        name.removeprefix(prefix): value
        for name, value in weights.items() if name.startswith(prefix)}
    normed = _rms_norm(x, layer['input_layernorm.weight'], epsilon)
    x = x + _attention(normed, layer, config)
    normed = _rms_norm(x, layer['post_attention_layernorm.weight'], epsilon)
    gate = normed @ layer['mlp.gate_proj.weight'].T
    up = normed @ layer['mlp.up_proj.weight'].T
    silu = gate / (1.0 + np.exp(-gate))
    x = x + (silu * up) @ layer['mlp.down_proj.weight'].T
  x = _rms_norm(x, weights['model.norm.weight'], epsilon)
  head = 'model.embed_tokens' if config['tie_word_embeddings'] else 'lm_head'
  return x @ weights[f'{head}.weight'].T


def logprobs(
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    tokens: np.ndarray,
) -> np.ndarray:
  """Log-probability f64[T - 1] of each token after the first."""
  scores = logits(tensors, config, tokens)[:-1]
  top = scores.max(axis=1)
  logsumexp = np.log(np.exp(scores - top[:, None]).sum(axis=1)) + top
  return scores[np.arange(len(scores)), tokens[1:]] - logsumexp


def _rms_norm(x, weight, epsilon):
  return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weight


def _rotate(x, theta):
  """RoPE of one head f64[T, H]; the two halves are the pairs' members."""
  half = x.shape[1] // 2
  frequency = theta ** (-np.arange(half) * 2.0 / x.shape[1])
  angle = np.arange(x.shape[0])[:, None] * frequency
  cos = np.cos(np.concatenate([angle, angle], axis=1))
  sin = np.sin(np.concatenate([angle, angle], axis=1))
  rotated = np.concatenate([-x[:, half:], x[:, :half]], axis=1)
  return x * cos + rotated * sin


def _attention(x, layer, config):
  """Causal grouped-query attention of one layer, f64[T, D]."""
  h = config['head_dim']
  num_heads = config['num_attention_heads']
  queries_per_key = num_heads // config['num_key_value_heads']
  epsilon, theta = config['rms_norm_eps'], config['rope_theta']
  outputs = []
  for n in range(num_heads):
    kv = n // queries_per_key
    q = x @ layer['self_attn.q_proj.weight'][n * h:(n + 1) * h].T
    k = x @ layer['self_attn.k_proj.weight'][kv * h:(kv + 1) * h].T
    v = x @ layer['self_attn.v_proj.weight'][kv * h:(kv + 1) * h].T
    q = _rotate(_rms_norm(q, layer['self_attn.q_norm.weight'], epsilon), theta)
    k = _rotate(_rms_norm(k, layer['self_attn.k_norm.weight'], epsilon), theta)
    out = np.zeros_like(q)
    for t in range(len(x)):
      scores = k[:t + 1] @ q[t] / np.sqrt(h)
      weights = np.exp(scores - scores.max())
      out[t] = weights @ v[:t + 1] / weights.sum()
    outputs.append(out)
  return np.concatenate(outputs, axis=1) @ layer['self_attn.o_proj.weight'].T

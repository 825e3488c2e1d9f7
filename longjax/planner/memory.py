"""Bytes of HBM that programs hold, read and write; of one device.

By what the programs are made of: weights, caches, activations. What the
compiler adds is not seen.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import rules as rules_lib
from longjax.planner import flops, layout
from longjax.train import optimizer as optimizer_lib
from longjax.train import rl_stage

# Of a parameter; a factored mean square is next to nothing.
_BYTES_OF_MOMENTS = {
    optimizer_lib.Moments.FULL: 8, optimizer_lib.Moments.FACTORED: 2}


def _matrix_share(model: architecture.ModelConfig, rules: rules_lib.Rules):
  """Weights of a layer that one device holds while it computes with them."""
  attention = flops.attention_weights(model) / rules.size('heads')
  ffn = 3 * model.embed_dim * model.ffn_dim / rules.size('ffn')
  if model.moe:
    ffn *= model.moe.num_experts / rules.size('experts')
  return attention + ffn


def _activations(model: architecture.ModelConfig) -> int:
  """Numbers a token brings to and takes from a layer's matrices."""
  m = model
  heads = (m.num_heads + m.num_kv_heads) * m.head_dim
  ffn = 3 * (m.embed_dim + m.ffn_dim) * (m.moe.num_active if m.moe else 1)
  return 2 * (m.embed_dim + heads) + ffn


def of_rows(
    model, rules, compute, passes, *, num_tokens, num_pairs, block_len
) -> float:
  """Bytes in and out of HBM for rows computed at once, of one device."""
  width = jnp.dtype(compute.dtype).itemsize
  tokens = num_tokens / rules.size('batch') / rules.size('seq')
  pairs = num_pairs / rules.size('batch') / rules.size('seq')
  times = passes.forward + 2 * passes.backward
  layers = tokens * _activations(model) / rules.size('heads')
  weights = _matrix_share(model, rules)
  keys = (2 * model.num_kv_heads * model.head_dim * pairs / block_len
          / rules.size('heads'))
  attention_times = passes.attention + 2 * passes.backward
  return width * model.num_layers * (
      times * (layers + weights) + attention_times * keys)


def of_optimizer(model, rules, num_parts: int) -> float:
  """Parameters, moments and gradients, read and written in float32."""
  local = flops.num_parameters(model) / (
      rules.size('embed') * rules.size('heads'))
  return local * 4 * (3 * num_parts + 7)


def least(
    name: layout.Name,
    stage: layout.Stage,
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> float:
  """Bytes of one device without which a program cannot be, whatever else."""
  width = jnp.dtype(compute.dtype).itemsize
  pieces = rules.size('embed') * rules.size('heads')
  # Float32 parameters, and what is remembered of gradients.
  parameters = 4.0 * flops.num_parameters(model) / pieces
  state = parameters + parameters / 4 * _BYTES_OF_MOMENTS[
      stage.optimizer.moments]
  if name == 'update':
    tokens = layout.rows_at_once(stage, rules) * layout.row_lens(stage)[-1] / (
        rules.size('batch') * rules.size('seq'))
    kept = 0.0
    if compute.remat in (compute_lib.Remat.BLOCK, compute_lib.Remat.ATTENTION):
      kept += model.embed_dim
    if compute.remat is compute_lib.Remat.ATTENTION:
      kept += model.num_heads * model.head_dim / rules.size('heads')
    # Gradients are as large as parameters.
    return state + parameters + tokens * kept * model.num_layers * width
  if name == 'score':
    return state
  assert isinstance(stage, rl_stage.RlStage)
  sampler = rules_lib.for_sampler(rules, layout.prompts_at_once(stage))
  caches = sum(_caches(stage, model, sampler.decode, width))
  weights = width * model.num_layers * _matrix_share(model, rules)
  return state + weights + caches


def _caches(stage, model, rules, width) -> tuple[float, float]:
  """Bytes of a device's keys and values: of prompts, of their samples."""
  token = (2 * model.num_layers * model.head_dim * width
           * max(1.0, model.num_kv_heads / rules.size('kv_heads'))
           / rules.size('batch'))
  lanes = layout.prompts_at_once(stage) * stage.max_prompt_len
  slots = stage.engine.num_slots * stage.sampler.max_response_len
  return lanes * token / rules.size('prefix'), slots * token


def of_token(stage, model, rules, compute) -> float:
  """Weights, the prompts' keys and values, the samples' own."""
  width = jnp.dtype(compute.dtype).itemsize
  samples = stage.engine.num_slots / rules.size('batch')
  attention = flops.attention_weights(model) / rules.size('heads')
  ffn = 3 * model.embed_dim * model.ffn_dim / rules.size('ffn')
  if model.moe:
    # Experts that at least one of the tokens passing by is sent to.
    passing = samples * rules.size('experts')
    untouched = (1 - model.moe.num_active / model.moe.num_experts) ** passing
    ffn *= (1 - untouched) * model.moe.num_experts / rules.size('experts')
  head = model.embed_dim * model.vocab_size / rules.size('vocab')
  return sum(_caches(stage, model, rules, width)) + width * (
      model.num_layers * (attention + ffn) + head)


def of_tree(tree: Any) -> int:
  """Bytes one device holds of arrays, or of shapes, with shardings."""
  return sum(
      int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64))
      * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

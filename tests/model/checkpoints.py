"""Small checkpoints of every family, as Hugging Face stores them.

Written from the definitions in transformers (`modeling_qwen3.py`,
`modeling_qwen3_moe.py`, `modeling_qwen2.py`), without longjax.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

# As the config.json of a published Qwen3 reads, with small sizes.
QWEN3 = {
    'architectures': ['Qwen3ForCausalLM'],
    'attention_bias': False,
    'attention_dropout': 0.0,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'head_dim': 16,
    'hidden_act': 'silu',
    'hidden_size': 32,
    'initializer_range': 0.02,
    'intermediate_size': 48,
    'max_position_embeddings': 40960,
    'max_window_layers': 3,
    'model_type': 'qwen3',
    'num_attention_heads': 4,
    'num_hidden_layers': 3,
    'num_key_value_heads': 2,
    'rms_norm_eps': 1e-06,
    'rope_scaling': None,
    'rope_theta': 1000000,
    'sliding_window': None,
    'tie_word_embeddings': False,
    'torch_dtype': 'bfloat16',
    'transformers_version': '4.51.0',
    'use_cache': True,
    'use_sliding_window': False,
    'vocab_size': 96,
}
QWEN3_MOE = QWEN3 | {
    'architectures': ['Qwen3MoeForCausalLM'],
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
    'model_type': 'qwen3_moe',
    'moe_intermediate_size': 24,
    'norm_topk_prob': True,
    'num_experts': 8,
    'num_experts_per_tok': 3,
    'output_router_logits': False,
    'router_aux_loss_coef': 0.001,
}
QWEN2 = {k: v for k, v in QWEN3.items()
         if k not in ('attention_bias', 'head_dim', 'rope_scaling')} | {
    'architectures': ['Qwen2ForCausalLM'],
    'max_position_embeddings': 131072,
    'max_window_layers': 2,
    'model_type': 'qwen2',
    'rope_theta': 10000,
    'sliding_window': 4096,
    'use_mrope': False,
}
YARN = {
    'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 8}
FAMILIES: dict[str, dict[str, Any]] = {
    'dense_untied': QWEN3,
    'dense_tied': QWEN3 | {'tie_word_embeddings': True},
    'moe': QWEN3_MOE,
    'qwen2': QWEN2,
    # The two ways to write it.
    'yarn': QWEN3 | {'max_position_embeddings': 32, 'rope_scaling': YARN},
    'moe_yarn': {k: v for k, v in QWEN3_MOE.items()
                 if k not in ('rope_theta', 'rope_scaling', 'num_experts')} | {
        'max_position_embeddings': 64,
        'norm_topk_prob': False,
        'num_local_experts': 8,
        'rope_parameters': YARN | {
            'factor': 8.0, 'attention_factor': 0.9, 'beta_fast': 16.0,
            'truncate': False, 'rope_theta': 5e5},
    },
}


def random_tensors(
    config: Mapping[str, Any], seed: int = 0
) -> dict[str, np.ndarray]:
  """float32 tensors of every name and shape such a checkpoint has.

  Their values have 8 bits of mantissa, as published weights do.
  """
  rng = np.random.default_rng(seed)
  return {
      name: np.float32(np.asarray(
          rng.normal(size=shape) * shape[-1] ** -0.5
          + (len(shape) == 1 and 'norm' in name), ml_dtypes.bfloat16))
      for name, shape in shapes(config).items()}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Shape of every tensor by name."""
  is_qwen2 = config['model_type'] == 'qwen2'
  d, n = config['hidden_size'], config['num_attention_heads']
  h = config.get('head_dim', d // n)
  q_width, kv_width = n * h, config['num_key_value_heads'] * h
  layer = {
      'input_layernorm.weight': (d,),
      'post_attention_layernorm.weight': (d,),
      'self_attn.q_proj.weight': (q_width, d),
      'self_attn.k_proj.weight': (kv_width, d),
      'self_attn.v_proj.weight': (kv_width, d),
      'self_attn.o_proj.weight': (d, q_width),
  }
  if is_qwen2:
    layer |= {
        'self_attn.q_proj.bias': (q_width,),
        'self_attn.k_proj.bias': (kv_width,),
        'self_attn.v_proj.bias': (kv_width,),
    }
  else:
    layer |= {'self_attn.q_norm.weight': (h,), 'self_attn.k_norm.weight': (h,)}
  mlps = ['mlp']
  f = config['intermediate_size']
  if config['model_type'] == 'qwen3_moe':
    num_experts = config.get('num_experts') or config['num_local_experts']
    layer['mlp.gate.weight'] = (num_experts, d)
    mlps = [f'mlp.experts.{e}' for e in range(num_experts)]
    f = config['moe_intermediate_size']
  for mlp in mlps:
    layer |= {
        f'{mlp}.gate_proj.weight': (f, d),
        f'{mlp}.up_proj.weight': (f, d),
        f'{mlp}.down_proj.weight': (d, f),
    }
  out = {'model.embed_tokens.weight': (config['vocab_size'], d)}
  for i in range(config['num_hidden_layers']):
    out |= {f'model.layers.{i}.{name}': shape for name, shape in layer.items()}
  out['model.norm.weight'] = (d,)
  if not config['tie_word_embeddings']:
    out['lm_head.weight'] = (config['vocab_size'], d)
  return out


def write(
    directory: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    num_files: int = 1,
) -> pathlib.Path:
  """Writes a model directory, as one file or several behind an index."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / 'config.json').write_text(json.dumps(config))
  if num_files == 1:
    safetensors.numpy.save_file(dict(tensors), directory / 'model.safetensors')
    return directory
  names = sorted(tensors)
  weight_map = {}
  for i in range(num_files):
    file = f'model-{i + 1:05}-of-{num_files:05}.safetensors'
    safetensors.numpy.save_file(
        {name: tensors[name] for name in names[i::num_files]},
        directory / file)
    weight_map |= dict.fromkeys(names[i::num_files], file)
  (directory / 'model.safetensors.index.json').write_text(
      json.dumps({'metadata': {}, 'weight_map': weight_map}))
  return directory

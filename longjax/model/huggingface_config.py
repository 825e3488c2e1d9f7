"""config.json of the Qwen families and our ModelConfig, each from the other.

Every field of a file is understood, or known to leave the network's maths
alone, or refused by name: what is ignored may be what a model was trained
with.
"""

import dataclasses
import os
import pathlib
from typing import Any

from longjax import types
from longjax.model import architecture, huggingface_directory, json_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
  """What a model_type implies.

  Attributes:
    architecture: the class of transformers that computes it.
    qk_norm: of ModelConfig.
    qkv_bias: of ModelConfig.
    has_experts: whether layers are mixtures.
    default_head_dim: head_dim may be left out, meaning hidden size over heads.
  """

  architecture: str
  qk_norm: bool
  qkv_bias: bool
  has_experts: bool
  default_head_dim: bool


_FAMILIES = {
    'qwen3': _Family(
        architecture='Qwen3ForCausalLM', qk_norm=True, qkv_bias=False,
        has_experts=False, default_head_dim=False),
    'qwen3_moe': _Family(
        architecture='Qwen3MoeForCausalLM', qk_norm=True, qkv_bias=False,
        has_experts=True, default_head_dim=True),
    'qwen2': _Family(
        architecture='Qwen2ForCausalLM', qk_norm=False, qkv_bias=True,
        has_experts=False, default_head_dim=True),
}

# config.json field -> ModelConfig field.
_INTS = {
    'vocab_size': 'vocab_size',
    'hidden_size': 'embed_dim',
    'num_hidden_layers': 'num_layers',
    'num_attention_heads': 'num_heads',
    'num_key_value_heads': 'num_kv_heads',
}
_FLOATS = {'rms_norm_eps': 'norm_epsilon'}

# Fields that may say something else, and the values that are implemented; the
# first is what a missing field means.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    'add_cross_attention': (False,),
    'attention_bias': (False,),
    'attention_dropout': (0.0,),
    'hidden_act': ('silu',),
    'is_encoder_decoder': (False,),
    'partial_rotary_factor': (1.0, None),
    'pruned_heads': ({}, None),
    'quantization_config': (None,),
    'tie_encoder_decoder': (False,),
    'use_mrope': (False, None),
    'use_sliding_window': (False,),
}
_IMPLEMENTED_BIAS = {'attention_bias': (True,)}
_IMPLEMENTED_EXPERTS: dict[str, tuple[Any, ...]] = {
    'decoder_sparse_step': (1,),
    'mlp_only_layers': ([], None),
}

# Fields that cannot change what the network computes: names, training,
# generation, the length that was tried.
_HARMLESS = frozenset((
    '_name_or_path', 'architectures', 'bos_token_id', 'chunk_size_feed_forward',
    'dtype', 'eos_token_id', 'finetuning_task', 'id2label', 'initializer_range',
    'is_decoder', 'label2id', 'max_position_embeddings', 'max_window_layers',
    'model_type', 'output_attentions', 'output_hidden_states',
    'output_router_logits', 'pad_token_id', 'prefix', 'problem_type',
    'return_dict', 'router_aux_loss_coef', 'sep_token_id', 'sliding_window',
    'task_specific_params', 'tokenizer_class', 'torch_dtype', 'torchscript',
    'transformers_version', 'unsloth_version', 'use_cache',
))
# Those that `save` writes itself.
_NOT_CARRIED = frozenset((
    '_name_or_path', 'architectures', 'dtype', 'model_type', 'torch_dtype'))

# Rotary positions have no end of their own, but inference engines refuse
# inputs beyond what config.json names.
_MAX_POSITION = 262_144


def load(directory: str | os.PathLike) -> architecture.ModelConfig:
  """Reads config.json; UserError names a field that is missing or unknown."""
  path = pathlib.Path(directory) / huggingface_directory.CONFIG_FILE
  fields = json_fields.Fields(huggingface_directory.read_json(path), path)
  family = _family(fields)
  values: dict[str, Any] = {
      'qk_norm': family.qk_norm, 'qkv_bias': family.qkv_bias}
  for name, ours in _INTS.items():
    values[ours] = fields.take(name, int)
  for name, ours in _FLOATS.items():
    values[ours] = fields.take(name, float)
  values['tied_embeddings'] = fields.take('tie_word_embeddings', bool, False)
  default_head_dim = None
  if family.default_head_dim:
    default_head_dim = values['embed_dim'] // max(values['num_heads'], 1)
  values['head_dim'] = fields.take('head_dim', int, default_head_dim)
  if family.has_experts:
    values['moe'] = _take_experts(fields)
    values['ffn_dim'] = fields.take('moe_intermediate_size', int)
    fields.drop('intermediate_size')  # Of layers without experts.
  else:
    values['ffn_dim'] = fields.take('intermediate_size', int)
  values['rope_theta'], values['yarn'] = _take_rope(fields)
  layer_types = fields.take_any('layer_types')
  if layer_types not in (None, ['full_attention'] * values['num_layers']):
    fields.refuse('layer_types', layer_types, "'full_attention' in all layers")
  fields.end()
  return architecture.ModelConfig(**values)


def to_json(config: architecture.ModelConfig) -> dict[str, Any]:
  """The content of config.json.

  Raises:
    UserError: no family has this combination.
  """
  name, family = _family_of(config)
  content: dict[str, Any] = {
      'architectures': [family.architecture],
      'attention_dropout': 0.0,
      'hidden_act': 'silu',
      'max_position_embeddings': _MAX_POSITION,
      'model_type': name,
      'rope_theta': config.rope_theta,
      'tie_word_embeddings': config.tied_embeddings,
      'use_sliding_window': False,
      **{k: getattr(config, ours) for k, ours in (_INTS | _FLOATS).items()},
  }
  if family.qk_norm:
    content['attention_bias'] = False
  if (not family.default_head_dim
      or config.head_dim * config.num_heads != config.embed_dim):
    content['head_dim'] = config.head_dim
  if config.moe:
    content |= {
        'decoder_sparse_step': 1,
        # Nothing reads it; published models have this ratio.
        'intermediate_size': config.moe.num_active * config.ffn_dim,
        'mlp_only_layers': [],
        'moe_intermediate_size': config.ffn_dim,
        'norm_topk_prob': config.moe.normalize_weights,
        'num_experts': config.moe.num_experts,
        'num_experts_per_tok': config.moe.num_active,
    }
  else:
    content['intermediate_size'] = config.ffn_dim
  if config.yarn:
    content['rope_scaling'] = _yarn_json(config.yarn)
    content['max_position_embeddings'] = round(
        config.yarn.factor * config.yarn.original_len)
  return content


def harmless(directory: pathlib.Path) -> dict[str, Any]:
  """Fields of a config.json to carry along; {} if it is no model's."""
  if not huggingface_directory.is_model(directory):
    return {}
  content = huggingface_directory.read_json(
      directory / huggingface_directory.CONFIG_FILE)
  return {name: value for name, value in content.items()
          if name in _HARMLESS - _NOT_CARRIED}


def _family(fields: json_fields.Fields) -> _Family:
  """The family; takes fields that have only one value in it."""
  model_type = fields.take_any('model_type')
  if model_type not in _FAMILIES:
    fields.refuse('model_type', model_type, ', '.join(map(repr, _FAMILIES)))
  family = _FAMILIES[model_type]
  implemented = _IMPLEMENTED
  if family.qkv_bias:
    implemented = implemented | _IMPLEMENTED_BIAS
  if family.has_experts:
    implemented = implemented | _IMPLEMENTED_EXPERTS
  for name, allowed in implemented.items():
    value = fields.take_any(name, allowed[0])
    if value not in allowed:
      fields.refuse(name, value, repr(allowed[0]))
  fields.drop(*_HARMLESS - {'max_position_embeddings'})
  return family


def _yarn_json(yarn: architecture.YarnConfig) -> dict[str, Any]:
  content: dict[str, Any] = {
      'rope_type': 'yarn',
      'factor': yarn.factor,
      'original_max_position_embeddings': yarn.original_len,
      'beta_fast': yarn.beta_fast,
      'beta_slow': yarn.beta_slow,
  }
  if yarn.attention_factor is not None:
    content['attention_factor'] = yarn.attention_factor
  if not yarn.truncate:
    content['truncate'] = False
  return content


def _family_of(config: architecture.ModelConfig) -> tuple[str, _Family]:
  for name, family in _FAMILIES.items():
    if (family.qk_norm, family.qkv_bias, family.has_experts) == (
        config.qk_norm, config.qkv_bias, config.moe is not None):
      return name, family
  raise types.UserError(
      f'no family of Hugging Face has qk_norm={config.qk_norm}, '
      f'qkv_bias={config.qkv_bias} and moe={config.moe}; known are '
      f'{", ".join(_FAMILIES)}.')


def _take_experts(fields: json_fields.Fields) -> architecture.MoeConfig:
  # Newer files call it so.
  num_experts = fields.take_any('num_local_experts')
  return architecture.MoeConfig(
      num_experts=fields.take('num_experts', int, num_experts),
      num_active=fields.take('num_experts_per_tok', int),
      normalize_weights=fields.take('norm_topk_prob', bool))


def _take_rope(
    fields: json_fields.Fields,
) -> tuple[float, architecture.YarnConfig | None]:
  """The base, and YaRN if there is any.

  Older files have `rope_theta` and `rope_scaling`, newer ones all of it in
  `rope_parameters`.
  """
  max_len = fields.take_any('max_position_embeddings')
  theta = fields.take_any('rope_theta')
  scaling = fields.take_table('rope_scaling')
  rope = fields.take_table('rope_parameters')
  if scaling and rope:
    raise types.UserError(
        f'{fields.path}: rope_scaling and rope_parameters are both given.')
  rope = rope or scaling or json_fields.Fields({}, fields.path)
  theta = rope.take('rope_theta', float, theta)
  kind = rope.take_any('type', 'default')
  kind = rope.take_any('rope_type', kind)
  yarn = None
  if kind == 'yarn':
    yarn = architecture.YarnConfig(
        factor=rope.take('factor', float),
        original_len=rope.take(
            'original_max_position_embeddings', int, max_len),
        beta_fast=rope.take('beta_fast', float, 32.0),
        beta_slow=rope.take('beta_slow', float, 1.0),
        attention_factor=rope.take_optional('attention_factor', float),
        truncate=rope.take('truncate', bool, True))
  elif kind != 'default':
    rope.refuse('rope_type', kind, "'default' and 'yarn'")
  rope.end()
  return theta, yarn


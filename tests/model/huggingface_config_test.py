"""Tests for longjax.model.huggingface_config."""

import json

import pytest

from longjax import types
from longjax.model import architecture, huggingface_config
from tests.model import checkpoints

QWEN3, MOE, QWEN2 = (
    checkpoints.QWEN3, checkpoints.QWEN3_MOE, checkpoints.QWEN2)
SIZES = dict(
    vocab_size=96, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2)


def load(directory, config):
  (directory / 'config.json').write_text(json.dumps(config))
  return huggingface_config.load(directory)


@pytest.mark.parametrize('family, want', [
    ('dense_untied', dict(ffn_dim=48, head_dim=16, rope_theta=1e6)),
    ('dense_tied', dict(
        ffn_dim=48, head_dim=16, rope_theta=1e6, tied_embeddings=True)),
    ('qwen2', dict(
        ffn_dim=48, head_dim=8, rope_theta=1e4, qk_norm=False, qkv_bias=True)),
    ('moe', dict(
        ffn_dim=24, head_dim=16, rope_theta=1e6, moe=architecture.MoeConfig(
            num_experts=8, num_active=3))),
    ('yarn', dict(
        ffn_dim=48, head_dim=16, rope_theta=1e6, yarn=architecture.YarnConfig(
            factor=4.0, original_len=8))),
    ('moe_yarn', dict(
        ffn_dim=24, head_dim=16, rope_theta=5e5,
        moe=architecture.MoeConfig(
            num_experts=8, num_active=3, normalize_weights=False),
        yarn=architecture.YarnConfig(
            factor=8.0, original_len=8, attention_factor=0.9, beta_fast=16.0,
            truncate=False))),
])
def test_every_family_is_understood_and_written_again(tmp_path, family, want):
  want = architecture.ModelConfig(**SIZES | want)
  config = checkpoints.FAMILIES[family]
  assert load(tmp_path, config) == want
  written = huggingface_config.to_json(want)
  assert written['architectures'] == config['architectures']
  assert load(tmp_path, written) == want
  # What is written again says the same, where both say something.
  spelling = {
      'intermediate_size', 'torch_dtype', 'rope_scaling',
      'max_position_embeddings'}
  assert {k: v for k, v in config.items()
          if k not in spelling and written.get(k, v) != v} == {}


# Fields and values of published files: DeepSeek-R1-Distill-Qwen,
# Qwen3-30B-A3B-Thinking-2507, and what recent transformers adds.
@pytest.mark.parametrize('config, more', [
    (QWEN2, {'use_mrope': False, 'sliding_window': 4096}),
    (QWEN2, {'attention_bias': True, 'head_dim': 8}),
    (MOE, {'max_window_layers': 48, 'router_aux_loss_coef': 0.001,
           'max_position_embeddings': 262144, 'mlp_only_layers': None}),
    (MOE, {'attention_dropout': 0, 'rope_theta': 10000000}),
    (QWEN3, {'dtype': 'bfloat16', 'layer_types': ['full_attention'] * 3,
             'bos_token_id': None, 'pad_token_id': 5}),
    (QWEN3, {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}),
    (QWEN3, {'rope_scaling': {'type': 'yarn', 'factor': 2}}),
])
def test_fields_that_leave_the_maths_alone_are_accepted(
    tmp_path, config, more):
  got = load(tmp_path, config | more)
  assert got.num_layers == 3
  if 'rope_parameters' in more:
    assert got.rope_theta == 5e5
  if more.get('rope_scaling'):
    # As transformers does where the trained length is not given.
    assert got.yarn.original_len == 40960


@pytest.mark.parametrize('config, message', [
    (QWEN3 | {'model_type': 'llama'}, "model_type='llama' is not supported"),
    (QWEN3 | {'model_type': None}, 'model_type=None is not supported'),
    (QWEN3 | {'attention_bias': True}, 'attention_bias=True is not supported'),
    (QWEN2 | {'attention_bias': False}, 'attention_bias=False is not'),
    (QWEN3 | {'attention_dropout': 0.1}, 'attention_dropout=0.1 is not'),
    (QWEN3 | {'use_sliding_window': True}, 'use_sliding_window=True is not'),
    (QWEN2 | {'use_mrope': True}, 'use_mrope=True is not'),
    (QWEN3 | {'quantization_config': {'bits': 4}},
     'quantization_config=.*bits'),
    (QWEN3 | {'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported"),
    (QWEN3 | {'layer_types': ['full_attention', 'sliding_attention'] * 2},
     "layer_types=.*, only 'full_attention' in all layers"),
    (QWEN3 | {'head_dim': None}, 'head_dim=None must be given, as int'),
    (QWEN3 | {'vocab_size': '20'}, "vocab_size='20' must be given, as int"),
    (QWEN3 | {'num_key_value_heads': 3}, 'num_heads=4 is not a multiple'),
    (QWEN3 | {'num_experts': 8}, 'the field num_experts=8 is not understood'),
    (QWEN3 | {'dual_chunk_attention_config': {'chunk_size': 262144}},
     "the field dual_chunk_attention_config={'chunk_size': 262144} is not"),
    (QWEN2 | {'shared_expert_intermediate_size': 4},
     'the field shared_expert_intermediate_size=4 is not understood'),
    (MOE | {'decoder_sparse_step': 2}, 'decoder_sparse_step=2 is not'),
    (MOE | {'mlp_only_layers': [0]}, r'mlp_only_layers=\[0\] is not'),
    (MOE | {'num_experts': None}, 'num_experts=None must be given, as int'),
    (MOE | {'norm_topk_prob': None}, 'norm_topk_prob=None must be given'),
    (MOE | {'num_experts_per_tok': 9}, 'num_active=9 must lie between'),
    (QWEN3 | {'rope_theta': None}, 'rope_theta=None must be given, as float'),
    (QWEN3 | {'rope_scaling': 4.0},
     'rope_scaling=4.0 is not supported, only an object'),
    (QWEN3 | {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}},
     "rope_scaling: rope_type='llama3' is not supported, only 'default' and "),
    (QWEN3 | {'rope_scaling': {'rope_type': 'yarn'}},
     'rope_scaling: factor=None must be given, as float'),
    (QWEN3 | {'rope_scaling': checkpoints.YARN | {'mscale': 1.0}},
     'rope_scaling: the field mscale=1.0 is not understood'),
    (QWEN3 | {'rope_scaling': checkpoints.YARN | {'beta_fast': 0.5}},
     'beta_fast=0.5 must be greater than'),
    (QWEN3 | {'rope_scaling': checkpoints.YARN, 'rope_parameters': {}},
     'rope_scaling and rope_parameters are both given'),
    (QWEN3 | {'rope_parameters': {'full_attention': {'rope_theta': 1e6}}},
     'rope_parameters: the field full_attention='),
])
def test_a_config_the_network_does_not_implement_is_refused(
    tmp_path, config, message):
  with pytest.raises(types.UserError, match=message) as error:
    load(tmp_path, config)
  assert 'config.json' in str(error.value) or 'model.' in str(error.value)


@pytest.mark.parametrize('content', [None, 'not json', '[1]'])
def test_a_directory_without_a_readable_config_is_refused(tmp_path, content):
  if content is not None:
    (tmp_path / 'config.json').write_text(content)
  with pytest.raises(types.UserError, match=r'config\.json'):
    huggingface_config.load(tmp_path)


def test_only_a_models_fields_are_carried_along(tmp_path):
  (tmp_path / 'config.json').write_text('{"recipe": [], "dtype": "float32"}')
  assert huggingface_config.harmless(tmp_path) == {}
  assert huggingface_config.harmless(tmp_path / 'nowhere') == {}
  (tmp_path / 'config.json').write_text(json.dumps(QWEN3))
  carried = huggingface_config.harmless(tmp_path)
  assert carried['max_position_embeddings'] == 40960
  assert not carried.keys() & {
      'torch_dtype', 'hidden_size', 'architectures', 'rope_scaling'}


def test_transformers_reads_the_same_from_what_we_write(tmp_path):
  transformers = pytest.importorskip('transformers')
  for name, config in checkpoints.FAMILIES.items():
    model = load(tmp_path, config)
    (tmp_path / 'config.json').write_text(
        json.dumps(huggingface_config.to_json(model)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.architectures == config['architectures'], name
    # And we what it writes.
    theirs.save_pretrained(tmp_path)
    assert huggingface_config.load(tmp_path) == model, name

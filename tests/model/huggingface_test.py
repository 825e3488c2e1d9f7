import json
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from longjax import rows, types
from longjax.model import architecture, head, huggingface, transformer
from longjax.parallel import mesh, rules
from tests.model import numpy_qwen3

# As a published Qwen3 config.json reads, with small sizes.
CONFIG = {
    'architectures': ['Qwen3ForCausalLM'],
    'attention_bias': False,
    'attention_dropout': 0.0,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'head_dim': 4,
    'hidden_act': 'silu',
    'hidden_size': 8,
    'initializer_range': 0.02,
    'intermediate_size': 12,
    'max_position_embeddings': 40960,
    'max_window_layers': 3,
    'model_type': 'qwen3',
    'num_attention_heads': 6,
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
    'vocab_size': 20,
}
TIED = CONFIG | {'tie_word_embeddings': True}


def write(directory, config, tensors):
  directory.mkdir(exist_ok=True)
  (directory / 'config.json').write_text(json.dumps(config))
  safetensors.numpy.save_file(tensors, directory / 'model.safetensors')
  return directory


@pytest.fixture
def tensors():
  return numpy_qwen3.random_tensors(CONFIG)


@pytest.mark.parametrize('config', [CONFIG, TIED], ids=['untied', 'tied'])
def test_loaded_weights_predict_what_float64_numpy_predicts(tmp_path, config):
  tensors = numpy_qwen3.random_tensors(config)
  params, model = huggingface.load(write(tmp_path / 'a', config, tensors))
  tokens = np.random.default_rng(1).integers(0, config['vocab_size'], 17)
  meta = rows.TokenMeta(
      group=jnp.zeros((1, 17), jnp.int32), branch=jnp.zeros((1, 17), jnp.int32),
      position=jnp.arange(17)[None])
  one_device = rules.Rules(mesh.make(mesh.MeshConfig(), jax.devices()[:1]))
  hidden = transformer.hidden_states(
      params, jnp.int32(tokens)[None], meta, config=model, rules=one_device)
  got = head.logits(hidden, transformer.head_weights(params))[0]
  want = numpy_qwen3.logits(tensors, config, tokens)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('config', [CONFIG, TIED], ids=['untied', 'tied'])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_saving_what_was_loaded_gives_the_same_bits(tmp_path, config, dtype):
  tensors = {
      name: value.astype(dtype)
      for name, value in numpy_qwen3.random_tensors(config).items()}
  source = write(tmp_path / 'a', config, tensors)
  params, model = huggingface.load(source, dtype=dtype)
  assert jax.tree.leaves(params)[0].dtype == dtype
  huggingface.save(tmp_path / 'b', params, model)
  again = safetensors.numpy.load_file(tmp_path / 'b' / 'model.safetensors')
  assert again.keys() == tensors.keys()
  for name, value in tensors.items():
    assert again[name].dtype == dtype
    np.testing.assert_array_equal(again[name], value, err_msg=name)
  # bfloat16 read into float32 loses nothing either.
  params, model = huggingface.load(source)
  huggingface.save(tmp_path / 'c', params, model, dtype=dtype)
  assert (tmp_path / 'c' / 'model.safetensors').read_bytes() == (
      tmp_path / 'b' / 'model.safetensors').read_bytes()


def test_parameters_saved_and_loaded_are_the_same_bits(tmp_path):
  config = architecture.ModelConfig(
      vocab_size=20, embed_dim=8, ffn_dim=12, num_layers=2, num_heads=4,
      num_kv_heads=2, head_dim=6, rope_theta=12345.0, norm_epsilon=1e-5)
  params = transformer.init(config, jax.random.key(0))
  huggingface.save(tmp_path / 'a', params, config, stop_id=7, pad_id=0)
  loaded, loaded_config = huggingface.load(tmp_path / 'a')
  assert loaded_config == config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  written = json.loads((tmp_path / 'a' / 'config.json').read_text())
  assert written['architectures'] == ['Qwen3ForCausalLM']
  assert (written['eos_token_id'], written['pad_token_id']) == (7, 0)
  generation = tmp_path / 'a' / 'generation_config.json'
  assert json.loads(generation.read_text()) == {
      'eos_token_id': 7, 'pad_token_id': 0}


def test_each_device_holds_its_part_of_what_one_device_would(tmp_path, tensors):
  directory = write(tmp_path / 'a', CONFIG, tensors)
  made = rules.Rules(mesh.make(mesh.MeshConfig(data=2, fsdp=2, tensor=2)))
  spread, config = huggingface.load(directory, rules=made)
  alone, _ = huggingface.load(directory)
  jax.tree.map(np.testing.assert_array_equal, spread, alone)
  query = spread['layers']['query']
  assert query.sharding == made.sharding('layers', 'embed', 'heads', None)
  assert query.addressable_shards[0].data.shape == (3, 4, 3, 4)
  huggingface.save(tmp_path / 'b', spread, config)
  again, _ = huggingface.load(tmp_path / 'b')
  jax.tree.map(np.testing.assert_array_equal, again, alone)


def test_several_files_behind_an_index_are_one_checkpoint(tmp_path, tensors):
  alone, _ = huggingface.load(write(tmp_path / 'a', CONFIG, tensors))
  split = write(tmp_path / 'b', CONFIG, {})
  (split / 'model.safetensors').unlink()
  weight_map = {}
  for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
    file = f'model-0000{i + 1}-of-00002.safetensors'
    safetensors.numpy.save_file(
        {name: tensors[name] for name in names}, split / file)
    weight_map |= dict.fromkeys(names, file)
  (split / 'model.safetensors.index.json').write_text(
      json.dumps({'weight_map': weight_map}))
  jax.tree.map(
      np.testing.assert_array_equal, huggingface.load(split)[0], alone)
  (split / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(types.UserError, match='model-00002-of-00002'):
    huggingface.load(split)


def test_a_tied_checkpoint_may_store_its_head_too(tmp_path):
  tensors = numpy_qwen3.random_tensors(TIED)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  params, _ = huggingface.load(write(tmp_path / 'a', TIED, tensors))
  assert 'head' not in params
  tensors['lm_head.weight'][0, 0] += 1.0
  with pytest.raises(types.UserError, match=r'lm_head\.weight'):
    huggingface.load(write(tmp_path / 'a', TIED, tensors))


@pytest.mark.parametrize('spoil, message', [
    (lambda t: t.pop('model.layers.1.mlp.up_proj.weight'),
     r'lacks 1 tensors, first model\.layers\.1\.mlp\.up_proj\.weight'),
    (lambda t: t.update({'model.layers.0.self_attn.q_proj.bias': np.ones(2)}),
     r'does not account for, first model\.layers\.0\.self_attn\.q_proj\.bias'),
    (lambda t: t.update({'model.norm.weight': np.ones(9, np.float32)}),
     r'model\.norm\.weight has shape \(9,\), config.json asks for \(8,\)'),
    (lambda t: t.update({'model.norm.weight': np.ones(8, np.int8)}),
     r'model\.norm\.weight is I8'),
])
def test_tensors_that_do_not_fit_are_named(tmp_path, tensors, spoil, message):
  spoil(tensors)
  with pytest.raises(types.UserError, match=message):
    huggingface.load(write(tmp_path / 'a', CONFIG, tensors))


def test_a_transposed_tensor_is_not_taken_for_the_right_one(tmp_path, tensors):
  name = 'model.layers.0.mlp.gate_proj.weight'
  tensors[name] = np.ascontiguousarray(tensors[name].T)
  with pytest.raises(types.UserError, match=r'gate_proj.*\(8, 12\).*\(12, 8\)'):
    huggingface.load(write(tmp_path / 'a', CONFIG, tensors))


@pytest.mark.parametrize('lost_bytes', [1, 500, 10_000])
def test_a_truncated_file_is_refused(tmp_path, tensors, lost_bytes):
  path = write(tmp_path / 'a', CONFIG, tensors) / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-lost_bytes])
  with pytest.raises(types.UserError, match=r'cannot read .*model\.safeten'):
    huggingface.load(tmp_path / 'a')


@pytest.mark.parametrize('change, message', [
    ({'model_type': 'llama'}, "model_type='llama' is not supported"),
    ({'model_type': None}, 'model_type=None is not supported'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}},
     'rope_scaling=.*yarn.* is not supported'),
    ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e6}},
     'rope_scaling=.*yarn.* is not supported'),
    ({'attention_bias': True}, 'attention_bias=True is not supported'),
    ({'use_sliding_window': True}, 'use_sliding_window=True is not'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config=.*bits'),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported"),
    ({'head_dim': None}, 'head_dim=None must be given, as int'),
    ({'vocab_size': '20'}, "vocab_size='20' must be given, as int"),
    ({'num_key_value_heads': 4}, 'num_heads=6 is not a multiple'),
])
def test_a_config_the_network_does_not_implement_is_refused(
    tmp_path, tensors, change, message):
  directory = write(tmp_path / 'a', CONFIG | change, tensors)
  with pytest.raises(types.UserError, match=message):
    huggingface.load(directory)


def test_newer_files_keep_theta_in_rope_parameters(tmp_path, tensors):
  config = {k: v for k, v in CONFIG.items() if k != 'rope_theta'}
  config['rope_parameters'] = {'rope_type': 'default', 'rope_theta': 5e5}
  _, model = huggingface.load(write(tmp_path / 'a', config, tensors))
  assert model.rope_theta == 5e5


@pytest.mark.parametrize('content', [None, 'not json', '[1]'])
def test_a_directory_without_a_readable_config_is_refused(tmp_path, content):
  if content is not None:
    (tmp_path / 'config.json').write_text(content)
  with pytest.raises(types.UserError, match=r'config\.json'):
    huggingface.load(tmp_path)


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path, tensors):
  params, config = huggingface.load(write(tmp_path / 'a', CONFIG, tensors))
  source = tmp_path / 'tokenizer'
  source.mkdir()
  (source / 'tokenizer.model').write_bytes(b'\x00pieces')
  (source / 'model.safetensors').write_bytes(b'other weights')
  huggingface.save(tmp_path / 'b', params, config, tokenizer_directory=source)
  assert (tmp_path / 'b' / 'tokenizer.model').read_bytes() == b'\x00pieces'
  assert {path.name for path in (tmp_path / 'b').iterdir()} == {
      'config.json', 'generation_config.json', 'model.safetensors',
      'tokenizer.model'}
  with pytest.raises(types.UserError, match='no tokenizer files'):
    huggingface.save(
        tmp_path / 'c', params, config, tokenizer_directory=tmp_path / 'a')
  assert not (tmp_path / 'c').exists()


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, tensors):
  directory = write(tmp_path / 'a', CONFIG, tensors)
  params, config = huggingface.load(directory)
  before = (directory / 'model.safetensors').read_bytes()
  full = mock.patch.object(
      safetensors.numpy, 'save_file',
      side_effect=OSError(28, 'No space left on device'))
  with full, pytest.raises(types.UserError, match='No space left'):
    huggingface.save(directory, params, config)
  assert (directory / 'model.safetensors').read_bytes() == before
  assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_saving_replaces_a_checkpoint_and_debris_of_a_killed_save(
    tmp_path, tensors):
  directory = write(tmp_path / 'a', CONFIG, tensors)
  shutil.copytree(directory, tmp_path / 'a.tmp')
  shutil.copytree(directory, tmp_path / 'a.old')
  params, config = huggingface.load(directory)
  params['final_norm'] = params['final_norm'] + 1.0
  huggingface.save(directory, params, config)
  loaded, _ = huggingface.load(directory)
  np.testing.assert_array_equal(loaded['final_norm'], params['final_norm'])
  assert [path.name for path in tmp_path.iterdir()] == ['a']

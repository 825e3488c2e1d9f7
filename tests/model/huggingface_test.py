import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from longjax import rows, types
from longjax.model import (
    architecture,
    compute,
    head,
    huggingface,
    huggingface_layout,
    huggingface_reading,
    parameters,
    tensor_file,
    transformer,
)
from longjax.parallel import mesh, rules
from tests import tiny_model
from tests.model import checkpoints, numpy_qwen3

CONFIG = checkpoints.QWEN3 | {
    'head_dim': 4, 'hidden_size': 8, 'intermediate_size': 12,
    'num_attention_heads': 6, 'vocab_size': 20}
ROOT = pathlib.Path(__file__).parent.parent.parent
TIED = CONFIG | {'tie_word_embeddings': True}
write = checkpoints.write


@pytest.fixture
def tensors():
  return checkpoints.random_tensors(CONFIG)


@pytest.mark.parametrize('config', [CONFIG, TIED], ids=['untied', 'tied'])
def test_loaded_weights_predict_what_float64_numpy_predicts(tmp_path, config):
  tensors = checkpoints.random_tensors(config)
  params, model = huggingface.load(write(tmp_path / 'a', config, tensors))
  tokens = np.random.default_rng(1).integers(0, config['vocab_size'], 17)
  meta = rows.TokenMeta(
      group=jnp.zeros((1, 17), jnp.int32), branch=jnp.zeros((1, 17), jnp.int32),
      position=jnp.arange(17)[None])
  one_device = rules.Rules(mesh.make(mesh.MeshConfig(), jax.devices()[:1]))
  hidden = transformer.hidden_states(
      params, jnp.int32(tokens)[None], meta, config=model, rules=one_device,
      compute=compute.Compute()).states
  got = head.logits(hidden, parameters.head_weights(params))[0]
  want = numpy_qwen3.logits(tensors, config, tokens)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('family', checkpoints.FAMILIES)
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16, np.float16])
def test_saving_what_was_loaded_gives_the_same_bits(tmp_path, family, dtype):
  config = checkpoints.FAMILIES[family]
  tensors = {
      name: value.astype(dtype)
      for name, value in checkpoints.random_tensors(config).items()}
  source = write(tmp_path / 'a', config, tensors)
  assert huggingface.stored_dtype(source) == dtype
  params, model = huggingface.load(source, dtype=dtype)
  assert jax.tree.leaves(params)[0].dtype == dtype
  huggingface.save(tmp_path / 'b', params, model)
  again = safetensors.numpy.load_file(tmp_path / 'b' / 'model.safetensors')
  assert again.keys() == tensors.keys()
  for name, value in tensors.items():
    assert again[name].dtype == dtype
    np.testing.assert_array_equal(again[name], value, err_msg=name)
  # Read into float32 nothing is lost either.
  params, model = huggingface.load(source)
  huggingface.save(tmp_path / 'c', params, model, dtype=dtype)
  assert (tmp_path / 'c' / 'model.safetensors').read_bytes() == (
      tmp_path / 'b' / 'model.safetensors').read_bytes()


def test_parameters_saved_and_loaded_are_the_same_bits(tmp_path):
  config = architecture.ModelConfig(
      vocab_size=20, embed_dim=8, ffn_dim=12, num_layers=2, num_heads=4,
      num_kv_heads=2, head_dim=6, rope_theta=12345.0, norm_epsilon=1e-5)
  params = parameters.init(config, jax.random.key(0))
  huggingface.save(tmp_path / 'a', params, config, stop_ids=(7, 5), pad_id=0)
  loaded, loaded_config = huggingface.load(tmp_path / 'a')
  assert loaded_config == config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  written = json.loads((tmp_path / 'a' / 'config.json').read_text())
  assert written['architectures'] == ['Qwen3ForCausalLM']
  assert (written['eos_token_id'], written['pad_token_id']) == (7, 0)
  generation = tmp_path / 'a' / 'generation_config.json'
  assert json.loads(generation.read_text()) == {
      'eos_token_id': [7, 5], 'pad_token_id': 0}


@pytest.mark.parametrize('family, sizes, staged_bytes', [
    ('dense_untied', {'data': 2, 'fsdp': 2, 'tensor': 2}, 1 << 28),
    ('dense_tied', {'data': 2, 'fsdp': 2, 'tensor': 2}, 4096),
    ('qwen2', {'fsdp': 4, 'tensor': 2}, 700),
    ('moe', {'expert': 4, 'fsdp': 2}, 4096),
    ('moe', {'expert': 2, 'seq': 2, 'tensor': 2}, 1 << 28),
])
def test_each_device_holds_its_part_of_what_one_device_would(
    tmp_path, monkeypatch, family, sizes, staged_bytes):
  config = checkpoints.FAMILIES[family]
  tensors = checkpoints.random_tensors(config)
  directory = write(tmp_path / 'a', config, tensors)
  made = tiny_model.rules(**sizes)
  alone, model = huggingface.load(directory)
  monkeypatch.setattr(huggingface_reading, 'STAGED_BYTES', staged_bytes)
  spread, _ = huggingface.load(directory, rules=made)
  jax.tree.map(np.testing.assert_array_equal, spread, alone)
  assert jax.tree.map(lambda x: x.sharding, spread) == made.tree_shardings(
      parameters.axes(model), parameters.abstract(model))
  huggingface.save(tmp_path / 'b', spread, model, max_file_bytes=30_000)
  again, _ = huggingface.load(tmp_path / 'b')
  jax.tree.map(np.testing.assert_array_equal, again, alone)


def test_tensors_of_several_dtypes_are_one_parameter(tmp_path, tensors):
  want, _ = huggingface.load(write(tmp_path / 'a', CONFIG, tensors))
  for i, name in enumerate(tensors):
    tensors[name] = tensors[name].astype(
        [np.float32, ml_dtypes.bfloat16][i % 2])
  got, _ = huggingface.load(write(tmp_path / 'b', CONFIG, tensors))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert huggingface.stored_dtype(tmp_path / 'b') == np.float32


def test_several_files_behind_an_index_are_one_checkpoint(tmp_path, tensors):
  alone, model = huggingface.load(write(tmp_path / 'a', CONFIG, tensors))
  split = write(tmp_path / 'b', CONFIG, tensors, num_files=2)
  jax.tree.map(
      np.testing.assert_array_equal, huggingface.load(split)[0], alone)
  huggingface.save(tmp_path / 'c', alone, model, max_file_bytes=2000)
  index = json.loads(
      (tmp_path / 'c' / 'model.safetensors.index.json').read_text())
  files = sorted((tmp_path / 'c').glob('*.safetensors'))
  assert [path.name for path in files] == [
      f'model-{i + 1:05}-of-{len(files):05}.safetensors'
      for i in range(len(files))]
  assert len(files) > 3
  again = {}
  for path in files:
    part = safetensors.numpy.load_file(path)
    assert {index['weight_map'][name] for name in part} == {path.name}
    assert sum(x.nbytes for x in part.values()) <= 2000
    again |= part
  assert again.keys() == tensors.keys() == index['weight_map'].keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(again[name], value)
  assert index['metadata']['total_size'] == sum(
      x.nbytes for x in tensors.values())


NAME = 'model.layers.0.mlp.up_proj.weight'


@pytest.mark.parametrize('change, message', [
    ({NAME: 'model-00003-of-00003.safetensors'}, 'model-00003-of-00003'),
    ({NAME: 'model-00001-of-00002.safetensors',
      'model.norm.weight': 'model-00001-of-00002.safetensors'},
     'says that .* is in model-00001-of-00002.safetensors, but it is '),
    ({NAME: '../model.safetensors'}, 'is no file of it'),
    ({'model.extra': 'model-00001-of-00002.safetensors'},
     'says that model.extra is in model-00001-of-00002.safetensors, but it '),
    ({NAME: None}, 'is in None, but it is in model-0000'),
])
def test_an_index_that_does_not_agree_with_its_files_is_refused(
    tmp_path, tensors, change, message):
  directory = write(tmp_path / 'a', CONFIG, tensors, num_files=2)
  path = directory / 'model.safetensors.index.json'
  weight_map = json.loads(path.read_text())['weight_map'] | change
  path.write_text(json.dumps({'weight_map': {
      k: v for k, v in weight_map.items() if v is not None}}))
  with pytest.raises(types.UserError, match=message):
    huggingface.load(directory)


def test_a_tied_checkpoint_may_store_its_head_too(tmp_path):
  tensors = checkpoints.random_tensors(TIED)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  params, _ = huggingface.load(write(tmp_path / 'a', TIED, tensors))
  assert 'head' not in params
  tensors['lm_head.weight'][0, 0] += 1.0
  with pytest.raises(types.UserError, match=r'lm_head\.weight'):
    huggingface.load(write(tmp_path / 'a', TIED, tensors))


@pytest.mark.parametrize('spoil, message', [
    (lambda t: t.pop('model.layers.1.mlp.up_proj.weight'),
     r'lacks 1 tensors, first model\.layers\.1\.mlp\.up_proj\.weight'),
    (lambda t: t.update(
        {'model.layers.0.self_attn.q_proj.bias': np.ones(2, np.float32)}),
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


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path, tensors):
  params, config = huggingface.load(write(tmp_path / 'a', CONFIG, tensors))
  source = tmp_path / 'tokenizer'
  source.mkdir()
  (source / 'tokenizer.model').write_bytes(b'\x00pieces')
  (source / 'model.safetensors').write_bytes(b'other weights')
  huggingface.save(tmp_path / 'b', params, config, source=source)
  assert (tmp_path / 'b' / 'tokenizer.model').read_bytes() == b'\x00pieces'
  assert {path.name for path in (tmp_path / 'b').iterdir()} == {
      'config.json', 'generation_config.json', 'model.safetensors',
      'tokenizer.model'}
  with pytest.raises(types.UserError, match='no tokenizer files'):
    huggingface.save(
        tmp_path / 'c', params, config, source=tmp_path / 'a')
  assert not (tmp_path / 'c').exists()


def source_directory(path, config, **files):
  write(path, config, checkpoints.random_tensors(config))
  for name, content in files.items():
    path.joinpath(name.replace('__', '.')).write_text(content)
  return path


def test_what_a_source_says_beside_the_maths_is_carried_along(tmp_path):
  generation = {'eos_token_id': [5, 6], 'temperature': 0.6}
  config = checkpoints.QWEN2 | {'max_position_embeddings': 777}
  source = source_directory(
      tmp_path / 'a', config, tokenizer__json='{}',
      generation_config__json=json.dumps(generation),
      chat_template__jinja='hello')
  params, model = huggingface.load(source)
  huggingface.save(
      tmp_path / 'b', params, model, source=source, stop_ids=(9, 5),
      pad_id=0,      dtype=np.float16)
  saved = tmp_path / 'b'
  # A base model ends texts with other tokens than turns end with.
  assert json.loads((saved / 'generation_config.json').read_text()) == (
      generation | {'eos_token_id': [5, 6, 9], 'pad_token_id': 0})
  assert (saved / 'tokenizer.json').read_text() == '{}'
  assert (saved / 'chat_template.jinja').read_text() == 'hello'
  written = json.loads((saved / 'config.json').read_text())
  assert {k: v for k, v in config.items()
          if written.get(k, v) != v} == {'torch_dtype': 'bfloat16'}
  assert config.keys() - written.keys() == {'use_mrope'}
  assert written['torch_dtype'] == 'float16'
  assert written['pad_token_id'] == 0
  assert huggingface.load(saved)[1] == model


def test_without_a_generation_config_that_of_the_config_stops_too(tmp_path):
  source = source_directory(tmp_path / 'a', CONFIG, tokenizer__json='{}')
  params, model = huggingface.load(source)
  huggingface.save(tmp_path / 'b', params, model, source=source, stop_ids=(9,))
  written = json.loads((tmp_path / 'b' / 'generation_config.json').read_text())
  assert written == {'bos_token_id': 1, 'eos_token_id': [2, 9]}


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, tensors):
  directory = write(tmp_path / 'a', CONFIG, tensors)
  params, config = huggingface.load(directory)
  before = (directory / 'model.safetensors').read_bytes()
  full = mock.patch.object(
      tensor_file.Writer, 'write',
      side_effect=OSError(errno.ENOSPC, 'No space left on device'))
  with full, pytest.raises(types.UserError, match='No space left'):
    huggingface.save(directory, params, config)
  assert (directory / 'model.safetensors').read_bytes() == before
  assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_a_network_of_no_family_is_not_saved(tmp_path):
  config = architecture.ModelConfig(
      vocab_size=20, embed_dim=8, ffn_dim=12, num_layers=1, num_heads=2,
      num_kv_heads=2, head_dim=4, qk_norm=False)
  params = parameters.init(config, jax.random.key(0))
  with pytest.raises(types.UserError, match='no family of Hugging Face'):
    huggingface.save(tmp_path / 'a', params, config)
  assert list(tmp_path.iterdir()) == []


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


# Reads a checkpoint and saves it; tells in bytes how far NumPy's memory and
# that of the process rose above the parameters.
MEASURE = """
import json, pathlib, sys, tracemalloc
import jax
from longjax.model import huggingface, huggingface_reading
from tests import tiny_model

def status(field):
  text = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(text.split(field + ':')[1].split()[0])

def measure(work):
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  tracemalloc.reset_peak()
  before, numpy_before = status('VmRSS'), tracemalloc.get_traced_memory()[0]
  made = jax.block_until_ready(work())
  size = sum(x.nbytes for x in jax.tree.leaves(made))
  numpy = tracemalloc.get_traced_memory()[1] - numpy_before
  return made, {'numpy': numpy, 'all': status('VmHWM') - before - size}

source, out = sys.argv[1:]
huggingface_reading.STAGED_BYTES = 2_000_000
rules = tiny_model.rules(data=1, fsdp=2)
config = huggingface.huggingface_config.load(source)
tracemalloc.start()
params, reading = measure(lambda: huggingface.load(source, rules=rules)[0])
_, writing = measure(
    lambda: huggingface.save(out, params, config, dtype='bfloat16'))
print(json.dumps([reading, writing]))
"""


@pytest.mark.skipif(
    not os.access('/proc/self/clear_refs', os.W_OK), reason='needs Linux')
def test_the_host_never_holds_more_than_pieces_of_a_parameter(tmp_path):
  config = CONFIG | {
      'hidden_size': 512, 'intermediate_size': 2048, 'num_hidden_layers': 32,
      'num_attention_heads': 8, 'head_dim': 64, 'vocab_size': 4000}
  shapes = checkpoints.shapes(config)
  # One tensor of each shape is enough: values do not matter.
  values = {
      shape: np.random.default_rng(0).normal(size=shape).astype(
          ml_dtypes.bfloat16) for shape in shapes.values()}
  source = write(tmp_path / 'a', config, {
      name: values[shape] for name, shape in shapes.items()})
  stored = (source / 'model.safetensors').stat().st_size
  largest = 4000 * 512 * 2
  assert stored > 60 * largest
  done = subprocess.run(
      [sys.executable, '-c', MEASURE, str(source), str(tmp_path / 'b')],
      text=True, check=True, stdout=subprocess.PIPE, cwd=ROOT,
      env=os.environ | {
          'JAX_PLATFORMS': 'cpu',
          'XLA_FLAGS': '--xla_force_host_platform_device_count=2'})
  shutil.rmtree(tmp_path)
  for measured in json.loads(done.stdout):
    # Stored, turned and cast; a whole parameter would be 67 MB.
    assert measured['numpy'] < 3 * largest, done.stdout
    # The compiler takes some 85 MB whatever the model.
    assert measured['all'] < 0.6 * stored, done.stdout


QWEN3_30B_A3B = architecture.ModelConfig(
    vocab_size=151_936, embed_dim=2048, ffn_dim=768, num_layers=48,
    num_heads=32, num_kv_heads=4, head_dim=128,
    moe=architecture.MoeConfig(num_experts=128, num_active=8))
QWEN3_235B_A22B = architecture.ModelConfig(
    vocab_size=151_936, embed_dim=4096, ffn_dim=1536, num_layers=94,
    num_heads=64, num_kv_heads=4, head_dim=128,
    moe=architecture.MoeConfig(num_experts=128, num_active=8))
QWEN3_32B = architecture.ModelConfig(
    vocab_size=151_936, embed_dim=5120, ffn_dim=25_600, num_layers=64,
    num_heads=64, num_kv_heads=8, head_dim=128)


@pytest.mark.parametrize('model, num_billions', [
    (QWEN3_30B_A3B, 30.5), (QWEN3_235B_A22B, 235.1), (QWEN3_32B, 32.8)])
@pytest.mark.parametrize('num_parts', [1, 8])
def test_reading_a_large_model_needs_little_of_the_host(
    model, num_billions, num_parts):
  layouts = jax.tree.leaves(huggingface_layout.layouts(model))
  count = sum(np.prod(layout.shape) for layout in layouts)
  assert round(count / 1e9, 1) == num_billions
  stored, cast = 2, 4  # Bytes of bfloat16 and float32.
  most, largest = 0, 0
  for layout in layouts:
    largest = max(largest, stored * np.prod(layout.tensor_shape))
    # In stored order; cut along the columns or, a vector, along the rows.
    size = [layout.shape[d] for d in layout.order]
    cut = layout.num_stacked + (len(layout.rows) if layout.columns else 0)
    if size[cut] % num_parts == 0:
      size[cut] //= num_parts
    for block in huggingface_reading.blocks(layout, size, stored * num_parts):
      elements = num_parts * np.prod([last - first for first, last in block])
      # A parameter of one block is turned and cast on the host.
      most = max(most, int(elements) * (stored + cast))
  assert most < 2e9 < largest + 2e9 < 6e9


def test_saving_a_large_model_holds_one_layer_of_one_parameter():
  most = max(
      4 * np.prod(layout.shape[1 if layout.num_stacked else 0:])
      for layout in jax.tree.leaves(
          huggingface_layout.layouts(QWEN3_30B_A3B)))
  assert most < 1.3e9

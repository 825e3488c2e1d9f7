"""Tests for longjax.train.merge_job."""

import errno
import json
import shutil
import tracemalloc
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from longjax import types
from longjax.model import huggingface, merge, tensor_file
from longjax.train import convert_job, merge_job
from tests import saved_run, tiny_model, two_processes
from tests.model import checkpoints

SCE = merge.MergeConfig(density=0.5)
NAME = 'model.layers.1.mlp.up_proj.weight'


def trained(tensors, seed):
  """Other weights that a third of all elements differ from, coarsely."""
  rng = np.random.default_rng(seed)
  return {
      name: np.float32(x + np.round(rng.normal(size=x.shape)) / 64)
      for name, x in tensors.items()}


def write(directory, config, tensors, *, dtype=np.float32, num_files=1):
  checkpoints.write(
      directory, config, {k: v.astype(dtype) for k, v in tensors.items()},
      num_files=num_files)
  (directory / 'tokenizer.json').write_text('{}')
  return directory


def models(folder, config=checkpoints.QWEN3, *, dtype=np.float32):
  """Base and two experts, as directories, the last in several files."""
  tensors = checkpoints.random_tensors(config)
  return [
      write(folder / name, config, made, dtype=dtype, num_files=num_files)
      for name, made, num_files in (
          ('base', tensors, 1), ('a', trained(tensors, 1), 1),
          ('b', trained(tensors, 2), 3))]


def stored(directory):
  found = {}
  for path in directory.glob('*.safetensors'):
    found |= safetensors.numpy.load_file(path)
  return found


def files(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def run(base, experts, output, **changes):
  return merge_job.run(merge_job.MergeJobConfig(
      base=str(base), experts=tuple(map(str, experts)), output=str(output),
      **{'merge': SCE} | changes))


@pytest.mark.parametrize('config', [
    SCE, merge.MergeConfig(method='ties', density=0.3, weights=(0.6, 0.4))])
@pytest.mark.parametrize('family', ['dense_untied', 'moe', 'qwen2'])
def test_every_tensor_is_merged_by_itself(tmp_path, family, config):
  base, *experts = models(tmp_path, checkpoints.FAMILIES[family])
  run(base, experts, tmp_path / 'out', merge=config, max_file_bytes=30_000)
  got, inputs = stored(tmp_path / 'out'), list(map(stored, (base, *experts)))
  assert got.keys() == inputs[0].keys()
  for name, value in got.items():
    want = merge.matrix(
        inputs[0][name], [x[name] for x in inputs[1:]], config=config)
    np.testing.assert_array_equal(value, want.value, err_msg=name)
    assert np.any(value != inputs[0][name])
  # Other programs find the layers in order, whatever order they were made in.
  names = sorted((tmp_path / 'out').glob('*.safetensors'))
  assert len(names) > 3
  assert NAME not in safetensors.numpy.load_file(names[0])
  huggingface.load(tmp_path / 'out')


def test_a_tied_head_is_merged_once(tmp_path):
  config = checkpoints.FAMILIES['dense_tied']
  base, *experts = models(tmp_path, config)
  run(base, experts, tmp_path / 'out')
  # Some programs store both.
  for i, directory in enumerate(experts):
    tensors = stored(directory)
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
    experts[i] = write(tmp_path / f'both{i}', config, tensors)
  run(base, experts, tmp_path / 'again')
  assert 'lm_head.weight' not in stored(tmp_path / 'out')
  assert files(tmp_path / 'out') == files(tmp_path / 'again')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A base model, and the work directory of a run that began with it."""
  folder = tmp_path_factory.mktemp('runs')
  begin = saved_run.begin(folder / 'tokenizer')
  params = begin.load()
  huggingface.save(
      folder / 'base', params, begin.model, source=folder / 'tokenizer')
  workdir = folder / 'run'
  workdir.mkdir()
  saved_run.write(workdir, begin, {
      step: jax.tree.map(
          lambda x, y: x + np.round(3 * y) / 64, params,
          tiny_model.params(step, begin.model)) for step in (2, 4)},
      init_from=str(folder / 'base'), model=None)
  return folder / 'base', workdir


def test_checkpoints_are_merged_as_hugging_face_directories(runs, tmp_path):
  base, workdir = runs
  steps = [workdir / 'checkpoints' / '2', workdir]
  run(base, steps, tmp_path / 'out')
  for i, step in enumerate(steps):
    convert_job.run(convert_job.ConvertConfig(
        source=str(step), output=str(tmp_path / f'{i}')))
  run(base, [tmp_path / '0', tmp_path / '1'], tmp_path / 'other')
  assert files(tmp_path / 'out') == files(tmp_path / 'other')
  # And as the stacked arrays.
  trees = [huggingface.load(x)[0]
           for x in (base, tmp_path / '0', tmp_path / '1')]
  got, model = huggingface.load(tmp_path / 'out')
  jax.tree.map(
      np.testing.assert_array_equal, got,
      merge.tree(trees[0], trees[1:], model, config=SCE))


def test_a_checkpoint_is_read_a_parameter_at_a_time(runs, tmp_path):
  base, workdir = runs
  restored = []
  restore = merge_job.model_files.ocp.PyTreeCheckpointHandler.restore

  def recorded(self, *arguments, **keywords):
    made = restore(self, *arguments, **keywords)
    restored.append(jax.tree.map(np.shape, jax.tree.leaves(made)))
    return made

  with mock.patch.object(
      merge_job.model_files.ocp.PyTreeCheckpointHandler, 'restore', recorded):
    run(base, [workdir], tmp_path / 'out', merge=merge.MergeConfig())
  assert len(restored) == len(jax.tree.leaves(huggingface.load(base)[0]))
  assert all(len(shapes) == 1 for shapes in restored)


def test_dtypes_are_those_of_the_base_or_chosen(tmp_path):
  config = checkpoints.QWEN3
  base, a, _ = models(tmp_path, config, dtype=ml_dtypes.bfloat16)
  b = write(tmp_path / 'wide', config, {
      k: v * np.float32(1.001) for k, v in stored(a).items()})
  summary = merge_job.merge_directories(
      base, [a, b], tmp_path / 'short', config=merge.MergeConfig())
  assert summary.dtype == jnp.bfloat16
  run(base, [a, b], tmp_path / 'long', dtype='float32',
      merge=merge.MergeConfig())
  short, long = (stored(tmp_path / name) for name in ('short', 'long'))
  for name, value in long.items():
    assert value.dtype == np.float32
    np.testing.assert_array_equal(
        short[name], value.astype(ml_dtypes.bfloat16))
  assert any(np.any(short[name] != value) for name, value in long.items())


def test_what_experts_end_with_is_carried_along_with_the_base(tmp_path):
  base, a, b = models(tmp_path)
  for directory, ids in ((base, 5), (a, [5, 7]), (b, 0)):
    (directory / 'generation_config.json').write_text(json.dumps({
        'eos_token_id': ids, 'temperature': ids} | (
            {'pad_token_id': 3} if directory == b else {})))
    (directory / 'chat_template.jinja').write_text(directory.name)
  run(base, [a, b], tmp_path / 'out')
  assert (tmp_path / 'out' / 'chat_template.jinja').read_text() == 'base'
  assert json.loads(
      (tmp_path / 'out' / 'generation_config.json').read_text()) == {
          'eos_token_id': [5, 7, 0], 'pad_token_id': 3, 'temperature': 5}
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert written['max_position_embeddings'] == 40960


def test_the_mean_coefficients_count_every_parameter(tmp_path, capsys):
  base, a, b = models(tmp_path)
  summary = merge_job.merge_directories(
      base, [a, b], tmp_path / 'out', config=SCE, description='stage 5')
  inputs = list(map(stored, (base, a, b)))
  sizes = {name: x.size for name, x in inputs[0].items()}
  want = np.average(
      [merge.matrix(inputs[0][name], [x[name] for x in inputs[1:]],
                    config=SCE).coefficients for name in sizes],
      axis=0, weights=list(sizes.values()))
  np.testing.assert_allclose(summary.coefficients, want, rtol=1e-12)
  count = f'{sum(sizes.values()):,}'
  assert summary.num_parameters == sum(sizes.values())
  told = capsys.readouterr().err
  assert f'stage 5: 0/{count} parameters (0%)\n' in told
  assert f'stage 5: {count}/{count} parameters (100%) | ' in told


def test_one_tensor_is_held_at_a_time(tmp_path, monkeypatch):
  config = checkpoints.QWEN3 | {
      'hidden_size': 128, 'intermediate_size': 2048, 'num_hidden_layers': 12,
      'vocab_size': 2048}
  shapes = checkpoints.shapes(config)
  directories = []
  for i, name in enumerate('abc'):
    # One tensor of each shape is enough.
    values = {shape: np.random.default_rng(i).normal(size=shape)
              for shape in shapes.values()}
    directories.append(write(tmp_path / name, config, {
        name: values[shape] for name, shape in shapes.items()},
        dtype=ml_dtypes.bfloat16))
  size = (directories[0] / 'model.safetensors').stat().st_size
  largest = 2 * 2048 * 128  # As many others.
  monkeypatch.setattr(merge, '_BLOCK_LEN', 4096)
  peaks = []
  for density in (1.0, 1.0, 0.5):  # The first time jax keeps what it traced.
    tracemalloc.start()
    merge_job.merge_directories(
        directories[0], directories[1:], tmp_path / 'out',
        config=merge.MergeConfig(density=density))
    peaks.append(tracemalloc.get_traced_memory()[1] / largest)
    tracemalloc.stop()
  shutil.rmtree(tmp_path)
  # Three tensors that are read and one that is made; to select, instead of the
  # latter, variances, twice, and masks. One more would be headers and such.
  assert peaks[1] < 5.5 and peaks[2] < 8.2, peaks
  assert size > 30 * largest


def spoil(directory, change):
  """Writes a model again whose tensors, or fields, were changed."""
  config = json.loads((directory / 'config.json').read_text())
  tensors = stored(directory)
  change(config, tensors)
  shutil.rmtree(directory)
  write(directory, config, tensors)


@pytest.mark.parametrize('change, message', [
    ({'base': ''}, 'base is empty; set --config.base=DIRECTORY'),
    ({'experts': ()}, 'experts is empty; set --config.experts=DIRECTORY,DIREC'),
    ({'output': ''}, 'output is empty; set --config.output='),
    ({'base': 'nowhere'}, 'base=nowhere holds no readable config.json'),
    ({'experts': ('a', 'nowhere')}, 'experts.1=nowhere holds no readable'),
    ({'output': 'a'}, 'output=a is not empty; choose another directory'),
    ({'output': 'gs://bucket/out'}, 'out is no directory on a disk; write to'),
    ({'experts': ('a', 'base')}, 'experts.1=.*base is the base; name as base'),
    ({'experts': ('a',)}, 'density=0.5 selects nothing of one expert'),
    ({'merge': merge.MergeConfig(method='ties', weights=(1.0,))},
     r'merge\.weights=\(1\.0,\) are 1 for 2 experts'),
])
def test_mistakes_are_named_and_leave_nothing(
    tmp_path, monkeypatch, change, message):
  monkeypatch.chdir(tmp_path)
  models(tmp_path)
  before = {path: path.read_bytes() for path in tmp_path.rglob('*.*')}
  values = {'base': 'base', 'experts': ('a', 'b'), 'output': 'out',
            'merge': SCE}
  with pytest.raises(types.UserError, match=message) as error:
    merge_job.run(merge_job.MergeJobConfig(**values | change))
  assert '\n' not in str(error.value)
  assert before == {path: path.read_bytes() for path in tmp_path.rglob('*.*')}


@pytest.mark.parametrize('change, message', [
    (lambda config, tensors: tensors.pop(NAME), f'b lacks 1 tensors, .*{NAME}'),
    (lambda config, tensors: tensors.update({NAME: tensors[NAME].T.copy()}),
     rf'b: {NAME} has shape \(32, 48\), config.json asks for \(48, 32\)'),
    (lambda config, tensors: tensors.update(
        {'lm_head.bias': np.zeros(96, np.float32)}), 'first lm_head.bias'),
    (lambda config, tensors: config.update(rope_theta=5e5),
     r'experts.1=.*b has rope_theta=500000.0, but base=.*has rope_theta=1000'),
    (lambda config, tensors: tensors[NAME].fill(np.nan),
     f'{NAME} would not be finite in float32; choose another'),
])
def test_models_that_do_not_fit_are_named_and_nothing_is_written(
    tmp_path, change, message):
  base, a, b = models(tmp_path)
  spoil(b, change)
  with pytest.raises(types.UserError, match=message):
    run(base, [a, b], tmp_path / 'out')
  assert {path.name for path in tmp_path.iterdir()} == {'base', 'a', 'b'}


def test_values_beyond_the_dtype_are_named(tmp_path):
  base, a, b = models(tmp_path)
  for directory in (a, b):
    spoil(directory, lambda _, tensors: tensors[NAME].fill(1e6))
  with pytest.raises(types.UserError, match=f'{NAME} .*finite in float16'):
    run(base, [a, b], tmp_path / 'out', dtype='float16',
        merge=merge.MergeConfig(method='linear'))


def test_the_old_output_stays_until_the_new_one_is_whole(tmp_path):
  base, a, b = models(tmp_path)
  merge_job.merge_directories(base, [a, b], tmp_path / 'out', config=SCE)
  before = files(tmp_path / 'out')
  full = mock.patch.object(
      tensor_file.Writer, 'close',
      side_effect=OSError(errno.ENOSPC, 'No space left on device'))
  config = merge.MergeConfig(method='linear')
  with full, pytest.raises(types.UserError, match='No space left'):
    merge_job.merge_directories(base, [a, b], tmp_path / 'out', config=config)
  assert files(tmp_path / 'out') == before
  merge_job.merge_directories(base, [a, b], tmp_path / 'out', config=config)
  assert files(tmp_path / 'out') != before
  assert {path.name for path in tmp_path.iterdir()} == {
      'base', 'a', 'b', 'out'}


def test_two_processes_write_what_one_does(runs, tmp_path):
  base, workdir = runs
  codes, told = two_processes.run(
      '--config=configs/merge.py', f'--config.base={base}',
      f'--config.experts={workdir},{workdir}/checkpoints/2',
      f'--config.output={tmp_path / "out"}', '--config.merge.density=0.5',
      num_devices=1)
  assert codes == [0, 0], told
  run(base, [workdir, workdir / 'checkpoints' / '2'], tmp_path / 'alone')
  assert files(tmp_path / 'out') == files(tmp_path / 'alone')
  assert 'parameters in float32, mean coefficients 0.' in told[0]
  assert 'parameters' not in told[1]

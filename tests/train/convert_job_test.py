"""Tests for longjax.train.convert_job."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from longjax import types
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import huggingface
from longjax.parallel import mesh as mesh_lib
from longjax.train import convert_job
from tests import saved_run, two_processes
from tests.model import checkpoints


def convert(source, output, **changes):
  return convert_job.run(convert_job.ConvertConfig(
      source=str(source), output=str(output), **changes))


def leaves(params):
  return [np.asarray(x) for x in jax.tree.leaves(params)]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A work directory, how it began, and the parameters at its two steps."""
  workdir = tmp_path_factory.mktemp('run')
  begin = saved_run.begin(workdir / 'tokenizer')
  params = begin.load()
  steps = {}
  for step in (2, 4):
    params = steps[step] = jax.tree.map(lambda x: x * 1.1, params)
  saved_run.write(workdir, begin, steps)
  return workdir, begin, steps


@pytest.mark.parametrize('mesh', [
    {'data': 1, 'fsdp': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_the_newest_checkpoint_is_written_bit_for_bit(run, tmp_path, mesh):
  workdir, begin, steps = run
  (tmp_path / 'out').mkdir()  # An empty one may be there.
  convert(workdir, tmp_path / 'out', mesh=mesh_lib.MeshConfig(
      **{'seq': 1, 'expert': 1, 'tensor': 1} | mesh))
  got, model = huggingface.load(tmp_path / 'out')
  assert model == begin.model
  for a, b in zip(leaves(got), leaves(steps[4]), strict=True):
    np.testing.assert_array_equal(a, b)
  generation = json.loads(
      (tmp_path / 'out' / 'generation_config.json').read_text())
  assert generation == {
      'eos_token_id': begin.tokenizer.stop_ids[0],
      'pad_token_id': begin.tokenizer.pad_id}
  assert tokenizer_lib.load(tmp_path / 'out').encode('words') == (
      begin.tokenizer.encode('words'))


def test_a_step_and_a_dtype_may_be_chosen(run, tmp_path):
  workdir, _, steps = run
  convert(workdir / 'checkpoints' / '2', tmp_path / 'out', dtype='bfloat16')
  tensors = safetensors.numpy.load_file(
      tmp_path / 'out' / 'model.safetensors')
  # Rounded as NumPy rounds.
  np.testing.assert_array_equal(
      tensors['model.embed_tokens.weight'],
      np.asarray(steps[2]['embedding']).astype(ml_dtypes.bfloat16))


def test_a_damaged_checkpoint_is_passed_over_and_left_alone(run, tmp_path):
  shutil.copytree(run[0], tmp_path / 'run')
  newest = tmp_path / 'run' / 'checkpoints' / '4'
  (newest / 'MANIFEST.json').write_text('{}')
  convert(tmp_path / 'run', tmp_path / 'out')
  got, _ = huggingface.load(tmp_path / 'out')
  assert abs(np.asarray(got['final_norm'][0]) - 1.1) < 1e-3
  assert newest.exists()
  with pytest.raises(types.UserError, match='checkpoints/4 is damaged'):
    convert(newest, tmp_path / 'other')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints')
  with pytest.raises(types.UserError, match='holds no whole checkpoint'):
    convert(tmp_path / 'run', tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize('family', ['moe', 'qwen2'])
def test_a_hugging_face_directory_is_written_in_other_files(tmp_path, family):
  config = checkpoints.FAMILIES[family]
  source = checkpoints.write(tmp_path / 'a', config, {
      k: v.astype(ml_dtypes.bfloat16)
      for k, v in checkpoints.random_tensors(config).items()}, num_files=3)
  (source / 'tokenizer.json').write_text('{}')
  # By default in the dtype it has.
  convert(source, tmp_path / 'b', max_file_bytes=20_000, mesh=
          mesh_lib.MeshConfig(data=-1))
  assert huggingface.stored_dtype(tmp_path / 'b') == jnp.bfloat16
  assert len(list((tmp_path / 'b').glob('*.safetensors'))) > 3
  convert(tmp_path / 'b', tmp_path / 'c', dtype='float32')
  written = safetensors.numpy.load_file(tmp_path / 'c' / 'model.safetensors')
  for name, value in checkpoints.random_tensors(config).items():
    np.testing.assert_array_equal(written[name], value)


def test_a_run_from_a_base_model_keeps_its_dtype_and_files(run, tmp_path):
  workdir, begin, _ = run
  base = tmp_path / 'base'
  huggingface.save(
      base, begin.load(), begin.model, dtype=jnp.bfloat16,
      source=workdir / 'tokenizer', stop_ids=(*begin.tokenizer.stop_ids, 7),
      pad_id=begin.tokenizer.pad_id)
  shutil.copytree(workdir, tmp_path / 'run')
  config = json.loads((workdir / 'config.json').read_text())
  (tmp_path / 'run' / 'config.json').write_text(
      json.dumps(config | {'init_from': str(base), 'model': None}))
  shutil.rmtree(tmp_path / 'run' / 'tokenizer')
  convert(tmp_path / 'run', tmp_path / 'out')
  assert huggingface.stored_dtype(tmp_path / 'out') == jnp.bfloat16
  assert (tmp_path / 'out' / 'generation_config.json').read_text() == (
      base / 'generation_config.json').read_text()


@pytest.mark.parametrize('change, message', [
    ({'source': ''}, 'source is empty; set --config.source=DIRECTORY'),
    ({'output': ''}, 'output is empty; set --config.output='),
    ({'source': 'nowhere'}, 'source=nowhere holds no readable config.json'),
    ({'output': '.'}, 'output=. is not empty; choose another directory'),
    ({'output': 'file'}, 'output=file is not empty; choose another directory'),
    ({'source': 'other'}, 'is neither the config of a run nor that of a model'),
    ({'source': 'list'}, 'is neither the config of a run nor that of a model'),
    ({'output': 'gs://bucket/out'}, 'out is no directory on a disk; write to'),
])
def test_mistakes_are_named_and_leave_nothing(
    run, tmp_path, monkeypatch, change, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('precious')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'config.json').write_text('{}')
  (tmp_path / 'list').mkdir()
  (tmp_path / 'list' / 'config.json').write_text('[]')
  with pytest.raises(types.UserError, match=message):
    convert_job.run(convert_job.ConvertConfig(
        **{'source': str(run[0]), 'output': 'out'} | change))
  assert {path.name for path in tmp_path.iterdir()} == {
      'file', 'list', 'other'}


@pytest.mark.parametrize('output', ['out', 'file/out'])
def test_two_processes_write_what_one_does(tmp_path, output):
  source = checkpoints.write(
      tmp_path / 'a', checkpoints.QWEN3_MOE,
      checkpoints.random_tensors(checkpoints.QWEN3_MOE))
  (source / 'tokenizer.json').write_text('{}')
  (tmp_path / 'file').write_text('')
  codes, told = two_processes.run(
      '--config=configs/convert.py', f'--config.source={source}',
      f'--config.output={tmp_path / output}', '--config.mesh.expert=2',
      '--config.max_file_bytes=100000', num_devices=2)
  if output == 'out':
    assert codes == [0, 0], told
    convert(source, tmp_path / 'alone', max_file_bytes=100_000)
    alone, together = (
        {path.name: path.read_bytes() for path in directory.iterdir()}
        for directory in (tmp_path / 'alone', tmp_path / 'out'))
    assert len(alone) > 4
    assert alone == together
  else:
    # All of them say that the files cannot be written.
    assert codes == [2, 2], told
    assert all('Not a directory' in text for text in told)

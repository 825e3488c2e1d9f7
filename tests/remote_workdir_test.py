"""A run whose work directory is gs://..., against a store in memory."""

import json
import logging
import shutil
import tempfile

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import backend

from longjax import command_line, recipe, types
from longjax import config as config_lib
from longjax.data import tokenizer as tokenizer_lib
from longjax.evals import selection
from longjax.model import huggingface
from longjax.rollout import engine
from longjax.train import (
  checkpoint,
  convert_job,
  initial,
  mirror,
  policies,
  rl_job,
  workdir,
)
from tests import object_store, tiny_model, tiny_recipe

URL = 'gs://bucket/runs/tiny'
# Checkpoints of global steps 2 | 4, 5.
RECIPE = {
    'recipe': ('synth', 'sft', 'rl', 'evals'), 'model.num_layers': 1,
    'stages.sft.steps': 2, 'stages.rl.steps': 3}


@pytest.fixture
def disk(monkeypatch, tmp_path):
  """Gives a run another machine, with an empty disk."""
  names = iter('abc')

  def change():
    path = tmp_path / 'disks' / next(names)
    path.mkdir(parents=True)
    monkeypatch.setattr(tempfile, 'tempdir', str(path))

  change()
  return change


@pytest.fixture(autouse=True)
def store(monkeypatch, disk):
  with object_store.running(monkeypatch) as found:
    yield found


def run():
  return recipe.run(
      tiny_recipe.config(RECIPE), URL, devices=jax.devices()[:1])


def names(store):
  return {p.removeprefix('/bucket/runs/tiny/') for p in store.store}


def test_a_killed_run_goes_on_elsewhere_and_ends_with_equal_bits(
    store, disk, tmp_path, monkeypatch, caplog):
  with tiny_recipe.shared_programs(tmp_path / 'programs'):
    assert tiny_recipe.run(tmp_path / 'whole', RECIPE) == 0
    sample = engine.Session.sample
    calls = []

    def dies(*args, **kwargs):
      calls.append(1)
      if len(calls) == 3:
        raise MemoryError
      return sample(*args, **kwargs)

    monkeypatch.setattr(engine.Session, 'sample', dies)
    with pytest.raises(MemoryError):
      run()
    assert {'data/', 'metrics.jsonl', 'evals/'} & names(store) == {
        'metrics.jsonl'}
    disk()
    with caplog.at_level(logging.INFO):
      assert run() == 0
    assert 'Resuming after step 2 of stage rl.' in caplog.messages
    assert f'Report: {URL}/report.html' in caplog.messages
    disk()
    copy = mirror.Mirror(URL)
    assert tiny_recipe.left_behind(copy.local) == tiny_recipe.left_behind(
        tmp_path / 'whole')
    # A finished run is reported, whoever asks.
    with caplog.at_level(logging.INFO):
      assert run() == 0
    assert f'{URL} holds this run, finished' in caplog.text
  found = names(store)
  assert {'config.json', 'run.json', 'report.html', 'evals/0_rl.json',
          'tokenizer/tokenizer.model', 'model/model.safetensors'} <= found
  assert {n.split('/')[1] for n in found if n.startswith('checkpoints/')} == {
      '4', '5'}
  assert any(n.startswith('tensorboard/') for n in found)


def test_another_config_is_refused_by_the_name_the_user_gave(store):
  copy = mirror.Mirror(URL)
  (copy.local / 'metrics.jsonl').write_text('')
  workdir.claim(copy.local / 'other', {'recipe': [], 'stages': {}, 'seed': 0})
  shutil.copy(copy.local / 'other' / 'config.json', copy.local)
  copy.publish()
  with pytest.raises(types.UserError, match=f'--workdir={URL} holds a run of'):
    run()


def test_only_what_changed_is_sent_and_only_what_is_listed_is_taken(
    store, disk, monkeypatch):
  copy = mirror.Mirror(URL)
  (copy.local / 'evals').mkdir()
  (copy.local / 'evals' / '0_base.json').write_text('{}')
  (copy.local / 'metrics.jsonl').write_text('1')
  (copy.local / 'old').write_text('')
  copy.publish()
  sent = []
  monkeypatch.setattr(mirror, '_copy', lambda a, b, copied=mirror._copy: (
      sent.append(b.name), copied(a, b)))
  (copy.local / 'metrics.jsonl').write_text('12')
  (copy.local / 'old').unlink()
  copy.publish()
  copy.publish()
  assert sent == ['metrics.jsonl']
  assert names(store) == {'evals/0_base.json', 'metrics.jsonl', 'MIRROR.json'}
  # A kill in the middle of the next upload.
  (mirror.epath.Path(URL) / 'model' / 'config.json').write_text('{}')
  (mirror.epath.Path(URL) / 'evals' / '0_base.json').unlink()
  disk()
  again = mirror.Mirror(URL)
  files = [p.name for p in again.local.rglob('*') if p.is_file()]
  assert files == ['metrics.jsonl']
  assert (again.local / 'metrics.jsonl').read_text() == '12'


def test_a_checkpoint_cut_before_its_commit_file_does_not_count(store):
  tree = {'x': jnp.arange(8.0)}
  with checkpoint.Checkpointer(f'{URL}/checkpoints') as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, tree, {'step': step})
  (mirror.epath.Path(URL) / 'checkpoints/3/commit_success.txt').unlink()
  content = store.store['/bucket/runs/tiny/checkpoints/2/MANIFEST.json']
  assert json.loads(content.getvalue())['files']
  with checkpoint.Checkpointer(f'{URL}/checkpoints') as checkpoints:
    found = checkpoints.restore_latest(jax.eval_shape(lambda: tree))
    assert found.info == {'step': 2}
    np.testing.assert_array_equal(found.tree['x'], tree['x'])
    name = next(
        n for n in names(store) if n.startswith('checkpoints/2/tree/d/'))
    (mirror.epath.Path(URL) / name).write_text('short')
    with pytest.raises(types.UserError, match='has 5 bytes instead of'):
      checkpoints.restore(2, jax.eval_shape(lambda: tree))


def test_a_run_in_a_store_is_converted_beside_its_local_copy(
    store, tmp_path):
  rules = tiny_model.rules()
  config = tiny_recipe.config(RECIPE)
  copy = mirror.Mirror(URL)
  workdir.claim(copy.local, config_lib.resolved(config))
  begin = initial.from_scratch(
      config.model, initialization='random', seed=0,
      directory=copy.local / 'tokenizer', texts=lambda: ['Some words. ' * 9],
      rules=rules)
  copy.publish()
  params = begin.load()
  with checkpoint.Checkpointer(f'{URL}/checkpoints') as checkpoints:
    checkpoints.save(1, {'train': {'params': params}}, {})
  (copy.local / 'unsent').write_text('')
  convert_job.run(convert_job.ConvertConfig(
      source=URL, output=str(tmp_path / 'out')))
  got, _ = huggingface.load(tmp_path / 'out')
  jax.tree.map(np.testing.assert_array_equal, got, params)
  assert tokenizer_lib.load(tmp_path / 'out').stop_ids == (
      begin.tokenizer.stop_ids)
  assert (copy.local / 'unsent').exists()


def test_a_run_in_a_store_begins_with_what_another_exported():
  folder = mirror.epath.Path(URL)
  (folder / 'config.json').write_text('of the run')
  (folder / 'model' / 'config.json').write_text('of the model')
  found = initial.find(URL)
  assert (found / 'config.json').read_text() == 'of the model'
  with pytest.raises(types.UserError, match="'gs://bucket/no' does not exist;"):
    initial.find('gs://bucket/no')


def test_what_a_store_answers_is_one_line(store, monkeypatch):
  class HttpError(Exception):
    pass

  def refuse(*args, **kwargs):
    raise HttpError('Anonymous caller, 401')

  monkeypatch.setattr(object_store.ObjectStore, '_open', refuse)
  for use in (lambda: command_line.open_workdir(URL), lambda: convert_job.run(
      convert_job.ConvertConfig(source=URL, output='out'))):
    with pytest.raises(
        types.UserError, match=f'cannot use {URL}: Anonymous caller, 401'):
      use()


def test_a_base_model_in_a_store_is_copied_without_strange_weights():
  source = mirror.epath.Path('gs://bucket/base')
  for name in ('config.json', 'model.safetensors', 'pytorch_model.bin'):
    (source / name).write_text(name)
  found = initial.find('gs://bucket/base')
  assert {p.name for p in found.iterdir()} == {
      'config.json', 'model.safetensors'}
  assert (found / 'config.json').read_text() == 'config.json'


def test_a_work_directory_in_a_store_is_tried_out(store, monkeypatch):
  assert str(command_line.open_workdir(URL)) == URL
  assert not names(store)

  def missing(name, **kwargs):
    raise ImportError('Please install gcsfs')

  backend.fsspec_backend._get_filesystem.cache_clear()
  monkeypatch.setattr(fsspec, 'filesystem', missing)
  with pytest.raises(types.UserError, match='LONGJAX_EXTRAS=gcs'):
    command_line.open_workdir(URL)


def test_other_processes_take_what_they_read_from_the_store(
    store, disk, monkeypatch):
  primary = mirror.Mirror(URL)
  # The last two only the primary process reads.
  *read, _, _ = names = (
      'config.json', 'data/x/info.json',
      f'{policies.FOLDER}/rl/config.json',
      f'{rl_job.PROMPT_STATS_FOLDER}/rl.jsonl',
      f'{selection.FOLDER}/harder.json', 'model/config.json', 'metrics.jsonl')
  for name in names:
    (primary.local / name).parent.mkdir(parents=True, exist_ok=True)
    (primary.local / name).write_text(name)
  primary.publish()
  disk()
  monkeypatch.setattr(mirror.multihost, 'is_primary', lambda: False)
  monkeypatch.setattr(mirror.multihost, 'on_primary', lambda function: None)
  other = mirror.Mirror(URL)
  assert not list(other.local.iterdir())
  with pytest.raises(types.UserError, match='not the same directory in all'):
    workdir.check_shared(other)
  other.publish()
  workdir.check_shared(other)
  assert {p.relative_to(other.local).as_posix()
          for p in other.local.rglob('*') if p.is_file()} == set(read)

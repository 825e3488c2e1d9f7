"""Tests for longjax.recipe and longjax.stages: document to report, in seconds.

Exact resume has its own file, `resume_test`, and so do mistakes,
`bad_input_test`.
"""

import json
import logging
import pathlib
import shutil
import zlib

import jax
import numpy as np
import pytest

from longjax import recipe, stage_list, stages, types
from longjax.data import dataset, records
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import huggingface
from longjax.parallel import mesh
from longjax.parallel import rules as rules_lib
from longjax.synthesis import stage as synth_stage
from longjax.train import checkpoint, initial, progress, run_state
from tests import tiny_recipe


def graded_by_checksum(example, text, *, is_finished=True):
  """Grades that differ between responses of a network that knows nothing."""
  del example, is_finished
  reward = zlib.crc32(text.encode()) % 5 / 4
  return types.Score(reward=reward, answer=text[:8], rule='checksum')


@pytest.fixture(scope='module', autouse=True)
def compiled_once(tmp_path_factory):
  with tiny_recipe.shared_programs(
      tmp_path_factory.getbasetemp() / 'programs'):
    yield


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The work directory of a whole run on one device."""
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stages.hybrid, 'score', graded_by_checksum)
    assert tiny_recipe.run(workdir) == 0
  return workdir


@pytest.fixture
def copied(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / 'run')


def evaluation(workdir: pathlib.Path, name: str):
  return json.loads((workdir / 'evals' / f'{name}.json').read_text())


def test_a_run_leaves_its_results_behind(finished):
  assert {p.name for p in finished.iterdir()} >= {
      'config.json', 'run.json', 'metrics.jsonl', 'rollouts.jsonl',
      'tensorboard', 'checkpoints', 'data', 'tokenizer', 'model', 'evals',
      'prompt_stats', 'report.html'}
  assert {p.name for p in (finished / 'evals').iterdir()} == {
      '0_base.json', '1_sft.json', '2_rl.json'}
  records = tiny_recipe.metrics(finished)
  assert [(r['step'], r['stage']) for r in records] == [
      (i + 1, stage) for i, stage in enumerate(
          ['pretrain'] * 3 + ['sft'] * 5 + ['rl'] * 5)]
  report = (finished / 'report.html').read_text()
  for word in ('Reinforcement learning', 'multihop', 'numeric', 'Rollouts'):
    assert word in report


def test_sft_learns_and_rl_has_a_gradient(finished):
  records = tiny_recipe.metrics(finished)
  losses = [float(r['values']['loss']) for r in records if r['stage'] == 'sft']
  assert losses[-1] < losses[0] - 0.2
  rl = [r['values'] for r in records if r['stage'] == 'rl']
  assert min(float(v['grad_norm']) for v in rl[2:]) > 1e-3
  # Sampler and trainer agree about what was sampled.
  assert max(float(v['gap/logprob_mean']) for v in rl) < 1e-5
  before, after = (evaluation(finished, n) for n in ('1_sft', '2_rl'))
  assert before['records'] != after['records']


def test_what_rl_saw_of_every_prompt_is_there_to_be_read(finished):
  table = records.read(finished / 'prompt_stats' / 'rl.jsonl')
  ids = [e.id for e in dataset.read(finished / 'data', 'rl')]
  assert [row['id'] for row in table] == [
      i for i in ids if i in {row['id'] for row in table}]
  kept = records.read(finished / 'rollouts.jsonl')
  for record in kept:
    if record['stage'] == 'rl':
      [row] = [row for row in table if row['id'] == record['id']]
      assert row['visits'] >= 1 and 0.0 <= row['mean'] <= 1.0
  last = tiny_recipe.metrics(finished)[-1]['values']
  assert float(last['prompts/visited']) == len(table) / len(ids)


def test_run_json_tells_device_versions_and_seconds(finished):
  facts = json.loads((finished / 'run.json').read_text())
  assert facts['device'] == '1 x cpu'
  assert facts['jax'] == jax.__version__
  assert set(facts['seconds']) == {
      'synth', '0_base', 'pretrain', 'sft', '1_sft', 'rl', '2_rl'}
  assert all(seconds > 0 for seconds in facts['seconds'].values())
  assert facts['finished']


def test_a_finished_run_is_reported_and_not_touched(
    finished, monkeypatch, caplog, capsys):
  monkeypatch.setattr(recipe, '_begin', None)
  monkeypatch.setattr(recipe.mesh_lib, 'make', None)
  before = {p: p.stat().st_mtime_ns for p in finished.rglob('*')}
  with caplog.at_level(logging.INFO):
    assert tiny_recipe.run(finished) == 0
  assert {p: p.stat().st_mtime_ns for p in finished.rglob('*')} == before
  assert f'{finished} holds this run, finished' in caplog.messages[0]
  assert str(finished / 'report.html') in caplog.messages[1]
  table = capsys.readouterr().err
  assert 'mean over task types' in table
  overall = evaluation(finished, '2_rl')['overall']
  assert f'{overall["reward"]:.2f} [{overall["low"]:.2f}' in table


def test_the_last_evaluation_is_made_again_if_it_is_gone(copied, monkeypatch):
  monkeypatch.setattr(stages.hybrid, 'score', graded_by_checksum)
  path = copied / 'evals' / '2_rl.json'
  before = path.read_bytes()
  path.unlink()
  assert tiny_recipe.run(copied) == 0
  assert path.read_bytes() == before


def test_an_evaluation_of_parameters_that_are_gone_is_not_invented(
    copied, monkeypatch, caplog):
  monkeypatch.setattr(stages.hybrid, 'score', graded_by_checksum)
  (copied / 'evals' / '1_sft.json').unlink()
  base = (copied / 'evals' / '0_base.json').read_bytes()
  (copied / 'evals' / '0_base.json').unlink()
  assert tiny_recipe.run(copied) == 0
  assert not (copied / 'evals' / '1_sft.json').exists()
  assert 'evals/1_sft.json is gone' in caplog.text
  # Those of a fresh network can be made again.
  assert (copied / 'evals' / '0_base.json').read_bytes() == base


def test_the_exported_model_is_the_last_checkpoint(finished):
  params, model = huggingface.load(finished / 'model')
  rules = rules_lib.Rules(
      mesh.make(mesh.MeshConfig(), jax.devices()[:1]))
  config = tiny_recipe.config()
  abstract = run_state.abstract(
      stages.optimizer(config.stages['rl']), model, rules,
      **stages.on_host(config.stages['rl'], {'num_examples': 24}))
  with checkpoint.Checkpointer(finished / 'checkpoints') as checkpoints:
    restored = checkpoints.restore_latest(abstract)
  assert restored.info['stage'] == 'rl'
  assert restored.info['global_step'] == 13
  want = restored.tree.train.params
  assert jax.tree.structure(params) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, params, want)
  assert tokenizer_lib.load(finished / 'model').vocab_size == model.vocab_size


def test_a_run_can_start_from_what_another_exported(
    finished, tmp_path, monkeypatch):
  monkeypatch.setattr(stages.hybrid, 'score', graded_by_checksum)
  assert tiny_recipe.run(tmp_path / 'next', {
      'job': 'evals', 'model': None,
      'init_from': str(finished / 'model')}) == 0
  assert not (tmp_path / 'next' / 'metrics.jsonl').exists()
  got = evaluation(tmp_path / 'next', '0_base')
  assert got['records'] == evaluation(finished, '2_rl')['records']


def test_eight_devices_train_as_one_does(finished, tmp_path, monkeypatch):
  """Two data shards by four parameter shards; entropy from the sampler."""
  monkeypatch.setattr(stages.hybrid, 'score', graded_by_checksum)
  changes = {
      'recipe': ('synth', 'pretrain', 'sft', 'rl'),
      'mesh': {'data': 2, 'fsdp': 4}, 'stages.rl.entropy_source': 'sampler'}
  tmp_path = tmp_path / 'sharded'
  tmp_path.mkdir()
  assert recipe.run(tiny_recipe.config(changes), tmp_path) == 0
  assert json.loads((tmp_path / 'run.json').read_text())['device'] == '8 x cpu'
  one, eight = (tiny_recipe.metrics(w) for w in (finished, tmp_path))
  assert len(eight) == 13
  for a, b in zip(one[:8], eight[:8], strict=True):
    for name in ('loss', 'entropy'):
      # Sums in another order, amplified by Adam.
      np.testing.assert_allclose(
          float(b['values'][name]), float(a['values'][name]), rtol=2e-3)
  for record in eight[8:]:
    assert np.isfinite(float(record['values']['loss']))
    assert float(record['values']['gap/logprob_mean']) < 1e-5
  huggingface.load(tmp_path / 'model')


def own_examples(path: pathlib.Path, num_examples: int) -> pathlib.Path:
  """A user's file of lookups."""
  lines = []
  for i in range(num_examples):
    facts = [f'The code of room {i + n} is {7 * (i + n) % 90}.'
             for n in range(3)]
    lines.append(json.dumps({
        'documents': [' '.join(facts)], 'kind': 'numeric',
        'question': f'What is the code of room {i}?',
        'answers': str(7 * i % 90), 'reasoning': facts[0]}))
  path.write_text('\n'.join(lines))
  return path


OWN = {
    'recipe': ('synth', 'sft', 'rl', 'evals'), 'stages.synth.examples': {},
    'stages.evals.splits': ('validation', 'test')}


def test_own_examples_take_the_same_road(finished, tmp_path):
  path = own_examples(tmp_path / 'rooms.jsonl', 40)
  workdir = tmp_path / 'run'
  assert tiny_recipe.run(workdir, OWN | {
      'model': None, 'init_from': str(finished / 'model'),
      'stages.synth.path': str(path)}) == 0
  data = workdir / 'data'
  assert dataset.split_names(data) == ['rl', 'sft', 'test', 'validation']
  ids = {s: [e.id for e in dataset.read(data, s)]
         for s in ('sft', 'rl', 'test', 'validation')}
  assert ids['sft'] == ids['rl']
  held_out = ids['test'] + ids['validation']
  assert len(set(ids['sft'] + held_out)) == 40
  assert not set(ids['sft']) & set(held_out)
  got = evaluation(workdir, '0_rl')
  assert {r['id'] for r in got['records']} == set(held_out)
  records = tiny_recipe.metrics(workdir)
  losses = [float(r['values']['loss']) for r in records if r['stage'] == 'sft']
  assert losses[-1] < losses[0] - 0.2
  rollout = (workdir / 'rollouts.jsonl').read_text().splitlines()[0]
  assert 'The code of room' in json.loads(rollout)['prompt']


def test_own_examples_that_fit_nowhere_are_named_or_left_out(tmp_path, caplog):
  path = own_examples(tmp_path / 'rooms.jsonl', 40)
  long = json.loads(path.read_text().splitlines()[0])
  long |= {'documents': ['word ' * 400], 'id': 'an essay'}
  path.write_text(path.read_text() + '\n' + json.dumps(long))
  changes = OWN | {'job': 'synth', 'stages.synth.path': str(path)}
  both = {'job': 'recipe'} | {
      k: v for k, v in changes.items() if k != 'job'}
  with pytest.raises(types.UserError) as caught:
    tiny_recipe.run(tmp_path / 'a', both)
  assert '1 of 41 examples are too long' in str(caught.value)
  assert "'an essay'" in str(caught.value)
  assert 'stages.sft.row_len=384' in str(caught.value)
  assert not (tmp_path / 'a' / 'data').exists()
  # Nothing is trained in a synth job, so nothing is too long.
  assert tiny_recipe.run(tmp_path / 'b', changes) == 0
  # Left out on demand, and told.
  stage = synth_stage.SynthStage(path=str(path), drop_too_long=True)
  with caplog.at_level(logging.INFO):
    synth_stage.run(
        stage, directory=tmp_path / 'c', seed=0,
        tokenizer=tokenizer_lib.load(tmp_path / 'b' / 'tokenizer'),
        caps=stage_list.caps(tiny_recipe.config(both).plan()),
        progress=progress.Progress, check_stop=lambda: None,
        log=logging.warning)
  assert 'left out 1 of 41 examples' in caplog.text
  kept = {e.id for s in stage.splits() for e in dataset.read(tmp_path / 'c', s)}
  assert len(kept) == 40 and 'an essay' not in kept


def test_a_tokenizer_for_own_examples_is_trained_on_them(tmp_path):
  path = own_examples(tmp_path / 'rooms.jsonl', 3)
  texts = list(synth_stage.tokenizer_texts(
      synth_stage.SynthStage(path=str(path)), seed=0))
  assert 'The code of room 0 is 0.' in texts[0]
  assert texts[1].startswith('What is the code of room 0?')
  assert texts[2] == 'The code of room 0 is 0. The answer is 0.'
  assert len(texts) == 9


def test_relative_paths_lead_to_the_checkout_where_the_directory_has_none(
    tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  root = pathlib.Path(recipe.__file__).parent.parent
  assert initial.find('configs/tiny.py') == root / 'configs' / 'tiny.py'
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'tiny.py').write_text('')
  assert initial.find('configs/tiny.py').samefile(
      tmp_path / 'configs' / 'tiny.py')


def test_labels_number_evaluations_and_name_what_they_evaluate():
  config = tiny_recipe.config()
  assert [n.label for n in config.plan()] == [
      'synth', '0_base', 'pretrain', 'sft', '1_sft', 'rl', '2_rl']
  assert [n.label for n in tiny_recipe.config({'job': 'rl'}).plan()] == [
      'synth', 'rl']
  # Nothing is trained in between, so once is enough.
  assert [n.label for n in tiny_recipe.config({'job': 'evals'}).plan()] == [
      'synth', '0_base']


@pytest.mark.parametrize('changes, message', [
    ({'recipe': ('synth', 'stf')}, "'stf'.*did you mean 'sft'"),
    ({'recipe': ('synth', 'sft', 'sft')}, "'sft' twice"),
    ({'init_from': 'x'}, 'exactly one of them'),
    ({'model': None}, 'exactly one of them'),
    ({'stages.rl.judge': {'mode': 'inprocess'}},
     "stages.rl.judge.mode='inprocess' asks .* set init_from"),
    ({'stages.evals.judge': {'mode': 'inprocess'}},
     "stages.evals.judge.mode='inprocess' asks .* set init_from"),
    ({'keep_checkpoints': 1}, 'keep_checkpoints=1 must be >= 2'),
    ({'seed': -1}, 'seed=-1'),
    ({'recipe': ('synth', 'sft'), 'job': 'rl'}, 'has no such stage'),
    ({'stages.rl.split': 'lr'},
     "stages.rl reads the split 'lr', but .* writes sft, rl, test"),
    ({'recipe': ('sft', 'synth')}, 'no synth stage stands before it'),
    ({'recipe': ('synth', 'other', 'sft'), 'stages.other': {'job': 'synth'}},
     'synth stages synth, other; a run has one data set'),
    ({'stages.sft.reasoning_fraction': 2.0}, 'reasoning_fraction=2.0'),
    ({'stages.sft.lookahead': 0}, 'lookahead=0'),
    ({'stages.sft.optimizer': {'learning_rate': 1e-3, 'moments': 'factored'}},
     'moments differ'),
    ({'stages.pretrain.text': {'min_len': 400}},
     'text.min_len=400 is more than row_len=384'),
    ({'stages.evals.splits': ('validation',)}, "'validation'"),
    ({'stages.evals.lengths': ()}, r'evals.lengths=\(\) must be increasing'),
])
def test_a_recipe_that_cannot_run_is_refused_before_it_starts(
    changes, message):
  with pytest.raises(types.UserError, match=message):
    tiny_recipe.config(changes)


def test_a_split_of_no_examples_is_no_split():
  values = tiny_recipe.values()
  splits = values['stages']['synth']['examples']['splits']
  splits[2]['num_per_task'] = 0
  with pytest.raises(types.UserError, match="reads the split 'test'"):
    tiny_recipe.config({'stages': values['stages']})

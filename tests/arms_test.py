"""Stages with a start, a seed, a mesh or moments that are not the default."""

import json
import threading

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy

from longjax import recipe, types
from longjax.planner import ahead
from longjax.train import optimizer as optimizer_lib
from tests import tiny_recipe

_SFT = tiny_recipe.values()['stages']['sft']


@pytest.fixture(scope='module', autouse=True)
def programs(tmp_path_factory):
  with tiny_recipe.shared_programs(tmp_path_factory.mktemp('programs')):
    yield


def stages(**changes):
  """Changes of the tiny recipe: stages of SFT like its own but for a few."""
  made = {f'stages.{name}': _SFT | change for name, change in changes.items()}
  return made | {'recipe': ('synth', 'sft', *changes), 'export': True}


def tensors(directory):
  return safetensors.numpy.load_file(directory / 'model.safetensors')


def losses(workdir, stage):
  return [float(r['values']['loss']) for r in tiny_recipe.metrics(workdir)
          if r['stage'] == stage]


def test_arms_begin_where_they_are_told_to_and_differ_by_their_seed(tmp_path):
  changes = stages(
      repeated={'start': 'base'}, reseeded={'start': 'base', 'seed': 1},
      gone_on={'start': 'sft'}, last={'start': 'sft'})
  assert tiny_recipe.run(tmp_path, changes) == 0
  first = losses(tmp_path, 'sft')
  # The same stage once more, from the same policy.
  assert losses(tmp_path, 'repeated') == first
  assert losses(tmp_path, 'reseeded')[0] != first[0]
  # Not from the arm before it.
  assert losses(tmp_path, 'gone_on') == losses(tmp_path, 'last')
  assert losses(tmp_path, 'gone_on')[0] < first[0]
  kept = {p.name for p in (tmp_path / 'models').iterdir()}
  assert kept == {'base', 'sft'}


def test_a_stage_goes_on_with_the_moments_before_it(tmp_path):
  optimizer = {'learning_rate': 1e-3, 'warmup_steps': 0}
  kept = optimizer | {'reset': False}
  for name, changed in (('kept', kept), ('reset', optimizer)):
    assert tiny_recipe.run(
        tmp_path / name, stages(more={'optimizer': changed})) == 0
  both = [losses(tmp_path / n, 'more') for n in ('kept', 'reset')]
  assert both[0][0] == both[1][0]  # Before any update.
  assert both[0][1] != both[1][1]


@pytest.mark.parametrize('moments', list(optimizer_lib.Moments))
def test_resumed_moments_are_those_of_one_long_run(moments):
  config = optimizer_lib.OptimizerConfig(
      learning_rate=0.1, warmup_steps=0, moments=moments, clip_norm=1e9)
  made = optimizer_lib.make(config, num_steps=9)
  rng = np.random.default_rng(0)
  params = {'matrix': rng.normal(size=(256, 256)).astype(np.float32)}
  gradients = [{'matrix': rng.normal(size=(256, 256)).astype(np.float32)}
               for _ in range(4)]
  whole = cut = made.init(params)
  for step, gradient in enumerate(gradients):
    if step == 2:
      cut = optimizer_lib.resume(cut, made.init(params))
      counts = [s.count for s in jax.tree.leaves(
          cut, is_leaf=lambda s: isinstance(s, optax.ScaleByScheduleState))
                if isinstance(s, optax.ScaleByScheduleState)]
      assert [int(c) for c in counts] == [0]
    updates, whole = made.update(gradient, whole, params)
    again, cut = made.update(gradient, cut, params)
    np.testing.assert_array_equal(updates['matrix'], again['matrix'])


def test_a_stage_on_its_own_mesh_learns_the_same(tmp_path):
  mesh = {'data': 2, 'fsdp': 1, 'tensor': 2}
  results = []
  for name, change in (('plain', {}), ('own', {'mesh': mesh})):
    changes = stages(second=change, third={'optimizer': {
        'learning_rate': 1e-3, 'reset': False}})
    changes['recipe'] = ('synth', 'sft', 'second', 'evals', 'third')
    (tmp_path / name).mkdir()
    assert recipe.run(
        tiny_recipe.config(changes), tmp_path / name,
        devices=jax.devices()[:4]) == 0
    results.append(tmp_path / name)
  plain, own = results
  for stage in ('second', 'third'):
    np.testing.assert_allclose(
        losses(own, stage), losses(plain, stage), rtol=1e-4)
  for name, value in tensors(plain / 'model').items():
    np.testing.assert_allclose(
        tensors(own / 'model')[name], value, atol=2e-4)
  evaluations = [json.loads((w / 'evals' / '0_second.json').read_text())
                 for w in results]
  texts = [[r['response'] for r in e['records']] for e in evaluations]
  same = np.mean([a == b for a, b in zip(*texts, strict=True)])
  assert same > 0.9  # Rounding may tip a token.


def test_the_next_stage_finds_its_programs_compiled(tmp_path, monkeypatch):
  """What is compiled ahead is, by the cache, what the stage then runs."""
  compiled = []

  def counted(event, **kwargs):
    del kwargs
    if event == '/jax/compilation_cache/cache_misses':
      compiled.append(event)

  monkeypatch.setattr(ahead, 'is_worthwhile', lambda: True)
  jax.monitoring.register_event_listener(counted)
  numbers = {}
  try:
    for name in ('ahead', 'alone'):
      if name == 'alone':
        monkeypatch.setattr(
            ahead, '_compile', lambda stage, context, is_over: None)
      with tiny_recipe.shared_programs(tmp_path / f'{name}_programs'):
        changes = stages(other={'row_len': 512})
        begun = []
        train = recipe.stages_lib.train

        def counting(stage, *args, train=train, begun=begun, **kwargs):
          begun.append(len(compiled))
          done = train(stage, *args, **kwargs)
          if stage.row_len == _SFT['row_len']:  # The thread needs time.
            _wait_for_threads()
          else:
            begun.append(len(compiled))
          return done

        monkeypatch.setattr(recipe.stages_lib, 'train', counting)
        assert tiny_recipe.run(tmp_path / name, changes) == 0
        monkeypatch.setattr(recipe.stages_lib, 'train', train)
        numbers[name] = begun[2] - begun[1]
  finally:
    jax.monitoring.unregister_event_listener(counted)
  assert numbers['ahead'] < numbers['alone']


def _wait_for_threads():
  for thread in threading.enumerate():
    if thread.name == 'compile ahead':
      thread.join()


@pytest.mark.parametrize('changes, message', [
    ({'second': {'start': 'third'}, 'third': {}},
     "stages.second.start='third' is no policy that the recipe has before it"),
    ({'second': {'start': 'sft', 'optimizer': {
        'learning_rate': 1e-3, 'reset': False}}}, 'set it to True'),
    ({'base': {}}, 'has the name of the model that the run begins with')])
def test_impossible_starts_are_refused(changes, message):
  with pytest.raises(types.UserError, match=message):
    tiny_recipe.config(stages(**changes))


def test_unknown_arms_are_refused():
  with pytest.raises(types.UserError, match="did you mean 'other'"):
    tiny_recipe.config(stages(other={}) | {'comparison': {
        'claim': '', 'measures': (), 'arms': (
            {'name': 'a', 'seeds': (('othr',),)},)}})

"""A suite of seconds: every program, both variants, on two devices."""

import dataclasses
import json
import math
import pathlib
import runpy

import chex
import jax
import pytest

from longjax import config, types
from longjax.bench import job, programs, suite
from longjax.model import compute
from longjax.parallel import mesh, rules
from tests import tiny_model

# Compiles in half the time.
MODEL = dataclasses.replace(tiny_model.MODEL, num_layers=1)

FACTS = dict(
    num_prompts=2, prompt_len=33, num_samples=3, response_len=16,
    shortest_response=5, repeats=2)
ALONE = dict(FACTS, variants=('shared',), repeats=1)
CASES = dict(
    prefill=dict(program='prefill', **ALONE),
    decode=dict(program='decode', **FACTS),
    score=dict(program='score', **ALONE),
    update=dict(program='update', **FACTS),
    deeper=dict(program='score', num_layers=2, **ALONE),
    gap=dict(program='gap', **ALONE),
    attention=dict(program='attention', length=128, repeats=1),
    parity=dict(program='parity', length=100))


def run(path, cases):
  """Runs cases on two devices; what bench.json holds."""
  built = config.build(suite.BenchConfig, dict(
      suite='smoke', model=MODEL, cases=cases, mesh=dict(data=2),
      peak_tflops=1.0))
  assert job.run(built, path, devices=jax.devices()[:2]) == 0
  return json.loads((path / job.RESULT_FILE).read_text())


@pytest.fixture(scope='module')
def result(tmp_path_factory):
  return run(tmp_path_factory.mktemp('bench'), CASES)


def of(result, case, variant='shared'):
  [found] = [r for r in result['records']
             if (r['case'], r['variant']) == (case, variant)]
  return found


def test_every_case_is_there_in_order(result):
  cases = list(dict.fromkeys(r['case'] for r in result['records']))
  assert cases == list(CASES)
  assert result['config']['suite'] == 'smoke'


def test_all_figures_are_finite_and_none_is_trivial(result):
  for record in result['records']:
    for name, value in record.items():
      if isinstance(value, float):
        assert math.isfinite(value), (record, name)
    if record['program'] == 'parity':
      continue
    for name in ('seconds', 'cpu_seconds', 'tokens_per_second', 'tflops',
                 'share_of_peak', 'compile_seconds'):
      assert record[name] > 0.0, (record, name)
    assert record['program'] == 'attention' or record['peak_bytes'] > 1 << 15


def test_figures_of_a_record_agree_with_each_other(result):
  assert [r['case'] for r in result['ratios']] == ['decode', 'update']
  for case in ('decode', 'update'):
    shared, unshared = (of(result, case, v) for v in ('shared', 'unshared'))
    for record in (shared, unshared):
      assert record['tokens_per_second'] == pytest.approx(
          record['tokens'] / record['seconds'])
      assert record['share_of_peak'] == pytest.approx(
          record['tflops'] / (2 * 1.0))
    assert shared['tokens'] == unshared['tokens']
    assert shared['needed_flops'] == unshared['needed_flops']
    assert shared['own_flops'] == shared['needed_flops']
    [ratio] = [r for r in result['ratios'] if r['case'] == case]
    assert ratio['seconds'] == pytest.approx(
        unshared['seconds'] / shared['seconds'])


def test_shared_and_unshared_compute_the_same_loss(result):
  shared, unshared = (
      of(result, 'update', v)['loss'] for v in ('shared', 'unshared'))
  assert shared == pytest.approx(unshared, rel=1e-5)
  assert abs(shared) > 1e-3


def test_runs_of_an_update_do_not_change_what_the_next_one_computes():
  made = setting()
  policy = programs.Policy(made)
  before = jax.device_get(policy.state.params)
  prepared = programs.prepare(
      suite.Case(program='update', **ALONE), 'shared', made, policy)
  losses = [prepared.run().values['loss'] for _ in range(3)]
  assert len(set(losses)) == 1
  chex.assert_trees_all_equal(before, jax.device_get(policy.state.params))


def test_unshared_rows_repeat_prompts_and_all_rows_are_padded(result):
  shared, unshared = (
      of(result, 'update', v) for v in ('shared', 'unshared'))
  assert shared['repeated'] == 0.0 < unshared['repeated'] < 1.0
  for record in (shared, unshared):
    assert 0.0 < record['padding'] < 1.0
  # 3 samples of each prompt: two copies too many.
  places = shared['tokens'] / (1 - unshared['padding'] - unshared['repeated'])
  assert unshared['repeated'] * places == pytest.approx(2 * 2 * 32)
  assert shared['peak_bytes'] > of(result, 'score')['peak_bytes'] > 0


def test_more_layers_need_more(result):
  assert of(result, 'deeper')['needed_flops'] > of(
      result, 'score')['needed_flops']


def test_sampler_and_trainer_agree(result):
  gap = of(result, 'gap')
  assert 0.0 < gap['mean_gap'] <= gap['max_gap'] < 1e-4
  # Random weights: each token is about as likely as any other.
  assert gap['mean_nats'] == pytest.approx(
      math.log(MODEL.vocab_size), rel=0.5)


def test_the_device_is_compared_with_the_cpu(result):
  errors = of(result, 'parity', 'auto float32')
  assert max(errors[name] for name in ('out', 'dq', 'dk', 'dv')) < 1e-5
  rounded = of(result, 'parity', 'auto bfloat16')
  assert 1e-5 < rounded['out'] < 2e-2
  assert of(result, 'parity', 'network float32')['gradients'] < 1e-5


@pytest.mark.parametrize('fits_alone', [False, True])
def test_what_does_not_fit_is_told_and_the_rest_goes_on(
    tmp_path, monkeypatch, fits_alone):
  prepare, asked = programs.prepare, []

  def out_of_memory(case, variant, setting, policy):
    asked.append((case.program, variant))
    made = prepare(case, variant, setting, policy)
    is_beside = asked == [('update', 'shared'), ('update', 'unshared')]
    if asked[-1] == ('update', 'unshared') and (is_beside or not fits_alone):
      # The update that fails had taken the policy.
      jax.tree.map(lambda x: x.delete(), policy.state)
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: too much')
    return made

  monkeypatch.setattr(programs, 'prepare', out_of_memory)
  result = run(tmp_path, dict(
      update=dict(program='update', **FACTS),
      score=dict(program='score', **ALONE)))
  unshared = of(result, 'update', 'unshared')
  assert ('seconds' in unshared) == fits_alone == bool(result['ratios'])
  assert of(result, 'update')['seconds'] > 0.0
  assert of(result, 'score')['seconds'] > 0.0


def setting(model=MODEL, num_devices=2, **sizes):
  return programs.Setting(
      model=model, compute=compute.Compute(), seed=0,
      rules=rules.Rules(mesh.make(
          mesh.MeshConfig(**sizes), jax.devices()[:num_devices])))


@pytest.mark.parametrize('variant, num_devices', [
    ('cpu', 2), ('gpu', 1), ('tpu', 4), ('tpu', 8)])
def test_the_suites_divide_over_their_devices(variant, num_devices):
  path = pathlib.Path(__file__).parents[2] / 'configs' / 'bench.py'
  built = config.build(
      suite.BenchConfig, runpy.run_path(str(path))['get_config'](variant))
  made = setting(
      built.model, num_devices, **dataclasses.asdict(built.mesh))
  for name, case in built.cases.items():
    if isinstance(case, suite.Case):
      programs.check(name, case, made)


@pytest.mark.parametrize('case, match', [
    (dict(program='decode', num_prompts=3, prompt_len=8),
     r'cases.one \(shared\).*3 does not divide over the 2 data shards'),
    (dict(program='update', prompt_len=8, rows_at_once=1),
     r'cases.one.rows_at_once=1 does not divide over the 2 data shards'),
])
def test_a_case_that_does_not_divide_over_the_mesh_is_refused(case, match):
  with pytest.raises(types.UserError, match=match):
    programs.check('one', suite.Case(**case), setting())

"""The whole recipe: memory agent, merge and what follows it."""

import json

import numpy as np
import pytest
import safetensors.numpy

from longjax import stages, types
from tests import resume_driver, tiny_recipe
from tests.model import numpy_merge


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  directory = tmp_path_factory.mktemp('full')
  # A network that knows nothing earns different rewards all the same.
  with (pytest.MonkeyPatch.context() as patch,
        tiny_recipe.shared_programs(directory / 'programs')):
    patch.setattr(stages.hybrid, 'score', resume_driver.score)
    assert tiny_recipe.run(directory / 'run', tiny_recipe.FULL) == 0
  return directory / 'run'


def tensors(directory):
  return safetensors.numpy.load_file(directory / 'model.safetensors')


def test_a_merge_is_that_of_the_policies_it_names(workdir):
  models = workdir / 'models'
  assert {p.name for p in models.iterdir()} == {
      'sft', 'rl', 'memory', 'merge', 'merge.json'}
  base, *experts = (tensors(models / n) for n in ('sft', 'rl', 'memory'))
  merged = tensors(models / 'merge')
  assert merged.keys() == base.keys()
  for name, value in merged.items():
    want, _ = numpy_merge.sce(
        base[name], [expert[name] for expert in experts], 1.0, 'prune')
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)
  assert any((merged[n] != experts[0][n]).any() for n in merged)
  shares = json.loads((models / 'merge.json').read_text())['coefficients']
  assert sum(shares) == pytest.approx(1.0)


def test_training_goes_on_from_the_merge(workdir):
  merged = tensors(workdir / 'models' / 'merge')
  final = tensors(workdir / 'model')
  moved = [np.abs(final[n] - merged[n]).max() for n in merged]
  # Two small steps.
  assert 0.0 < max(moved) < 0.05


def test_a_stage_trains_on_what_was_selected_for_it(workdir):
  chosen = json.loads((workdir / 'selected' / 'chosen.json').read_text())
  assert len(chosen['examples']) == 16
  by_split = {'more': set(), 'rl': set()}
  for split, example in chosen['examples']:
    by_split[split].add(example)
  # A quarter comes back of what was seen before.
  assert 0 < len(by_split['rl']) <= 4
  seen = [json.loads(line) for line in (
      workdir / 'prompt_stats' / 'rl.jsonl').read_text().splitlines()]
  assert by_split['rl'] <= {row['id'] for row in seen if row['mean'] < 1.0}
  trained = [json.loads(line)['id'] for line in (
      workdir / 'prompt_stats' / 'rl_merged.jsonl').read_text().splitlines()]
  assert set(trained) <= by_split['more'] | by_split['rl']


def test_every_stage_left_its_records(workdir):
  stages = [r['stage'] for r in tiny_recipe.metrics(workdir)]
  assert stages == (
      ['pretrain'] * 3 + ['sft'] * 5 + ['rl'] * 5 + ['memory'] * 3
      + ['rl_merged'] * 2)
  evaluations = sorted(p.stem for p in (workdir / 'evals').iterdir())
  assert evaluations == ['0_base', '1_sft', '2_rl', '3_merge_agent']
  agent = json.loads((workdir / 'evals' / '3_merge_agent.json').read_text())
  assert agent['facts']['part_len'] == 64


def test_the_memory_agents_rollouts_can_be_read_turn_by_turn(workdir):
  kept = [json.loads(line) for line in (
      workdir / 'rollouts.jsonl').read_text().splitlines()]
  seen = [r for r in kept if r['stage'] == 'memory']
  assert len(seen) == 3
  for record in seen:
    whole = ''.join(f'[{d["title"]}]\n{d["text"]}\n' if d['title']
                    else f'{d["text"]}\n' for d in record['documents'])
    for sample in record['samples']:
      assert ''.join(turn['part'] for turn in sample['turns']) == whole
  assert not any(s['turns'] for r in kept if r['stage'] != 'memory'
                 for s in r['samples'])
  page = (workdir / 'report.html').read_text()
  for part in ('part 1 of', 'id="merge"', 'by the memory agent'):
    assert part in page


def test_what_has_not_been_trained_cannot_come_back():
  changes = dict(tiny_recipe.FULL)
  changes['stages.chosen'] = changes['stages.chosen'] | {'seen': ('sft',)}
  with pytest.raises(
      types.UserError, match="names 'sft', which is no RL stage before it"):
    tiny_recipe.config(changes)


@pytest.mark.parametrize('names, match', [
    (('rl', 'nobody'), "merges 'nobody', but before it"),
    (('rl', 'rl_merged'), "merges 'rl_merged', but before it"),
])
def test_only_policies_of_earlier_stages_can_be_merged(names, match):
  with pytest.raises(types.UserError, match=match):
    tiny_recipe.config(
        tiny_recipe.FULL | {'stages.merge': {'job': 'merge',
                                             'experts': names}})

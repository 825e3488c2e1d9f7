"""The experiments of configs/ablations build and compare what they claim."""

import pathlib

import pytest

from longjax import config, run_config
from tests import configs_test

FOLDER = configs_test.ROOT / 'configs' / 'ablations'
FILES = sorted(p for p in FOLDER.glob('*.py') if p.stem != 'arms')


def build(path: pathlib.Path) -> run_config.RunConfig:
  values = configs_test.load(path).get_config()
  return config.build(run_config.RunConfig, values, 'config')


def test_the_checks_of_the_recipe_are_there():
  assert {p.stem for p in FILES} == {
      'advantage', 'aepo', 'gradients', 'lengths', 'memory', 'positive_only',
      'retrospective'}


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_each_arm_has_a_policy_of_its_own_for_each_seed(path):
  made = build(path)
  assert made.comparison is not None
  policies = [arm.seeds[k][-1] for arm in made.comparison.arms
              for k in range(len(arm.seeds))]
  assert len(set(policies)) == len(policies)
  assert len(made.comparison.arms[0].seeds) >= 2
  command = f'python -m longjax --config=configs/ablations/{path.name}'
  assert command in path.read_text()


@pytest.mark.parametrize(  # One policy is measured there, twice.
    'path', [p for p in FILES if p.stem != 'gradients'], ids=lambda p: p.stem)
def test_arms_of_a_seed_begin_with_one_policy_and_differ(path):
  made = build(path)
  assert made.comparison is not None
  for number in range(len(made.comparison.arms[0].seeds)):
    firsts = [made.stages[arm.seeds[number][0]]
              for arm in made.comparison.arms]
    trained = [s for s in firsts if getattr(s, 'start', '')]
    seeds = {s.seed for s in trained}
    assert seeds == {number}
    starts = {s.start for s in trained if not s.start.startswith('sce')}
    assert len(starts) == 1
    assert len({str(s) for s in firsts}) == len(firsts)

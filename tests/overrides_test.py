"""Tests for longjax.overrides: `--config.key=value`."""

import dataclasses
from typing import Literal

import pytest
from ml_collections import config_dict

from longjax import config, overrides, types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
  low: float = 0.1
  high: float = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
  job: Literal['sft'] = 'sft'
  steps: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rl:
  job: Literal['rl'] = 'rl'
  lr: float = 1e-3
  band: Band | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  seed: int = 0
  name: str = 'run'
  resume: bool = True
  data: str | None = None
  lengths: tuple[int, ...] = (512, 2048)
  tasks: tuple[str, ...] = ()
  rl: Rl = Rl()
  named: dict[str, Rl] = dataclasses.field(default_factory=dict)
  stages: tuple[Sft | Rl, ...] = ()


def overridden(key: str, text: str) -> Run:
  """A run with two stages, after one override."""
  values = config_dict.ConfigDict({
      'stages': ({'job': 'sft'}, {'job': 'rl'}), 'named': {'a': {}}})
  overrides.apply(Run, values, key, text)
  return config.build(Run, values, 'config')


def message(key: str, text: str) -> str:
  with pytest.raises(types.UserError) as caught:
    overridden(key, text)
  return str(caught.value)


@pytest.mark.parametrize('key, text, expected', [
    ('seed', '7', 7),
    ('seed', '-1', -1),
    ('name', '7', '7'),
    ('name', 'none', 'none'),
    ('name', '(1, 2)', '(1, 2)'),
    ('name', '', ''),
    ('data', 'none', None),
    ('data', '/tmp/my data.jsonl', '/tmp/my data.jsonl'),
    ('resume', 'false', False),
    ('resume', 'True', True),
    ('lengths', '(1, 2, 3)', (1, 2, 3)),
    ('lengths', '1,2', (1, 2)),
    ('lengths', '[5]', (5,)),
    ('lengths', '5', (5,)),
    ('lengths', '()', ()),
    ('tasks', 'mc,numeric', ('mc', 'numeric')),
    ('rl.lr', '3e-4', 3e-4),
    ('rl.lr', '1', 1.0),
    ('rl.band.low', '0.2', 0.2),
    ('rl.band', '{"low": 0.2}', Band(low=0.2)),
    ('named.a.lr', '2', 2.0),
    ('named.b.lr', '2', 2.0),
    ('stages.0.steps', '9', 9),
    ('stages[0].steps', '9', 9),
    ('stages.1.band.high', '0.5', 0.5),
])
def test_an_override_sets_the_value_even_if_the_file_leaves_it_out(
    key, text, expected):
  value = overridden(key, text)
  for part in key.replace('[', '.').replace(']', '').split('.'):
    if isinstance(value, dict):
      value = value[part]
    elif isinstance(value, tuple):
      value = value[int(part)]
    else:
      value = getattr(value, part)
  assert value == expected
  assert type(value) is type(expected)


@pytest.mark.parametrize('key, near', [
    ('sed', 'seed'),
    ('lr', 'rl.lr'),
    ('rl.bandlow', 'rl.band.low'),
    ('rl.band.lo', 'rl.band.low'),
    ('seed.x', 'seed'),
    ('stages.0.lr', 'stages.1.lr'),
    ('stages.2.steps', 'stages.0.steps'),
    ('stages.x', 'stages.0'),
])
def test_an_unknown_key_is_refused_with_the_nearest_anywhere(key, near):
  assert message(key, '1') == (
      f'config.{key} does not exist; the nearest valid key is config.{near}.')


@pytest.mark.parametrize('key, text, expected', [
    ('seed', '1.5', "config.seed='1.5' should be an int."),
    ('seed', 'x', "config.seed='x' should be an int."),
    ('seed', 'true', "config.seed='true' should be an int."),
    ('seed', '', "config.seed='' should be an int."),
    ('resume', 'yes', "config.resume='yes' should be true or false."),
    ('lengths', '1,a', "config.lengths='1,a' should be a tuple, each an int."),
    ('stages.1.job', 'evals', "config.stages.1.job='evals' should be one of "
     "'rl'."),
    ('rl', '{"lrr": 1}', 'config.rl.lrr does not exist; the nearest valid key '
     'is config.rl.lr.'),
    ('stages.0', '{}', 'config.stages.0 cannot be replaced as a whole; set '
     'its keys one by one.'),
])
def test_an_ill_typed_override_is_refused_with_value_and_type(
    key, text, expected):
  assert message(key, text) == expected


def test_overriding_a_referenced_value_reaches_its_followers():
  values = config_dict.ConfigDict({'seed': 1, 'rl': {}})
  values.rl.lr = values.get_ref('seed')
  overrides.apply(Run, values, 'seed', '4')
  assert config.build(Run, values).rl.lr == 4.0

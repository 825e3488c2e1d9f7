"""Tests for longjax.config: the door between ConfigDict and dataclasses."""

import dataclasses
import enum
import json
import string
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_dict

from longjax import config, types


class Norm(enum.Enum):
  PER_TOKEN = 'token'
  PER_RESPONSE = 'response'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
  low: float = 0.1
  high: float = 0.3

  def __post_init__(self):
    if not self.low < self.high:
      raise types.UserError(f'needs low < high, got {self.low}, {self.high}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
  job: Literal['sft'] = 'sft'
  steps: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rl:
  job: Literal['rl'] = 'rl'
  lr: float = 1e-3
  norm: Norm = Norm.PER_TOKEN
  backend: Literal['reference', 'blockwise'] = 'reference'
  band: Band | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  seed: int
  name: str = 'run'
  resume: bool = True
  lengths: tuple[int, ...] = (512, 2048)
  range: tuple[float, float] = (0.0, 1.0)
  band: Band = Band()
  rl: Rl = Rl()
  limit: int | float | None = None
  weights: dict[str, float] = dataclasses.field(default_factory=dict)
  stages: tuple[Sft | Rl, ...] = ()


def message(values: Any, path: str = 'config') -> str:
  """The one line a user reads for these values."""
  with pytest.raises(types.UserError) as caught:
    config.build(Run, values, path)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_defaults_live_on_the_dataclass():
  assert config.build(Run, {'seed': 1}) == Run(seed=1)


@pytest.mark.parametrize('wrap', [
    dict, config_dict.ConfigDict, config_dict.FrozenConfigDict])
def test_every_kind_of_mapping_gives_the_same_dataclasses(wrap):
  values = wrap({
      'seed': 1,
      'band': {'low': 0, 'high': 2},
      'rl': {'norm': 'response', 'band': {'low': 0.2}},
      'weights': {'mc': 1},
      'lengths': (1, 2),
  })
  assert config.build(Run, values) == Run(
      seed=1, band=Band(low=0.0, high=2.0),
      rl=Rl(norm=Norm.PER_RESPONSE, band=Band(low=0.2)),
      weights={'mc': 1.0}, lengths=(1, 2))


def test_stages_become_the_dataclasses_of_their_jobs():
  values = config_dict.ConfigDict({
      'seed': 1,
      'stages': [{'job': 'sft', 'steps': 9}, {'job': 'rl', 'lr': 1}],
  })
  assert config.build(Run, values).stages == (Sft(steps=9), Rl(lr=1.0))


def test_references_between_config_values_are_followed():
  values = config_dict.ConfigDict({'seed': 5})
  values.limit = values.get_ref('seed')
  assert config.build(Run, values).limit == 5


def test_a_built_dataclass_passes_through():
  run = Run(seed=1, band=Band(low=0.0))
  assert config.build(Run, run) is run
  assert config.build(Run, {'seed': 1, 'band': run.band}).band is run.band


def test_an_int_becomes_a_float_where_one_is_due():
  built = config.build(Run, {'seed': np.int64(1), 'rl': {'lr': 1}})
  assert type(built.rl.lr) is float
  assert type(built.seed) is int


@pytest.mark.parametrize('values, expected', [
    ({'seed': 1.0}, 'config.seed=1.0 should be an int.'),
    ({'seed': True}, 'config.seed=True should be an int.'),
    ({'seed': '1'}, "config.seed='1' should be an int."),
    ({'seed': None}, 'config.seed=None should be an int.'),
    ({'seed': 1, 'rl': {'lr': '1e-3'}},
     "config.rl.lr='1e-3' should be a float."),
    ({'seed': 1, 'rl': {'lr': True}}, 'config.rl.lr=True should be a float.'),
    ({'seed': 1, 'resume': 1}, 'config.resume=1 should be true or false.'),
    ({'seed': 1, 'name': 3}, 'config.name=3 should be a string.'),
    ({'seed': 1, 'lengths': (1, 2.5)},
     'config.lengths.1=2.5 should be an int.'),
    ({'seed': 1, 'lengths': 3},
     'config.lengths=3 should be a tuple, each an int.'),
    ({'seed': 1, 'range': (1.0,)},
     'config.range=(1.0,) should be a tuple of 2: a float, a float.'),
    ({'seed': 1, 'rl': {'norm': 'tokens'}},
     "config.rl.norm='tokens' should be one of 'token', 'response'."),
    ({'seed': 1, 'rl': {'backend': 'splash'}},
     "config.rl.backend='splash' should be one of 'reference', 'blockwise'."),
    ({'seed': 1, 'rl': 3},
     'config.rl=3 should be a mapping with keys job, lr, norm, backend, '
     'band.'),
    ({'seed': 1, 'limit': 'x'},
     "config.limit='x' should be an int or a float or None."),
    ({'seed': 1, 'weights': {'mc': 'x'}},
     "config.weights.mc='x' should be a float."),
])
def test_an_ill_typed_value_is_refused_with_field_value_and_type(
    values, expected):
  assert message(values) == expected


@pytest.mark.parametrize('values, unknown, near', [
    ({'seed': 1, 'sead': 2}, 'config.sead', 'config.seed'),
    ({'seed': 1, 'rl': {'learning': 2}}, 'config.rl.learning', 'config.rl.lr'),
    ({'seed': 1, 'stages': ({'job': 'sft', 'step': 1},)},
     'config.stages.0.step', 'config.stages.0.steps'),
])
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(
    values, unknown, near):
  assert message(values) == (
      f'{unknown} does not exist; the nearest valid key is {near}.')


def test_a_missing_key_is_named_with_its_type():
  assert message({}) == 'config.seed is missing; set it to an int.'
  assert message({}, path='') == 'seed is missing; set it to an int.'


def test_stages_are_told_apart_by_their_job():
  assert message({'seed': 1, 'stages': ({'job': 'slt'},)}) == (
      "config.stages.0.job='slt' should be one of 'sft', 'rl'.")
  assert message({'seed': 1, 'stages': ({},)}) == (
      "config.stages.0.job=None should be one of 'sft', 'rl'.")


def test_a_wrong_choice_inside_a_stage_is_named_and_not_its_job():
  assert message({
      'seed': 1, 'stages': ({'job': 'rl', 'backend': 'x'},)
  }) == ("config.stages.0.backend='x' should be one of 'reference', "
         "'blockwise'.")


def test_what_post_init_refuses_names_the_place():
  assert message({'seed': 1, 'rl': {'band': {'low': 0.3, 'high': 0.3}}}) == (
      'config.rl.band: needs low < high, got 0.3, 0.3.')


def test_resolved_is_json_and_builds_the_same_again():
  run = Run(
      seed=1, rl=Rl(norm=Norm.PER_RESPONSE, band=Band()), stages=(Sft(), Rl()),
      weights={'mc': 1.0})
  text = json.dumps(config.resolved(run))
  assert config.build(Run, json.loads(text)) == run
  assert config.flat(run)['rl.norm'] == 'response'
  assert config.flat(run)['stages.1.job'] == 'rl'


def test_differences_name_each_changed_value_once():
  old, new = Run(seed=1), Run(seed=2, rl=Rl(lr=0.5), lengths=(512,))
  assert config.differences(config.resolved(old), new) == [
      "lengths.1: 2048 -> '(absent)'", 'rl.lr: 0.001 -> 0.5', 'seed: 1 -> 2']
  assert config.differences(old, old) == []


@given(key=st.text(string.ascii_letters + '_', min_size=1, max_size=12).filter(
    lambda k: k not in {f.name for f in dataclasses.fields(Run)}))
@settings(max_examples=50, deadline=None)
def test_no_unknown_key_is_ever_ignored(key):
  assert message({'seed': 1, key: 0}).startswith(
      f'config.{key} does not exist; the nearest valid key is config.')


def test_nearest_prefers_the_same_last_part():
  valid = ['seed', 'rl.steps', 'rl.stops', 'sft.lr']
  assert config.nearest('steps', valid) == 'rl.steps'
  assert config.nearest('sft.lrr', valid) == 'sft.lr'
  assert config.nearest('x', []) == ''

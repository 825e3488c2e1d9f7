"""Tests for longjax.train.workdir."""

import json

import jax
import numpy as np
import pytest

from longjax import types
from longjax.train import run_state, workdir

CONFIG = {'recipe': ['sft'], 'stages': {'sft': {'steps': 3}}, 'seed': 0}
OTHER = CONFIG | {'seed': 1}


def claimed(directory):
  return json.loads((directory / 'config.json').read_text())


def test_a_directory_without_results_takes_the_newest_config(tmp_path):
  (tmp_path / 'checkpoints').mkdir()  # Empty.
  for config in (CONFIG, OTHER, OTHER):
    workdir.claim(tmp_path, config)
    assert claimed(tmp_path) == config


@pytest.mark.parametrize('result', ['metrics.jsonl', 'model/config.json'])
def test_a_directory_with_results_keeps_its_config(tmp_path, result):
  workdir.claim(tmp_path, CONFIG)
  (tmp_path / result).parent.mkdir(exist_ok=True)
  (tmp_path / result).write_text('{}')
  workdir.claim(tmp_path, CONFIG)
  with pytest.raises(types.UserError, match='different config: seed: 0 -> 1'):
    workdir.claim(tmp_path, OTHER)
  assert claimed(tmp_path) == CONFIG


def test_at_most_three_differences_are_spelt_out(tmp_path):
  workdir.claim(tmp_path, CONFIG | dict.fromkeys('abcde', 1))
  (tmp_path / 'metrics.jsonl').write_text('')
  with pytest.raises(types.UserError, match=r'c: 1 -> 2 and 2 more\. Use'):
    workdir.claim(tmp_path, CONFIG | dict.fromkeys('abcde', 2))


def test_the_directory_of_a_model_is_not_written_to(tmp_path):
  (tmp_path / 'config.json').write_text('{"model_type": "qwen3"}')
  with pytest.raises(types.UserError, match=r'config\.json is no config of a'):
    workdir.claim(tmp_path, CONFIG)
  assert claimed(tmp_path) == {'model_type': 'qwen3'}


def test_results_of_nobody_knows_which_run_are_refused(tmp_path):
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'precious').write_text('')
  with pytest.raises(types.UserError, match='holds data but no config.json'):
    workdir.claim(tmp_path, CONFIG)
  assert [p.name for p in tmp_path.iterdir()] == ['data']


@pytest.mark.parametrize('text', ['{"recipe"', '\x00'])
def test_a_damaged_config_is_named_and_left(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(types.UserError, match=r'config\.json is damaged'):
    workdir.claim(tmp_path, CONFIG)
  assert (tmp_path / 'config.json').read_text() == text


def test_seconds_of_a_stage_add_up_over_restarts(tmp_path):
  facts = workdir.Facts(tmp_path)
  facts.describe(np.asarray(jax.devices()[:1]), seed=3)
  assert not facts.is_finished
  with pytest.raises(run_state.Stopped), facts.timing('sft'):
    raise run_state.Stopped
  # A mistake's time is no stage's.
  with pytest.raises(types.UserError), facts.timing('rl'):
    raise types.UserError
  first = json.loads((tmp_path / 'run.json').read_text())
  assert first['seed'] == 3 and first['jax'] == jax.__version__
  assert set(first['seconds']) == {'sft'}
  again = workdir.Facts(tmp_path)
  again._values['seconds']['sft'] = 5.0
  with again.timing('sft'):
    pass
  again.finish()
  last = workdir.Facts(tmp_path)
  assert last.is_finished
  assert 5.0 <= last._values['seconds']['sft'] < 6.0


@pytest.mark.parametrize('text', ['{"finished"', '[1]'])
def test_facts_that_cannot_be_read_are_forgotten(tmp_path, text):
  (tmp_path / 'run.json').write_text(text)
  facts = workdir.Facts(tmp_path)
  assert not facts.is_finished
  facts.finish()
  assert workdir.Facts(tmp_path).is_finished

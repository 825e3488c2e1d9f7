import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from longjax import config
from longjax.reward import grading
from longjax.rl import advantage, loss
from longjax.train import presets, rl_stage

ALL = {
    made.__name__: made() for made in (
        presets.qwenlong_l15, presets.qwenlong_l1, presets.grpo,
        presets.drgrpo, presets.dapo)}
MAX_LEN = 20480
OWN = dict(
    steps=1, max_prompt_len=64, row_lens=(MAX_LEN + 64,), optimizer=dict(
        learning_rate=1e-6), sampler=dict(max_response_len=MAX_LEN))
# Two prompts, three responses each, of one task.
REWARDS = np.float32([[0, 1, 1], [0, 0.25, 1]])
LENGTHS = np.int32([[4, 10, 20], [6, 6, 14]])


def stage(name):
  return config.build(rl_stage.RlStage, {**ALL[name], **OWN})


def of_batch(name):
  """Advantages and token weights of the batch above, [P, G]."""
  made = stage(name)
  groups = jnp.repeat(jnp.arange(2), 3)
  output = advantage.advantages(
      jnp.asarray(REWARDS.reshape(-1)), groups, jnp.zeros(6, jnp.int32),
      jnp.ones(6, bool), method=made.advantage.method, num_groups=2,
      num_stats=1, epsilon=made.advantage.epsilon, min_stat_n=2)
  weights = loss.response_weights(
      jnp.asarray(LENGTHS.reshape(-1)), groups, jnp.ones(6, bool),
      loss_norm=made.loss.loss_norm, num_groups=2,
      max_response_len=made.sampler.max_response_len)
  return np.reshape(output.advantages, (2, 3)), np.reshape(weights, (2, 3))


CENTRED = REWARDS - REWARDS.mean(axis=1, keepdims=True)
BY_GROUP = CENTRED / REWARDS.std(axis=1, ddof=1, keepdims=True)


@pytest.mark.parametrize('name, advantages, weights', [
    ('qwenlong_l15', CENTRED / REWARDS.std(ddof=1), 1 / 60),
    ('qwenlong_l1', BY_GROUP, 1 / 60),
    ('grpo', BY_GROUP, 1 / 6 / LENGTHS),
    ('drgrpo', CENTRED, 1 / 6 / MAX_LEN),
    ('dapo', BY_GROUP, 1 / 60),
])
def test_rewards_become_what_the_paper_says(name, advantages, weights):
  got_advantages, got_weights = of_batch(name)
  np.testing.assert_allclose(got_advantages, advantages, rtol=1e-4)
  np.testing.assert_allclose(
      got_weights, np.broadcast_to(weights, (2, 3)), rtol=1e-6)


@pytest.mark.parametrize('name', ALL)
def test_several_updates_a_batch_are_clipped(name):
  made = stage(name)
  assert (made.loss.objective == 'off_policy') == (made.num_minibatches > 1)


def test_the_default_stage_is_that_of_qwenlong_l15_but_for_its_judge():
  assert stage('qwenlong_l15') == dataclasses.replace(
      config.build(rl_stage.RlStage, OWN),
      judge=grading.JudgeConfig(mode='inprocess'))


@pytest.mark.parametrize('name', ALL)
def test_length_sampling_and_judge_are_the_papers(name):
  made = stage(name)
  is_dapos = name in ('qwenlong_l1', 'dapo')
  assert (made.overlong.mode == 'soft') == is_dapos
  assert made.oversample == (3 if is_dapos else 1)
  assert (made.judge.mode == 'none') == (name in ('grpo', 'drgrpo', 'dapo'))


def test_presets_have_the_same_keys_and_no_two_the_same_values():
  values = list(ALL.values())
  for preset in values:
    assert preset.keys() == values[0].keys()
    for key in ('advantage', 'loss', 'aepo'):
      assert preset[key].keys() == values[0][key].keys()
    assert values.count(preset) == 1


def test_a_call_gives_values_of_its_own():
  presets.grpo()['loss']['eps_low'] = 0.0
  assert presets.grpo() == ALL['grpo']

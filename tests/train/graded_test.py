"""Tests for longjax.train.graded: pure host code, nothing is sampled."""

import dataclasses

import numpy as np
import pytest

from longjax import types
from longjax.agents import memory, rounds
from longjax.rl import batch, overlong
from longjax.rl import loss as loss_lib
from longjax.train import graded as graded_lib
from longjax.train import sampling
from tests import tiny_model

NUM_SAMPLES, MAX_LEN = 3, 8


def of(num_prompts, rewards=None, *, num_samples=NUM_SAMPLES, seed=0):
  """Graded rollouts; a text says which prompt and sample it is."""
  asked = tiny_model.prompts([4 + i % 3 for i in range(num_prompts)])
  rollouts = tiny_model.rollouts(num_prompts, num_samples, MAX_LEN, seed)
  if rewards is None:
    rewards = np.random.default_rng(seed).random((num_prompts, num_samples))
  rewards = np.float32(rewards).reshape(-1)
  return graded_lib.Graded(
      sampled=sampling.Sampled(
          prompts=asked, example=np.arange(num_prompts) + 50,
          rollouts=rollouts,
          texts=[f'{p} {g}' for p, g in np.ndindex(num_prompts, num_samples)],
          groups=batch.groups(asked, rollouts)),
      scores=[types.Score(reward=float(r), answer='', rule='test')
              for r in rewards],
      rewards=rewards)


def stage(**overrides):
  return tiny_model.rl_stage(
      num_samples=NUM_SAMPLES, loss=loss_lib.LossConfig(
          objective='off_policy'), **overrides)


def to_train(graded, step=0, **overrides):
  return graded_lib.to_train(graded, stage(**overrides), seed=0, step=step)


def assert_is(got, want, place, q):
  """Group `place` of what is trained on is the sampled group q, renumbered."""
  assert got.sampled.prompts[place] is want.sampled.prompts[q]
  assert got.sampled.example[place] == want.sampled.example[q]
  for name in ('tokens', 'lengths', 'logprobs', 'entropy', 'is_finished'):
    np.testing.assert_array_equal(
        getattr(got.sampled.rollouts, name)[place],
        getattr(want.sampled.rollouts, name)[q])
  of_place = slice(place * NUM_SAMPLES, (place + 1) * NUM_SAMPLES)
  of_q = slice(q * NUM_SAMPLES, (q + 1) * NUM_SAMPLES)
  assert got.sampled.texts[of_place] == want.sampled.texts[of_q]
  assert got.scores[of_place] == want.scores[of_q]
  np.testing.assert_array_equal(got.rewards[of_place], want.rewards[of_q])
  [group], [before] = got.sampled.groups[place], want.sampled.groups[q]
  assert group.prompt == before.prompt
  for g, (branch, old) in enumerate(zip(group.branches, before.branches)):
    np.testing.assert_array_equal(branch.response, old.response)
    assert branch.trajectory == place * NUM_SAMPLES + g


# Of twelve groups, of two tasks in turn, which vary.
VARYING = (1, 2, 5)
REWARDS = np.float32([
    [0, 1, 1] if q in VARYING else [q % 2] * 3 for q in range(12)])


def test_groups_that_differ_are_trained_on_and_fillers_are_empty():
  asked = of(12, REWARDS)
  got = to_train(asked, num_prompts=4, oversample=3)
  assert got.sampled.rollouts.tokens.shape == (4, NUM_SAMPLES, MAX_LEN)
  index = (got.sampled.example - 50).tolist()
  assert len(set(index)) == 4 and set(VARYING) < set(index)
  for place, q in enumerate(index):
    if q in VARYING:
      assert_is(got, asked, place, q)
    else:
      assert not got.sampled.rollouts.lengths[place].any()
      assert not got.sampled.rollouts.tokens[place].any()
      assert got.sampled.groups[place] == []
      of_place = slice(place * NUM_SAMPLES, (place + 1) * NUM_SAMPLES)
      assert got.scores[of_place] == [None] * NUM_SAMPLES
      assert not got.rewards[of_place].any()
  assert got.metrics['dynamic/varying'] == 3 / 12
  assert got.metrics['dynamic/filled'] == 1 / 4
  # What is reported is all that was sampled.
  np.testing.assert_allclose(
      graded_lib.sampled_metrics(asked)['reward/mean'], REWARDS.mean())
  np.testing.assert_allclose(
      graded_lib.sampled_metrics(asked)['length/mean'], asked.lengths.mean())
  entropy = np.asarray(got.sampled.rollouts.entropy).reshape(12, MAX_LEN)
  by_task = graded_lib.entropy_metrics(got, entropy)
  for task in ('mc', 'multihop'):
    want = [
        entropy[p * 3 + g].sum() / got.lengths[p * 3 + g]
        for p, q in enumerate(index) for g in range(3)
        if q in VARYING and asked.sampled.prompts[q].example.task == task]
    np.testing.assert_allclose(
        by_task[f'entropy_by_task/{task}'], np.mean(want), rtol=1e-6)


def test_a_batch_without_any_group_that_differs_is_empty():
  got = to_train(of(8, np.ones((8, 3))), num_prompts=4, oversample=2)
  assert not got.lengths.any() and got.sampled.groups == [[]] * 4
  assert graded_lib.entropy_metrics(got, np.zeros((12, MAX_LEN))) == {}


def test_what_is_chosen_does_not_depend_on_shaping():
  asked = of(8, REWARDS[:8])
  plain = to_train(asked, num_prompts=4, oversample=2)
  soft = to_train(
      asked, num_prompts=4, oversample=2, overlong=overlong.OverlongConfig(
          mode='soft', buffer_len=MAX_LEN))
  np.testing.assert_array_equal(soft.sampled.example, plain.sampled.example)
  np.testing.assert_array_equal(soft.lengths, plain.lengths)
  assert (soft.rewards <= plain.rewards).all()
  assert (soft.rewards < plain.rewards).any()


def test_mini_batches_are_mixed_anew_each_step():
  asked = of(8)
  orders = []
  for step in (0, 1, 0):
    got = to_train(asked, step, num_minibatches=2)
    order = (got.sampled.example - 50).tolist()
    assert sorted(order) == list(range(8))
    for place, q in enumerate(order):
      assert_is(got, asked, place, q)
    orders.append(order)
  assert orders[0] == orders[2] != orders[1]
  # One that is not cut stays as it is.
  assert to_train(asked).sampled is asked.sampled


def test_a_batch_listed_task_by_task_has_mini_batches_of_all_tasks():
  asked = of(16)
  asked = dataclasses.replace(asked, sampled=dataclasses.replace(
      asked.sampled, prompts=sorted(
          asked.sampled.prompts, key=lambda p: p.example.task)))
  num_of_one = 0
  for step in range(50):
    tasks = to_train(asked, step, num_prompts=16, num_minibatches=4).tasks
    num_of_one += sum(
        len(set(part)) == 1 for part in tasks.reshape(4, -1).tolist())
  # By chance 2 * C(8, 4) / C(16, 4) of them, 7.7%.
  assert num_of_one < 0.15 * 200


def test_trajectories_of_many_turns_are_taken_whole():
  asked = of(4, [[0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0]])
  groups = [[group, group] for [group] in asked.sampled.groups]
  turns = [
      rounds.Turn(
          prompt=rounds.Prompt(query=q, sample=0, turn=0, tokens=(q,)),
          response=rounds.Response(tokens=[1], is_finished=True),
          part=None, notes=memory.Notes()) for q in range(4)]
  asked = dataclasses.replace(asked, sampled=dataclasses.replace(
      asked.sampled, groups=groups, turns=turns))
  got = to_train(asked, num_prompts=2, oversample=2)
  index = (got.sampled.example - 50).tolist()
  assert sorted(index) == [1, 3]
  for place, of_prompt in enumerate(got.sampled.groups):
    assert len(of_prompt) == 2
    for group in of_prompt:
      assert [b.trajectory for b in group.branches] == [
          place * NUM_SAMPLES + g for g in range(NUM_SAMPLES)]
  for turn in got.sampled.turns:
    assert turn.prompt.tokens == (index[turn.prompt.query],)


@pytest.mark.parametrize('factor', [1.0, 0.5])
def test_the_soft_penalty_is_that_of_the_formula(factor):
  asked = of(6)
  buffer_len = 5
  got = to_train(asked, overlong=overlong.OverlongConfig(
      mode='soft', buffer_len=buffer_len, factor=factor))
  want = np.zeros(18)
  for i, (reward, length) in enumerate(zip(
      asked.rewards.astype(np.float64), asked.lengths.tolist())):
    over = length - (MAX_LEN - buffer_len)
    want[i] = reward + factor * min(0.0, -over / buffer_len)
  assert (want < asked.rewards - 1e-3).any() and (want == asked.rewards).any()
  np.testing.assert_allclose(got.rewards, want, rtol=0, atol=1e-6)
  np.testing.assert_allclose(
      got.metrics['overlong/penalty'], (asked.rewards - want).mean(),
      rtol=1e-5)
  assert got.scores == asked.scores


def test_penalties_are_shuffled_with_the_rewards_they_are_part_of():
  asked = of(6)
  soft = overlong.OverlongConfig(mode='soft', buffer_len=MAX_LEN)
  plain = to_train(asked, overlong=soft)
  shuffled = to_train(asked, overlong=soft, shuffle_rewards=True)
  assert (shuffled.rewards != plain.rewards).any()
  np.testing.assert_array_equal(
      np.sort(shuffled.rewards), np.sort(plain.rewards))


@pytest.mark.parametrize('overrides, message', [
    (dict(oversample=0), 'rl.oversample=0 must be >= 1'),
    (dict(oversample=2, shuffle_rewards=True),
     'rl.oversample=2 chooses prompts by their rewards'),
    (dict(overlong=overlong.OverlongConfig(mode='soft', buffer_len=9)),
     'overlong.buffer_len=9 is more than sampler.max_response_len=8'),
    (dict(overlong=overlong.OverlongConfig(mode='soft', buffer_len=4),
          memory=memory.MemoryConfig(part_len=8, memory_len=2, plan_len=2)),
     "rl.overlong.mode='soft' does not go with rl.memory"),
])
def test_impossible_stages_are_refused(overrides, message):
  with pytest.raises(types.UserError, match=message):
    stage(**overrides)


def test_a_step_that_is_cut_does_not_choose():
  with pytest.raises(
      types.UserError, match='rl.oversample=2 does not go with rl.cut_tokens'):
    tiny_model.rl_stage(
        oversample=2, cut_tokens=5, loss=loss_lib.LossConfig(tis_cap=2.0))

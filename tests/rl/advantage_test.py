import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from longjax import types
from longjax.rl import advantage

N, NUM_GROUPS, NUM_STATS = 24, 6, 3


def reference(rewards, groups, stats, valid, method, epsilon=1e-6, min_n=8):
  """The definitions, one response at a time, in float64."""
  rewards = rewards.astype(np.float64)
  out = np.zeros(len(rewards))
  for i in range(len(rewards)):
    if not valid[i]:
      continue
    group = rewards[valid & (groups == groups[i])]
    stat = rewards[valid & (stats == stats[i])]
    batch = rewards[valid]
    if len(group) == 1 or len(set(group)) == 1:
      continue
    centred = rewards[i] - group.mean()
    if method == 'none':
      out[i] = centred
    elif method == 'loo':
      out[i] = rewards[i] - (group.sum() - rewards[i]) / (len(group) - 1)
    elif method == 'group_std':
      out[i] = centred / (group.std(ddof=1) + epsilon)
    elif method == 'batch_std':
      out[i] = centred / (batch.std(ddof=1) + epsilon)
    elif method == 'task_std':
      if len(stat) == 1 or len(set(stat)) == 1:
        continue
      pool = stat if len(stat) >= min_n else batch
      out[i] = centred / (pool.std(ddof=1) + epsilon)
  return out


@functools.partial(jax.jit, static_argnames='method')
def compute(rewards, groups, stats, valid, method):
  return advantage.advantages(
      rewards, groups, stats, valid, method=method, num_groups=NUM_GROUPS,
      num_stats=NUM_STATS)


def batch(seed=0):
  rng = np.random.default_rng(seed)
  groups = np.sort(rng.integers(0, NUM_GROUPS, N)).astype(np.int32)
  stats = (groups // 2).astype(np.int32)
  rewards = rng.choice([0.0, 0.25, 0.7, 1.0], N).astype(np.float32)
  return rewards, groups, stats, rng.uniform(size=N) < 0.9


def one_task(rewards, groups=None, **kwargs):
  """All responses in one statistics group, by default in one group."""
  rewards = jnp.float32(rewards)
  zeros = jnp.zeros(rewards.shape, jnp.int32)
  groups = zeros if groups is None else jnp.int32(groups)
  return advantage.advantages(
      rewards, groups, zeros, jnp.ones(rewards.shape, bool),
      num_groups=4, num_stats=1, **kwargs)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('method', advantage.METHODS)
def test_every_method_equals_float64_loops(method, seed):
  data = batch(seed)
  got = compute(*data, method=method)
  np.testing.assert_allclose(
      got.advantages, reference(*data, method), rtol=2e-5, atol=1e-6)


def test_jit_changes_nothing():
  data = batch()
  with jax.disable_jit():
    eager = compute(*data, method='task_std')
  jitted = compute(*data, method='task_std')
  np.testing.assert_allclose(
      eager.advantages, jitted.advantages, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('method', advantage.METHODS)
@pytest.mark.parametrize('value', [0.0, 0.1, 1.0, 12345.678])
def test_equal_rewards_give_exactly_zero(method, value):
  got = one_task([value] * 3 + [0.0, 1.0], [0, 0, 0, 1, 1], method=method)
  np.testing.assert_array_equal(got.advantages[:3], 0.0)
  assert float(got.num_zero_groups) == 1.0
  assert float(got.frac_zero_groups) == 0.5


@pytest.mark.parametrize('method', advantage.METHODS)
def test_a_group_of_one_has_no_baseline_and_is_counted(method):
  got = one_task([0.9, 0.0, 1.0], [0, 1, 1], method=method, min_stat_n=2)
  assert float(got.advantages[0]) == 0.0
  assert np.all(got.advantages[1:] != 0.0)
  assert float(got.num_singleton_groups) == 1.0
  assert float(got.num_groups) == 2.0
  assert float(got.num_zero_groups) == 0.0


def test_one_sample_in_a_task_gives_zero_not_a_million():
  # The statistics group splits a prompt's responses, so the group has a
  # baseline but the task has no deviation.
  got = advantage.advantages(
      jnp.float32([1.0, 0.0, 1.0]), jnp.int32([0, 0, 0]),
      jnp.int32([0, 1, 1]), jnp.ones(3, bool), method='task_std',
      num_groups=1, num_stats=2, min_stat_n=2)
  assert float(got.advantages[0]) == 0.0
  assert np.all(got.advantages[1:] != 0.0)


def test_a_task_of_equal_rewards_gives_zero():
  got = advantage.advantages(
      jnp.float32([1.0, 1.0, 0.0, 1.0]), jnp.int32([0, 0, 0, 0]),
      jnp.int32([0, 0, 1, 1]), jnp.ones(4, bool), method='task_std',
      num_groups=1, num_stats=2, min_stat_n=2)
  np.testing.assert_array_equal(got.advantages[:2], 0.0)
  assert np.all(got.advantages[2:] != 0.0)


def test_a_small_task_uses_the_deviation_of_the_batch_and_is_counted():
  rewards = jnp.float32([0.0, 1.0] + [0.4, 0.5] * 4)
  groups = jnp.int32([0, 0] + [1] * 8)
  got = advantage.advantages(
      rewards, groups, groups, jnp.ones(10, bool), method='task_std',
      num_groups=2, num_stats=2, min_stat_n=8)
  batch_std = np.asarray(rewards).std(ddof=1)
  np.testing.assert_allclose(got.advantages[1], 0.5 / batch_std, rtol=1e-5)
  own_std = np.asarray(rewards[2:]).std(ddof=1)
  np.testing.assert_allclose(got.advantages[3], 0.05 / own_std, rtol=1e-4)
  assert float(got.num_fallbacks) == 1.0


def test_the_reward_of_padding_is_ignored_whatever_it_is():
  rewards, groups, stats, valid = batch(1)
  assert not valid.all()
  garbage = np.where(valid, rewards, np.nan).astype(np.float32)
  before = compute(rewards, groups, stats, valid, 'task_std')
  after = compute(garbage, groups, stats, valid, 'task_std')
  np.testing.assert_array_equal(before.advantages, after.advantages)
  np.testing.assert_array_equal(after.advantages[~valid], 0.0)


def test_an_empty_batch_gives_zeros():
  rewards, groups, stats, _ = batch()
  got = compute(rewards, groups, stats, np.zeros(N, bool), 'task_std')
  np.testing.assert_array_equal(got.advantages, 0.0)
  assert float(got.frac_zero_groups) == 0.0


def test_one_task_does_not_move_another():
  rewards, _, _, valid = batch(2)
  groups = np.repeat(np.arange(6), 4).astype(np.int32)
  stats = groups // 2
  louder = np.where(stats == 2, rewards * 10, rewards).astype(np.float32)
  valid = np.ones_like(valid)
  before = compute(rewards, groups, stats, valid, 'task_std')
  after = compute(louder, groups, stats, valid, 'task_std')
  np.testing.assert_array_equal(
      before.advantages[stats < 2], after.advantages[stats < 2])


def test_nearly_unanimous_groups_are_not_blown_up_by_task_std():
  # 1 of 8 right gives 2.47 under group_std and less here.
  rewards = [1.0] + [0.0] * 7 + [1.0] * 4 + [0.0] * 4
  groups = [0] * 8 + [1] * 8
  by_group = one_task(rewards, groups, method='group_std')
  by_task = one_task(rewards, groups, method='task_std')
  np.testing.assert_allclose(by_group.advantages[0], 2.4748735, rtol=1e-4)
  assert float(by_task.advantages[0]) < 2.0


REWARDS = hnp.arrays(
    np.float32, N, elements=st.sampled_from([0.0, 0.125, 0.5, 0.875, 1.0]))
IDS = hnp.arrays(np.int32, N, elements=st.integers(0, NUM_GROUPS - 1))


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    REWARDS, IDS, hnp.arrays(bool, N), st.permutations(range(N)),
    st.sampled_from(advantage.METHODS))
def test_permuting_responses_permutes_advantages(
    rewards, groups, valid, order, method):
  order = np.array(order)
  stats = groups % NUM_STATS
  before = compute(rewards, groups, stats, valid, method)
  after = compute(
      rewards[order], groups[order], stats[order], valid[order], method)
  np.testing.assert_allclose(
      after.advantages, before.advantages[order], rtol=1e-4, atol=1e-6)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(REWARDS, IDS, st.sampled_from(advantage.METHODS))
def test_the_advantages_of_a_group_sum_to_zero(rewards, groups, method):
  stats = groups % NUM_STATS
  got = compute(rewards, groups, stats, np.ones(N, bool), method)
  totals = jax.ops.segment_sum(got.advantages, groups, NUM_GROUPS)
  np.testing.assert_allclose(totals, 0.0, atol=1e-4)


@pytest.mark.parametrize('kwargs, word', [
    (dict(method='task_stdev'), 'task_stdev'),
    (dict(epsilon=0.0), 'epsilon'),
    (dict(min_stat_n=1), 'min_stat_n'),
])
def test_bad_configuration_is_one_line_naming_the_value(kwargs, word):
  with pytest.raises(types.UserError, match=word) as error:
    advantage.AdvantageConfig(**kwargs)
  assert '\n' not in str(error.value)


def test_groups_of_one_are_refused():
  with pytest.raises(types.UserError, match='num_samples=1'):
    advantage.check_group_size(1)
  advantage.check_group_size(2)

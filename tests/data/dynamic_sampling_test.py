import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from longjax import types
from longjax.data import dynamic_sampling


def does_vary(rewards, lengths):
  """Two responses that count have different rewards."""
  return any(
      a != b and m and n
      for a, m in zip(rewards, lengths) for b, n in zip(rewards, lengths))


def reference(rewards, lengths, tasks, num_prompts, turn):
  """One group at a time: the task with fewest so far gives its next one."""
  names = sorted(set(tasks))
  rank = {t: (names.index(t) - turn) % len(names) for t in names}
  chosen = []
  for wanted in (True, False):
    left = [g for g in range(len(tasks))
            if does_vary(rewards[g], lengths[g]) == wanted]
    given = collections.Counter()
    while left and len(chosen) < num_prompts:
      task = min({tasks[g] for g in left}, key=lambda t: (given[t], rank[t]))
      g = next(g for g in left if tasks[g] == task)
      left.remove(g)
      given[task] += 1
      chosen.append((g, wanted))
  return chosen


@st.composite
def sampled(draw):
  num_groups = draw(st.integers(1, 14))
  num_samples = draw(st.integers(1, 3))

  def array(values):
    return np.asarray(draw(st.lists(
        st.lists(st.sampled_from(values), min_size=num_samples,
                 max_size=num_samples),
        min_size=num_groups, max_size=num_groups)))

  return dict(
      rewards=array([0.0, 0.5, 1.0]).astype(np.float32),
      lengths=array([0, 5, 7, 9]).astype(np.int32),
      tasks=draw(st.lists(st.sampled_from('abc'), min_size=num_groups,
                          max_size=num_groups)),
      num_prompts=draw(st.integers(1, num_groups)),
      turn=draw(st.integers(0, 5)))


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(case=sampled())
def test_the_groups_are_those_of_a_naive_loop(case):
  want = reference(**case)
  choice = dynamic_sampling.choose_groups(**case)
  got = list(zip(choice.groups.tolist(), choice.is_varying.tolist()))
  assert sorted(got) == sorted(want)
  assert len(got) == case['num_prompts']
  for kind in (True, False):  # Merged, but each kind in the loop's order.
    assert [g for g in got if g[1] is kind] == [g for g in want if g[1] is kind]


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(case=sampled(), num_parts=st.integers(1, 4))
def test_every_part_of_a_batch_has_its_share_of_what_varies(case, num_parts):
  hypothesis.assume(case['num_prompts'] % num_parts == 0)
  choice = dynamic_sampling.choose_groups(**case)
  parts = choice.is_varying.reshape(num_parts, -1).sum(axis=1)
  assert parts.max() - parts.min() <= 1


def uniform_case(*, num_groups, tasks, seed=0):
  rng = np.random.default_rng(seed)
  return dict(
      rewards=(rng.uniform(size=(num_groups, 8)) < 0.5).astype(np.float32),
      lengths=np.full((num_groups, 8), 3),
      tasks=[tasks[g * len(tasks) // num_groups] for g in range(num_groups)])


def test_mini_batches_of_a_batch_sampled_task_by_task_hold_all_tasks():
  case = uniform_case(num_groups=384, tasks='abcde')
  choice = dynamic_sampling.choose_groups(**case, num_prompts=128)
  assert choice.is_varying.all()
  for part in choice.groups.reshape(4, 32):
    counts = collections.Counter(case['tasks'][g] for g in part)
    assert sorted(counts.values()) == [6, 6, 6, 7, 7]


def test_what_does_not_divide_over_tasks_goes_to_them_in_turn():
  case = uniform_case(num_groups=60, tasks='abcde')
  total = collections.Counter()
  for turn in range(5):
    choice = dynamic_sampling.choose_groups(**case, num_prompts=12, turn=turn)
    counts = collections.Counter(case['tasks'][g] for g in choice.groups)
    assert sorted(counts.values()) == [2, 2, 2, 3, 3]
    total += counts
  assert set(total.values()) == {12}


def test_a_surplus_is_cut_where_a_task_has_most_and_from_its_end():
  rewards = np.float32([[0, 1]] * 7)
  choice = dynamic_sampling.choose_groups(
      rewards, np.ones((7, 2)), ['a'] * 5 + ['b'] * 2, num_prompts=5)
  assert choice.groups.tolist() == [0, 5, 1, 6, 2]
  assert choice.metrics() == pytest.approx({
      'dynamic/varying': 1.0, 'dynamic/solved': 0.0, 'dynamic/unsolved': 0.0,
      'dynamic/surplus': 2 / 7, 'dynamic/filled': 0.0})


def test_groups_of_equal_rewards_fill_up_and_are_marked_and_counted():
  rewards = np.float32([[0, 0], [1, 1], [0, 1], [0.5, 0.5], [0, 0], [1, 0]])
  choice = dynamic_sampling.choose_groups(
      rewards, np.ones((6, 2)), ['a'] * 6, num_prompts=4)
  assert choice.groups.tolist() == [2, 0, 5, 1]
  assert choice.is_varying.tolist() == [True, False, True, False]
  assert choice.metrics() == pytest.approx({
      'dynamic/varying': 2 / 6, 'dynamic/solved': 1 / 6,
      'dynamic/unsolved': 2 / 6, 'dynamic/surplus': 0.0,
      'dynamic/filled': 0.5})


def test_what_is_carried_over_is_no_difference_and_neither_right_nor_wrong():
  rewards = np.float32([[0, 1, 0], [1, 1, 0], [0, 0, 1]])
  lengths = np.int32([[0, 0, 0], [4, 4, 0], [4, 4, 4]])
  choice = dynamic_sampling.choose_groups(
      rewards, lengths, ['a'] * 3, num_prompts=1)
  assert choice.groups.tolist() == [2]
  assert (choice.num_varying, choice.num_solved, choice.num_unsolved) == (
      1, 1, 0)


def test_fewer_groups_than_are_trained_on_are_refused():
  with pytest.raises(types.UserError, match='num_prompts=3 .*the 2 groups'):
    dynamic_sampling.choose_groups(
        np.zeros((2, 2)), np.ones((2, 2)), 'ab', num_prompts=3)

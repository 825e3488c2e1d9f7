import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from longjax import types
from longjax.data import task_balance

FIVE = ['dialogue', 'mc', 'multihop', 'numeric', 'reading']


def make_sampler(sizes, *, batch_size, seed=0):
  task_of = [task for task, size in sizes.items() for _ in range(size)]
  # Interleaved, so that indices say nothing about tasks.
  order = np.random.default_rng(7).permutation(len(task_of))
  task_of = [task_of[i] for i in order]
  sampler = task_balance.TaskBalancedSampler(
      task_of, batch_size=batch_size, seed=seed)
  return sampler, task_of


def counts(batch, task_of):
  return collections.Counter(task_of[i] for i in batch.tolist())


def test_128_prompts_of_five_tasks_are_26_26_26_25_25():
  sampler, task_of = make_sampler(dict.fromkeys(FIVE, 200), batch_size=128)
  for step in range(10):
    got = counts(sampler.batch(step), task_of)
    assert sorted(got.values()) == [25, 25, 26, 26, 26]
    assert got == sampler.counts(step)


def test_the_remainder_rotates_until_tasks_are_equal():
  sampler, task_of = make_sampler(dict.fromkeys(FIVE, 200), batch_size=128)
  total = collections.Counter()
  for step in range(5):
    total += counts(sampler.batch(step), task_of)
  assert set(total.values()) == {128}


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    sizes=st.dictionaries(
        st.sampled_from(FIVE), st.integers(1, 20), min_size=1),
    batch=st.integers(1, 60), seed=st.integers(0, 9))
def test_batches_never_repeat_a_prompt_and_epochs_use_every_one(
    sizes, batch, seed):
  batch_size = min(batch, sum(sizes.values()))
  sampler, task_of = make_sampler(sizes, batch_size=batch_size, seed=seed)
  stream = collections.defaultdict(list)
  for step in range(25):
    indices = sampler.batch(step).tolist()
    assert len(indices) == len(set(indices)) == batch_size
    for i in indices:
      stream[task_of[i]].append(i)
    # A task either gives its share or everything it has.
    got = counts(np.array(indices), task_of)
    largest = max(got.values())
    for task, size in sizes.items():
      assert got[task] >= largest - 1 or got[task] == size
  for task, drawn in stream.items():
    for start in range(0, len(drawn) - sizes[task] + 1, sizes[task]):
      epoch = drawn[start:start + sizes[task]]
      assert len(set(epoch)) == sizes[task]


def test_epochs_are_shuffled_differently():
  sampler, _ = make_sampler({'mc': 40}, batch_size=40)
  first, second = sampler.batch(0), sampler.batch(1)
  assert sorted(first) == sorted(second)
  assert first.tolist() != second.tolist()


def test_a_batch_depends_on_the_seed_and_the_step_alone():
  sizes = dict.fromkeys(FIVE, 9)
  one, _ = make_sampler(sizes, batch_size=23)
  history = [one.batch(step) for step in range(30)]
  for step in (29, 3, 17, 3, 0):  # Forwards, backwards, again.
    np.testing.assert_array_equal(one.batch(step), history[step])
    fresh, _ = make_sampler(sizes, batch_size=23)
    np.testing.assert_array_equal(fresh.batch(step), history[step])
  other, _ = make_sampler(sizes, batch_size=23, seed=1)
  assert other.batch(0).tolist() != history[0].tolist()


def test_small_tasks_give_all_they_have_and_others_fill_up():
  sampler, task_of = make_sampler(
      {'mc': 2, 'numeric': 50, 'reading': 50}, batch_size=31)
  for step in range(6):
    got = counts(sampler.batch(step), task_of)
    assert got['mc'] == 2
    assert sorted((got['numeric'], got['reading'])) == [14, 15]


def test_a_whole_data_set_fits_one_batch():
  sampler, _ = make_sampler({'mc': 2, 'numeric': 7, 'dialogue': 4},
                            batch_size=13)
  assert sorted(sampler.batch(5).tolist()) == list(range(13))


@pytest.mark.parametrize('batch_size, problem', [
    (0, 'batch_size=0 must be'), (14, 'batch_size=14 .*the data has 13')])
def test_impossible_batches_are_refused(batch_size, problem):
  with pytest.raises(types.UserError, match=problem):
    make_sampler({'mc': 13}, batch_size=batch_size)

import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from longjax.data import difficulty, next_stage

NAN = float('nan')


def scored(examples, prefix):
  """From (task, score) of each."""
  return difficulty.Scored(
      ids=[f'{prefix}{i}' for i in range(len(examples))],
      tasks=[task for task, _ in examples],
      scores=np.float32([score for _, score in examples]))


def pool(prefix, sizes, seed=0):
  rng = np.random.default_rng(seed)
  return scored([
      (task, rng.integers(0, 9) / 8)
      for task, size in sizes.items() for _ in range(size)], prefix)


def tasks_of(examples, indices):
  return collections.Counter(examples.tasks[i] for i in indices.tolist())


def test_a_quarter_comes_back_and_tasks_are_equal():
  sizes = {'mc': 300, 'qa': 200, 'numeric': 150}
  candidates, seen = pool('new', sizes), pool('old', sizes, seed=1)
  made = next_stage.build(candidates, seen, size=240, num_samples=8, seed=0)
  assert tasks_of(candidates, made.fresh) == dict.fromkeys(sizes, 60)
  assert tasks_of(seen, made.retrospective) == dict.fromkeys(sizes, 20)
  assert candidates.scores[made.fresh].max() < 1.0
  assert seen.scores[made.retrospective].max() < 1.0
  assert (candidates.scores[made.fresh] == 0).sum() <= 3 * 15
  assert (seen.scores[made.retrospective] == 0).sum() <= 3 * 10
  assert made.counts['missing'] == 0
  # What comes back is harder than what was seen.
  assert seen.scores[made.retrospective].mean() < seen.scores.mean() - 0.15


example = st.tuples(
    st.sampled_from(['mc', 'qa', 'list']),
    st.sampled_from([0.0, 0.0, 0.125, 0.5, 0.75, 1.0, NAN]))


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    new=st.lists(example, max_size=30), old=st.lists(example, max_size=30),
    size=st.integers(0, 40), share=st.sampled_from([0.0, 0.25, 0.5]),
    mode=st.sampled_from(difficulty.MODES),
    unsolved=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_quotas_hold_and_every_example_is_counted_once(
    new, old, size, share, mode, unsolved):
  candidates, seen = scored(new, 'new'), scored(old, 'old')
  made = next_stage.build(
      candidates, seen, size=size, num_samples=8, seed=0,
      stratify=difficulty.StratifyConfig(max_unsolved=unsolved),
      retrospective=difficulty.RetrospectiveConfig(
          share=share, mode=mode, max_unsolved=1.0 - unsolved))
  fresh = tasks_of(candidates, made.fresh)
  back = tasks_of(seen, made.retrospective)
  tasks = sorted({task for task, _ in new + old})
  for number, task in enumerate(tasks):
    quota = size // len(tasks) + (number < size % len(tasks))
    assert back[task] <= share * quota
    assert fresh[task] + back[task] <= quota
    for of, indices, limit in (
        (candidates, made.fresh, unsolved * (quota - back[task])),
        (seen, made.retrospective, (1.0 - unsolved) * int(share * quota))):
      assert sum(of.tasks[i] == task and of.scores[i] == 0
                 for i in indices) <= limit
    missing = quota - fresh[task] - back[task]
    counts = made.counts_by_task[task]
    assert counts['missing'] == missing
    if missing:  # Nobody was left out who could have come.
      assert counts['fresh/surplus'] == 0
    for name, examples in (('fresh', new), ('retrospective', old)):
      assert sum(n for key, n in counts.items() if key.startswith(
          name)) == sum(t == task for t, _ in examples)
  for of in (made.fresh, made.retrospective):
    assert of.tolist() == sorted(set(of.tolist()))
  for key, number in made.counts.items():
    assert number == sum(c[key] for c in made.counts_by_task.values())


def test_new_examples_take_the_place_of_earlier_ones_but_not_vice_versa():
  new = [('mc', 0.5)] * 100 + [('qa', 0.5)] * 2
  old = [('mc', 1.0)] * 5 + [('qa', 0.5)] * 100
  candidates, seen = scored(new, 'new'), scored(old, 'old')
  made = next_stage.build(candidates, seen, size=80, num_samples=8, seed=0)
  assert tasks_of(candidates, made.fresh) == {'mc': 40, 'qa': 2}
  assert tasks_of(seen, made.retrospective) == {'qa': 10}
  assert made.counts['missing'] == 28


def test_an_example_that_was_tried_again_is_judged_by_its_newer_score():
  candidates = scored([('mc', 1.0), ('mc', 0.5)], 'x')
  seen = scored([('mc', 0.0), ('mc', 0.0), ('mc', 0.25)], 'x')
  made = next_stage.build(
      candidates, seen, size=4, num_samples=8, seed=0,
      retrospective=difficulty.RetrospectiveConfig(share=1.0))
  assert made.fresh.tolist() == [1]
  assert made.retrospective.tolist() == [2]
  assert made.counts['retrospective/candidate'] == 2
  assert made.counts['fresh/solved'] == 1


@pytest.mark.parametrize('seed', range(3))
def test_the_set_depends_on_the_seed_and_not_on_the_order(seed):
  sizes = {'mc': 60, 'qa': 40}
  candidates, seen = pool('new', sizes), pool('old', sizes, seed=1)

  def build(new, old, seed):
    made = next_stage.build(new, old, size=30, num_samples=8, seed=seed)
    return ({new.ids[i] for i in made.fresh},
            {old.ids[i] for i in made.retrospective}, made.counts)

  rng = np.random.default_rng(seed)
  want = build(candidates, seen, seed)
  assert build(candidates.take(rng.permutation(100)),
               seen.take(rng.permutation(100)), seed) == want
  assert build(candidates, seen, seed + 1)[:2] != want[:2]


def test_nothing_gives_nothing():
  made = next_stage.build(
      scored([], 'a'), scored([], 'b'), size=10, num_samples=8, seed=0)
  assert made.fresh.size == made.retrospective.size == 0
  assert made.counts == {}

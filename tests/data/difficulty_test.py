import collections
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from longjax import types
from longjax.data import difficulty

NAN = float('nan')
# Of a chi-square distribution, by degrees of freedom: one in 10,000 is larger.
CHI_SQUARE = {4: 23.51, 9: 33.72, 11: 37.37}


def scored(scores, tasks=None, prefix='x'):
  scores = np.float32(scores)
  return difficulty.Scored(
      ids=[f'{prefix}{i}' for i in range(len(scores))],
      tasks=tasks or ['mc'] * len(scores), scores=scores)


def shuffled(examples, seed):
  return examples.take(np.random.default_rng(seed).permutation(
      len(examples.ids)))


def ids(examples, chosen):
  return {examples.ids[i] for i in chosen.indices.tolist()}


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    examples=st.lists(st.tuples(
        st.sampled_from(['mc', 'qa']),
        st.sampled_from([0, 0, 1, 2, 3, 5, 7, 8, NAN])), max_size=60),
    quota=st.integers(0, 30), num_bins=st.integers(1, 5),
    max_unsolved=st.sampled_from([0.0, 0.25, 1.0]), seed=st.integers(0, 3))
def test_strata_are_as_equal_as_what_there_is_allows(
    examples, quota, num_bins, max_unsolved, seed):
  candidates = scored(
      [s / 8 for _, s in examples], [task for task, _ in examples])
  chosen = difficulty.stratify(
      candidates, quota=quota, seed=seed, config=difficulty.StratifyConfig(
          num_bins=num_bins, max_unsolved=max_unsolved))
  got = chosen.indices.tolist()
  assert got == sorted(set(got))
  limit = int(max_unsolved * quota)
  for task in ('mc', 'qa'):
    offered = [s for t, s in examples if t == task and s < 8]
    taken = [examples[i][1] for i in got if examples[i][0] == task]
    assert all(s < 8 for s in taken)  # None solved, none untried.
    assert taken.count(0) <= limit
    # Of each bin: what may be taken, and what is.
    may, does = (
        [sum(s * num_bins // 8 == b for s in values)
         for b in range(num_bins)] for values in (offered, taken))
    may[0] -= max(0, offered.count(0) - limit)
    assert len(taken) == min(quota, sum(may))
    for b in range(num_bins):
      assert does[b] <= may[b]
      if does[b] < may[b]:
        assert does[b] >= max(does) - 1
  assert sum(chosen.counts.values()) == len(examples)
  assert chosen.counts['chosen'] == len(got)
  assert chosen.counts['solved'] == [s for _, s in examples].count(8)
  assert chosen.counts['untried'] == sum(math.isnan(s) for _, s in examples)


def test_a_quota_of_forty_is_ten_of_each_of_four_bins():
  scores = np.repeat([0.125, 0.25, 0.5, 0.875, 1.0], 50)
  chosen = difficulty.stratify(scored(scores), quota=40, seed=0)
  counts = collections.Counter(scores[chosen.indices].tolist())
  assert counts == {0.125: 10, 0.25: 10, 0.5: 10, 0.875: 10}
  assert chosen.counts == dict(
      chosen=40, untried=0, solved=50, unsolved=0, surplus=160)


def test_a_quarter_of_the_quota_may_be_unsolved():
  chosen = difficulty.stratify(
      scored([0.0] * 90 + [0.125] * 10), quota=40, seed=0)
  # All there is but the zeros over the limit.
  assert chosen.counts == dict(
      chosen=20, untried=0, solved=0, unsolved=80, surplus=0)


def test_what_does_not_divide_goes_to_harder_bins():
  scores = np.repeat([0.125, 0.25, 0.5, 0.875], 50)
  chosen = difficulty.stratify(scored(scores), quota=6, seed=0)
  counts = collections.Counter(scores[chosen.indices].tolist())
  assert counts == {0.125: 2, 0.25: 2, 0.5: 1, 0.875: 1}


def test_a_score_just_below_one_lies_in_the_last_bin():
  almost = np.nextafter(np.float64(1.0), 0.0)
  for num_bins in range(1, 12):
    candidates = difficulty.Scored(
        ids=['x'], tasks=['mc'], scores=np.asarray([almost]))
    chosen = difficulty.stratify(
        candidates, quota=1, seed=0,
        config=difficulty.StratifyConfig(num_bins=num_bins))
    assert chosen.indices.tolist() == [0]


def test_all_of_a_bin_are_as_likely():
  candidates = scored([0.5, 0.55, 0.6, 0.65, 0.7])
  num_draws = 5000
  counts = sum(
      np.bincount(
          difficulty.stratify(candidates, quota=2, seed=seed).indices,
          minlength=5) for seed in range(num_draws))
  want = num_draws * 2 / 5
  # Of two places without replacement: a variance of n p (1 - p), p = 2 / 5,
  # of which 4 / 5 remain between the five.
  assert np.sum((counts - want) ** 2) / (
      want * 0.6 * 5 / 4) < CHI_SQUARE[4]


@pytest.mark.parametrize('seed', range(5))
def test_order_and_other_tasks_do_not_change_what_is_chosen(seed):
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, 9, 80) / 8
  tasks = rng.choice(['mc', 'qa', 'list'], 80).tolist()
  candidates = scored(scores, tasks)
  want = ids(candidates, difficulty.stratify(candidates, quota=7, seed=seed))
  for other in range(3):
    again = shuffled(candidates, other)
    assert ids(again, difficulty.stratify(again, quota=7, seed=seed)) == want
  alone = candidates.take(candidates.of_task('qa'))
  assert ids(alone, difficulty.stratify(
      alone, quota=7, seed=seed)) == want & set(alone.ids)
  assert ids(candidates, difficulty.stratify(
      candidates, quota=7, seed=seed + 1)) != want


def chances(means, size, num_samples, limit):
  """Of each set: drawing one after the other, by weight, from what is left.

  When `limit` unsolved examples are drawn, the others are taken away.
  """
  weights = [1 / (m + 1 / (2 * num_samples)) if m < 1 else 0 for m in means]
  found = collections.Counter()

  def draw(so_far, chance):
    num_unsolved = sum(means[i] == 0 for i in so_far)
    left = [i for i in range(len(means)) if i not in so_far and weights[i]
            and (means[i] > 0 or num_unsolved < limit)]
    if len(so_far) == size or not left:
      found[frozenset(so_far)] += chance
      return
    total = sum(weights[i] for i in left)
    for i in left:
      draw((*so_far, i), chance * weights[i] / total)

  draw((), 1.0)
  assert math.isclose(sum(found.values()), 1.0)
  return found


def chi_square(counts, want):
  num_draws = sum(counts.values())
  assert counts.keys() <= want.keys()
  return sum((counts[s] - num_draws * want[s]) ** 2 / (num_draws * want[s])
             for s in want)


@pytest.mark.parametrize('means, size, max_unsolved', [
    ((0.125, 0.25, 0.5, 0.75, 0.875), 2, 0.5),
    ((0.0, 0.25, 0.0, 0.75, 1.0, 0.0, 0.5), 2, 0.5),
    ((0.0, 0.125, 0.0, 0.75, 0.5), 3, 1.0),
])
def test_sets_are_as_frequent_as_drawing_one_after_the_other_says(
    means, size, max_unsolved):
  examples = scored(means)
  config = difficulty.RetrospectiveConfig(max_unsolved=max_unsolved)
  counts = collections.Counter(
      frozenset(difficulty.retrospective(
          examples, size=size, num_samples=4, seed=seed, config=config
      ).indices.tolist())
      for seed in range(10_000))
  limit = int(max_unsolved * size)
  want = chances(means, size, 4, limit)
  assert len(want) in range(8, 13)
  assert chi_square(counts, want) < CHI_SQUARE[11]
  # Weights of 1 / m in place of 1 / (m + 1 / 2G), or equal ones, would be seen.
  for wrong in (chances(means, size, 10_000, limit),
                chances(means, size, 1e-9, limit)):
    assert chi_square(counts, wrong) > 200


def test_the_hardest_are_those_of_the_lowest_mean():
  rng = np.random.default_rng(0)
  means = rng.permutation(np.arange(1, 41) / 40)
  chosen = difficulty.retrospective(
      scored(means), size=10, num_samples=8, seed=0,
      config=difficulty.RetrospectiveConfig(mode='hardest'))
  assert sorted(means[chosen.indices]) == pytest.approx(
      np.arange(1, 11) / 40)


def test_among_the_hardest_chance_decides_between_equals():
  examples = scored([0.5, 0.25, 0.25, 0.25, 0.125])
  got = collections.Counter(
      tuple(difficulty.retrospective(
          examples, size=2, num_samples=8, seed=seed,
          config=difficulty.RetrospectiveConfig(mode='hardest')
      ).indices.tolist()) for seed in range(600))
  assert got.keys() == {(1, 4), (2, 4), (3, 4)}
  assert min(got.values()) > 140


@pytest.mark.parametrize('mode', difficulty.MODES)
@pytest.mark.parametrize('max_unsolved, num_unsolved', [
    (0.0, 0), (0.5, 5), (1.0, 10)])
def test_at_most_a_share_is_unsolved(mode, max_unsolved, num_unsolved):
  examples = scored([0.0] * 3000 + [0.9] * 20)
  chosen = difficulty.retrospective(
      examples, size=10, num_samples=8, seed=0,
      config=difficulty.RetrospectiveConfig(
          mode=mode, max_unsolved=max_unsolved))
  assert len(chosen.indices) == 10
  assert (chosen.indices < 3000).sum() == num_unsolved


@pytest.mark.parametrize('mode', difficulty.MODES)
def test_solved_and_never_visited_prompts_do_not_come_back(mode):
  examples = scored([1.0, NAN, 0.5, 0.0, 0.0, NAN, 1.0])
  for seed in range(20):
    chosen = difficulty.retrospective(
        examples, size=4, num_samples=8, seed=seed,
        config=difficulty.RetrospectiveConfig(mode=mode))
    assert chosen.indices.tolist() == [2, 3, 4]
    assert chosen.counts == dict(
        chosen=3, untried=2, solved=2, unsolved=0, surplus=0)


@pytest.mark.parametrize('mode', difficulty.MODES)
def test_what_comes_back_depends_on_the_seed_and_not_on_the_order(mode):
  examples = scored(np.random.default_rng(0).integers(0, 9, 60) / 8)
  config = difficulty.RetrospectiveConfig(mode=mode)

  def choose(of, seed):
    return ids(of, difficulty.retrospective(
        of, size=9, num_samples=8, seed=seed, config=config))

  want = choose(examples, 3)
  for order in range(4):
    assert choose(shuffled(examples, order), 3) == want
  assert len({frozenset(choose(examples, seed)) for seed in range(10)}) > 5


def test_nothing_to_choose_from_gives_nothing():
  for chosen in (
      difficulty.stratify(scored([]), quota=3, seed=0),
      difficulty.retrospective(scored([]), size=3, num_samples=8, seed=0)):
    assert chosen.indices.tolist() == []
    assert set(chosen.counts.values()) == {0}


@pytest.mark.parametrize('make, problem', [
    (lambda: difficulty.StratifyConfig(num_bins=0), 'num_bins=0 must be'),
    (lambda: difficulty.StratifyConfig(max_unsolved=1.5),
     'max_unsolved=1.5 is a share; use'),
    (lambda: difficulty.RetrospectiveConfig(mode='easiest'),
     "mode='easiest' is unknown; use one of weighted, hardest"),
    (lambda: difficulty.RetrospectiveConfig(share=-0.1),
     'share=-0.1 is a share; use'),
    (lambda: difficulty.RetrospectiveConfig(max_unsolved=2.0),
     'retrospective max_unsolved=2.0 is a share; use'),
])
def test_impossible_values_are_refused_in_one_line(make, problem):
  with pytest.raises(types.UserError, match=problem) as error:
    make()
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('scores', [[-0.1], [1.1]])
def test_scores_outside_of_zero_to_one_are_a_bug(scores):
  with pytest.raises(AssertionError):
    scored(scores)


def test_noise_is_uniform_and_never_reaches_its_bounds():
  noise = np.concatenate([
      difficulty._uniform([f'{i}' for i in range(1000)], seed)
      for seed in range(10)])
  assert 0.0 < noise.min() and noise.max() < 1.0
  assert len(set(noise.tolist())) == noise.size
  counts = np.histogram(noise, bins=10, range=(0, 1))[0]
  assert np.sum((counts - 1000) ** 2 / 1000) < CHI_SQUARE[9]


def test_the_oracle_itself_knows_a_case_done_by_hand():
  # Weights 4, 2, 1 at G = 2: means 0, 0.25, 0.75.
  got = chances((0.0, 0.25, 0.75), 2, 2, limit=1)
  assert got == pytest.approx({
      frozenset((0, 1)): 4 / 7 * 2 / 3 + 2 / 7 * 4 / 5,
      frozenset((0, 2)): 4 / 7 * 1 / 3 + 1 / 7 * 4 / 6,
      frozenset((1, 2)): 2 / 7 * 1 / 5 + 1 / 7 * 2 / 6})

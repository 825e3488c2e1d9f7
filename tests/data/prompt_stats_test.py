import json

import numpy as np
import pytest

from longjax.data import prompt_stats, records
from longjax.train import checkpoint

FIELDS = ('visits', 'mean', 'std', 'length', 'truncated')


def groups(seed, *, num_examples=7, num_prompts=4, num_samples=3):
  """A step's groups, some responses and whole groups of length 0."""
  rng = np.random.default_rng(seed)
  shape = num_prompts, num_samples
  lengths = rng.integers(0, 40, shape).astype(np.int32)
  lengths *= rng.uniform(size=(num_prompts, 1)) < 0.8
  return dict(
      examples=rng.permutation(num_examples)[:num_prompts],
      rewards=rng.uniform(size=shape).astype(np.float32),
      lengths=lengths, is_finished=rng.uniform(size=shape) < 0.7)


def reference(steps, num_examples):
  """One response at a time, in Python floats, from the definitions."""
  rows = [dict.fromkeys(FIELDS, 0.0) for _ in range(num_examples)]
  for step in steps:
    for p, example in enumerate(step['examples'].tolist()):
      trained = [g for g in range(step['lengths'].shape[1])
                 if step['lengths'][p, g] > 0]
      if not trained:
        continue
      row = rows[example]
      rewards = [float(step['rewards'][p, g]) for g in trained]
      mean = sum(rewards) / len(rewards)
      row['mean'] = (
          0.5 * row['mean'] + 0.5 * mean if row['visits'] else mean)
      row['visits'] += 1
      spread = sum((r - mean) ** 2 for r in rewards)
      row['std'] = (
          (spread / (len(rewards) - 1)) ** 0.5 if len(rewards) > 1 else 0.0)
      row['length'] = sum(
          int(step['lengths'][p, g]) for g in trained) / len(trained)
      row['truncated'] = sum(
          not step['is_finished'][p, g] for g in trained) / len(trained)
  return rows


def assert_equal(one, other):
  for field in FIELDS:
    np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    assert getattr(one, field).dtype == getattr(other, field).dtype


def one_group(example, rewards, lengths=None, is_finished=None):
  rewards = np.float32([rewards])
  ones = np.ones(rewards.shape, np.int32)
  return dict(
      examples=np.asarray([example]), rewards=rewards,
      lengths=ones if lengths is None else np.int32([lengths]),
      is_finished=ones > 0 if is_finished is None else np.asarray(
          [is_finished]))


@pytest.mark.parametrize('seed', range(5))
def test_a_run_of_steps_gives_what_the_definitions_give(seed):
  steps = [groups((seed, step)) for step in range(12)]
  stats = prompt_stats.nothing(7)
  for step in steps:
    stats = prompt_stats.update(stats, **step)
  want = reference(steps, 7)
  assert any(row['visits'] > 2 for row in want)
  for field in FIELDS:
    np.testing.assert_allclose(
        getattr(stats, field), [row[field] for row in want], rtol=1e-6,
        atol=1e-7)


def test_the_first_visit_sets_the_mean_and_later_ones_count_half():
  stats = prompt_stats.nothing(2)
  means = []
  for rewards in ([1, 1], [0, 0], [0, 1], [1, 1]):
    stats = prompt_stats.update(stats, **one_group(1, rewards))
    means.append(float(stats.mean[1]))
  assert means == [1.0, 0.5, 0.5, 0.75]
  assert stats.visits.tolist() == [0, 4]


def test_deviation_length_and_truncation_are_of_the_last_visit():
  stats = prompt_stats.update(prompt_stats.nothing(1), **one_group(
      0, [0, 1], lengths=[100, 200], is_finished=[False, False]))
  assert stats.std[0] == np.float32(0.5 ** 0.5)  # ddof=1
  stats = prompt_stats.update(stats, **one_group(
      0, [1, 1, 1, 1], lengths=[2, 4, 6, 8],
      is_finished=[True, True, True, False]))
  assert (stats.std[0], stats.length[0], stats.truncated[0]) == (0, 5, 0.25)


def test_a_group_that_is_carried_over_is_no_visit():
  before = prompt_stats.update(
      prompt_stats.nothing(3), **one_group(2, [0.5, 1.0]))
  after = prompt_stats.update(
      before, **one_group(2, [1.0, 1.0], lengths=[0, 0]))
  assert_equal(before, after)


def test_empty_responses_do_not_count_whatever_their_values():
  stats = prompt_stats.update(prompt_stats.nothing(1), **one_group(
      0, [0.25, np.nan, 0.75], lengths=[3, 0, 5],
      is_finished=[True, False, True]))
  assert stats.mean[0] == 0.5
  assert stats.length[0] == 4.0
  assert stats.truncated[0] == 0.0


def test_equal_rewards_have_no_deviation_and_a_solved_prompt_stays_solved():
  stats = prompt_stats.nothing(2)
  for _ in range(5):
    stats = prompt_stats.update(stats, **one_group(0, [0.1, 0.1, 0.1]))
    stats = prompt_stats.update(stats, **one_group(1, [1.0, 1.0, 1.0]))
  assert stats.std.tolist() == [0.0, 0.0]
  assert stats.mean.tolist() == [np.float32(0.1), 1.0]


def test_an_update_changes_nothing_but_its_result():
  before = prompt_stats.update(prompt_stats.nothing(7), **groups(0))
  kept = {field: getattr(before, field).copy() for field in FIELDS}
  after = prompt_stats.update(before, **groups(1))
  assert after.visits.sum() > before.visits.sum()
  for field in FIELDS:
    np.testing.assert_array_equal(getattr(before, field), kept[field])


def test_the_order_of_groups_and_responses_does_not_matter():
  step = groups(3)
  permuted = {k: v[[2, 0, 3, 1]] for k, v in step.items()}
  permuted |= {k: permuted[k][:, [2, 0, 1]]
               for k in ('rewards', 'lengths', 'is_finished')}
  stats = prompt_stats.nothing(7)
  one = prompt_stats.update(stats, **step)
  other = prompt_stats.update(stats, **permuted)
  for field in FIELDS:
    np.testing.assert_allclose(
        getattr(one, field), getattr(other, field), rtol=1e-6)


def test_a_prompt_twice_in_a_batch_is_a_bug():
  step = groups(0)
  step['examples'] = np.asarray([5, 5, 5, 5])
  with pytest.raises(AssertionError, match='twice'):
    prompt_stats.update(prompt_stats.nothing(7), **step)


def test_a_restored_table_goes_on_with_the_same_bits(tmp_path):
  stats = prompt_stats.nothing(7)
  for step in range(6):
    if step == 3:
      with checkpoint.Checkpointer(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save(3, {'prompts': stats}, {})
      with checkpoint.Checkpointer(tmp_path / 'checkpoints') as checkpoints:
        restored = checkpoints.restore_latest(
            {'prompts': prompt_stats.nothing(7)}).tree['prompts']
      assert_equal(restored, stats)
      assert all(type(getattr(restored, f)) is np.ndarray for f in FIELDS)
    else:
      restored = stats if step < 3 else restored
    stats = prompt_stats.update(stats, **groups(step))
    restored = prompt_stats.update(restored, **groups(step))
  assert_equal(restored, stats)


def test_the_table_lists_visited_prompts_and_is_json():
  stats = prompt_stats.update(prompt_stats.nothing(3), **one_group(
      2, [0.0, 1.0], lengths=[8, 4], is_finished=[False, True]))
  table = prompt_stats.table(stats, ['a', 'b', 'c'])
  assert json.loads(json.dumps(table)) == [dict(
      id='c', visits=1, mean=0.5, std=float(np.float32(0.5 ** 0.5)),
      length=6.0, truncated=0.5)]
  assert prompt_stats.table(prompt_stats.nothing(3), ['a', 'b', 'c']) == []


def test_metrics_count_visited_solved_and_unsolved_prompts():
  stats = prompt_stats.nothing(10)
  assert prompt_stats.metrics(stats) == {
      'prompts/visited': 0.0, 'prompts/solved': 0.0, 'prompts/unsolved': 0.0}
  for example, rewards in enumerate(([0, 0], [0, 1], [1, 1], [0, 0], [1, 0])):
    stats = prompt_stats.update(stats, **one_group(example, rewards))
  assert prompt_stats.metrics(stats) == pytest.approx({
      'prompts/visited': 0.5, 'prompts/solved': 0.2, 'prompts/unsolved': 0.4})


def test_the_table_is_written_as_lines(tmp_path):
  stats = prompt_stats.nothing(3)
  for i in (2, 0):
    stats = prompt_stats.update(stats, **one_group(i, [0.0, i / 3]))
  path = tmp_path / 'prompt_stats' / 'rl.jsonl'
  prompt_stats.write(path, stats, ['a', 'b', 'c'])
  assert records.read(path) == prompt_stats.table(stats, ['a', 'b', 'c'])
  assert [p.name for p in path.parent.iterdir()] == ['rl.jsonl']


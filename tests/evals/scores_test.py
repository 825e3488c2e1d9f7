import numpy as np
import pytest

from longjax.evals import scores


def _record(number, task='mc', length=64, reward=0.0, sample=0, **changes):
  fields = dict(
      id=f'{task}-{number}', task=task, context_length=length,
      prompt_length=length, depth=None, sample=sample, question='?',
      gold=('a',), evidence=(), response='a', response_length=5,
      is_finished=True, answer='a', rule='exact', reward=reward)
  return scores.Record(**{**fields, **changes})


def _random_records(seed, num_examples=20, num_samples=4):
  generator = np.random.default_rng(seed)
  records = []
  for task in ('mc', 'numeric'):
    for number in range(num_examples):
      chance = generator.random()
      for sample in range(num_samples):
        records.append(_record(
            number, task, 64 if number % 2 else 128,
            float(generator.random() < chance), sample))
  return records


def test_the_overall_score_weighs_task_types_equally():
  records = [_record(i, 'mc', reward=1.0) for i in range(9)]
  records += [_record(i, 'numeric', reward=0.0) for i in range(3)]
  table = scores.table(records)
  assert table['overall']['reward'] == 0.5
  assert table['by_length']['64']['reward'] == 0.5
  assert table['by_task']['mc']['reward'] == 1.0
  assert table['by_task']['numeric']['num_examples'] == 3


def test_the_interval_is_clustered_by_example():
  records = _random_records(0)
  # Copies of responses are no new evidence: the interval must not shrink.
  copies = [
      _record(int(r.id.split('-')[1]), r.task, r.context_length, r.reward,
              r.sample + 4 * copy)
      for copy in range(5) for r in records]
  assert scores.table(copies)['overall']['low'] == pytest.approx(
      scores.table(records)['overall']['low'])


def test_a_cell_agrees_with_brute_force():
  records = _random_records(1)
  cell = scores.table(records, num_resamples=20_000)['by_task']['mc']
  by_example = {}
  for record in records:
    if record.task == 'mc':
      by_example.setdefault(record.id, []).append(record.reward)
  means = [sum(v) / len(v) for v in by_example.values()]
  generator = np.random.default_rng(9)
  resampled = [
      np.mean([means[generator.integers(20)] for _ in range(20)])
      for _ in range(10_000)]
  assert cell['reward'] == pytest.approx(np.mean(means))
  # Quantiles of 10,000 draws wander by about 2e-3.
  assert cell['low'] == pytest.approx(np.quantile(resampled, 0.025), abs=0.01)
  assert cell['high'] == pytest.approx(np.quantile(resampled, 0.975), abs=0.01)
  assert (cell['num_examples'], cell['num_responses']) == (20, 80)


def test_what_went_wrong_is_counted():
  records = [
      _record(0, is_finished=False, answer=''), _record(1, answer=''),
      _record(2, response_length=9), _record(3)]
  cell = scores.table(records)['overall']
  assert (cell['truncated'], cell['no_answer']) == (0.25, 0.5)
  assert cell['response_length'] == 6.0


def test_cells_by_task_and_length_and_by_depth():
  records = [
      _record(0, 'mc', 64, 1.0, depth=0.0), _record(1, 'mc', 128, depth=1.0),
      _record(2, 'numeric', 64, 0.5, depth=0.3), _record(3, 'numeric', 64)]
  table = scores.table(records)
  assert {t: {n: c['reward'] for n, c in cells.items()}
          for t, cells in table['by_task_and_length'].items()} == {
              'mc': {'64': 1.0, '128': 0.0}, 'numeric': {'64': 0.25}}
  assert {b: c['reward'] for b, c in table['by_depth'].items()} == {
      '0-25%': 1.0, '25-50%': 0.5, '75-100%': 0.0}


def test_a_gain_compares_the_same_examples():
  before = [_record(0, reward=0.0), _record(1, reward=1.0),
            _record(2, reward=0.0)]
  after = [_record(0, reward=0.5), _record(1, reward=1.0),
           _record(9, reward=1.0)]
  result = scores.gain(before, after)
  assert (result.mean, result.low, result.high) == (0.25, 0.0, 0.5)
  assert np.isnan(scores.gain(before, after, task='numeric').mean)
  assert np.isnan(scores.gain(before, after, context_length=128).mean)


def test_pairing_tightens_the_interval():
  before = _random_records(2)
  after = [
      _record(int(r.id.split('-')[1]), r.task, r.context_length,
              min(r.reward + 0.2, 1.0), r.sample) for r in before]
  paired = scores.gain(before, after)
  cells = [scores.table(r)['overall'] for r in (before, after)]
  apart = max(c['high'] - c['low'] for c in cells)
  assert paired.high - paired.low < apart / 3


def test_an_empty_evaluation_has_no_cells():
  table = scores.table([])
  assert table['by_task'] == {} and table['by_length'] == {}
  assert table['overall'] is None

"""Tests for longjax.evals.summary."""

import io

from longjax.evals import runner, scores, summary


def save(workdir, name, rewards, task='mc'):
  """One evaluation; the examples are numbered from `rewards`' first key."""
  runner.save(workdir, name, [
      scores.Record(
          id=str(number), task=task, context_length=64, prompt_length=60,
          depth=None, sample=0, question='?', gold=('a',), evidence=(),
          response='a', response_length=5, is_finished=True, answer='a',
          rule='exact', reward=reward) for number, reward in rewards.items()])


def rows_of(workdir):
  """The table's cells by the first of each row."""
  stream = io.StringIO()
  summary.show(workdir, stream)
  rows = [[cell.strip() for cell in line.strip('|').split('|')]
          for line in stream.getvalue().splitlines() if '|' in line]
  return {row[0]: row[1:] for row in rows}


def test_a_run_without_evaluations_has_no_table(tmp_path):
  assert rows_of(tmp_path) == {}
  runner.save(tmp_path, '0_base', [])
  assert rows_of(tmp_path) == {}


def test_the_last_column_is_the_gain_on_the_same_examples(tmp_path):
  save(tmp_path, '0_base', {0: 1.0, 1: 1.0})
  save(tmp_path, '1_sft', {0: 0.0, 1: 0.5, 2: 1.0})
  save(tmp_path, '2_rl', {0: 1.0, 1: 1.0, 3: 0.0})
  rows = rows_of(tmp_path)
  assert rows['held-out reward'] == ['base', 'sft', 'rl', 'rl - sft']
  assert rows['mc'] == [
      '1.00 [1.00, 1.00]', '0.50 [0.00, 1.00]', '0.67 [0.00, 1.00]',
      '+0.75 [+0.50, +1.00]']
  assert rows['mean over task types'] == rows['mc']


def test_what_cannot_be_compared_is_left_blank(tmp_path):
  save(tmp_path, '0_base', {0: 1.0, 1: 0.0}, task='numeric')
  save(tmp_path, '1_sft', {5: 1.0, 6: 1.0})
  rows = rows_of(tmp_path)
  assert rows['mc'] == ['-', '1.00 [1.00, 1.00]', '-']
  assert rows['numeric'] == ['0.50 [0.00, 1.00]', '-', '-']
  assert rows['mean over task types'][-1] == '-'


def test_one_evaluation_has_no_gain(tmp_path):
  save(tmp_path, '0_base', {0: 1.0})
  assert rows_of(tmp_path)['mc'] == ['1.00']

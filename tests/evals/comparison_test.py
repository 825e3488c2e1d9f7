"""Arms side by side, against the same numbers by hand."""

import math

import numpy as np
import pytest

from longjax import types
from longjax.evals import comparison, scores

RNG = np.random.default_rng(0)
ENTROPY = {name: RNG.uniform(0.1, 0.3, 10) for name in ('a0', 'a1', 'b0', 'b1')}


def measure(**fields):
  return comparison.Measure(name='m', **fields)


def made(*measures):
  return comparison.Comparison(
      claim='Is it?', measures=measures, arms=(
          # Not in the order of the alphabet.
          comparison.Arm(name='second', seeds=(('b0',), ('b1',))),
          comparison.Arm(name='first', seeds=(('a0',), ('a1',)))))


METRICS = [
    {'step': step, 'stage': stage, 'values': {
        'entropy': value, 'aepo/low': 0.14, 'aepo/high': 0.2}}
    for stage, values in ENTROPY.items()
    for step, value in enumerate(values)]


def record(number, task, reward):
  return scores.Record(
      id=f'{task}{number}', task=task, context_length=256 * (1 + number % 2),
      prompt_length=200, depth=None, sample=0, question='?', gold=('x',),
      evidence=(), response='y', response_length=1, is_finished=True,
      answer='y', rule='qa', reward=reward)


REWARDS = {name: RNG.integers(0, 2, (2, 12)).astype(float)
           for name in ('a0', 'a1', 'b0', 'b1')}


def evaluations(suffix=''):
  made = []
  for number, (name, rewards) in enumerate(REWARDS.items()):
    records = [record(i, task, rewards[t, i])
               for t, task in enumerate(('mc', 'numeric')) for i in range(12)]
    made.append({
        'name': f'{number}_{name}{suffix}', 'facts': {},
        'records': [vars(r) for r in records], **scores.table(records)})
  return made


@pytest.mark.parametrize('take, want', [
    ('mean', np.mean), ('std', np.std), ('last', lambda v: v[-2:].mean()),
    ('change', lambda v: v[-2:].mean() - v[:2].mean()),
    ('slope', lambda v: 100 * np.cov(np.arange(10), v, ddof=0)[0, 1]
     / np.var(np.arange(10))),
    ('above_band', lambda v: np.mean(v > 0.2))])
def test_metrics_are_taken_over_the_steps_of_an_arm(take, want):
  rows = comparison.rows(
      made(measure(metric='entropy', take=take)), METRICS, [])
  assert [row.arm for row in rows] == ['second', 'first']
  for row, names in zip(rows, (('b0', 'b1'), ('a0', 'a1')), strict=True):
    np.testing.assert_allclose(
        row.values[0], [want(ENTROPY[name]) for name in names], rtol=1e-6)


def test_the_band_counts_from_the_first_step_above_it():
  values = [0.05, 0.19, 0.22, 0.25, 0.13, 0.10, 0.20, 0.17]
  metrics = [{'step': i, 'stage': 'b0', 'values': {
      'entropy': v, 'aepo/low': 0.14, 'aepo/high': 0.2}}
             for i, v in enumerate(values)]
  (row, _) = comparison.rows(
      made(measure(metric='entropy', take='in_band')), metrics, [])
  # 0.22 is within 1.15 * 0.2, 0.25 is not; 0.13 is above 0.9 * 0.14.
  assert row.values[0][0] == pytest.approx(4 / 6)
  assert math.isnan(row.values[0][1])


def test_scores_are_means_over_tasks_and_gains_are_over_the_first_arm():
  first, second = comparison.rows(made(
      measure(), measure(tasks=('mc',)), measure(lengths=(512,))),
      [], evaluations())
  for row, names in ((first, ('b0', 'b1')), (second, ('a0', 'a1'))):
    for seed, name in enumerate(names):
      rewards = REWARDS[name]
      assert row.values[0][seed] == pytest.approx(rewards.mean())
      assert row.values[1][seed] == pytest.approx(rewards[0].mean())
      assert row.values[2][seed] == pytest.approx(rewards[:, 1::2].mean())
  assert first.gains == ((), (), ())
  for seed in range(2):
    want = REWARDS[f'a{seed}'].mean() - REWARDS[f'b{seed}'].mean()
    gain = second.gains[0][seed]
    assert gain.mean == pytest.approx(want)
    assert gain.low < want < gain.high


def test_the_memory_agents_scores_are_told_apart():
  read = comparison.rows(
      made(measure(read='agent')), [], evaluations('_agent'))
  assert read[0].values[0][0] == pytest.approx(REWARDS['b0'].mean())
  whole = comparison.rows(made(measure()), [], evaluations('_agent'))
  assert all(math.isnan(v) for row in whole for v in row.values[0])


def test_the_report_shows_all_arms_in_their_order():
  shown = comparison.section(
      made(measure(metric='entropy'), measure()), METRICS, evaluations())
  assert shown.index('second') < shown.index('first')
  assert 'Is it?' in shown and '<svg' in shown
  mean = np.mean([REWARDS['a0'].mean(), REWARDS['a1'].mean()])
  assert f'{mean:.2f} (' in shown


@pytest.mark.parametrize('values, want', [
    ((0.5,), '0.50'), ((0.25, 0.35), '0.30 (0.25, 0.35)'),
    ((math.nan, math.nan), '–'), ((1.0, math.nan), '1.00 (1.00, –)'),
    ((0.0123,), '0.012'), ((123.4,), '123.4'), ((2e-5,), '2.0e-05')])
def test_cells(values, want):
  assert comparison.cell(values) == want


def test_arms_without_seeds_are_refused():
  with pytest.raises(types.UserError, match='at least one stage'):
    comparison.Arm(name='a', seeds=((),))
  with pytest.raises(types.UserError, match='as many seeds'):
    comparison.Comparison(claim='', measures=(), arms=(
        comparison.Arm(name='a', seeds=(('x',),)),
        comparison.Arm(name='b', seeds=(('y',), ('z',)))))


def test_steps_that_lack_a_metric_are_left_out():
  metrics = [{'step': 0, 'stage': 'b0', 'values': {'loss': 1.0}}, *METRICS]
  for take in ('mean', 'above_band'):
    row, _ = comparison.rows(
        made(measure(metric='entropy', take=take)), metrics, [])
    without, _ = comparison.rows(
        made(measure(metric='entropy', take=take)), METRICS, [])
    assert row.values == without.values


def test_a_metric_is_not_read_of_an_evaluation():
  with pytest.raises(types.UserError, match='leave out one or the other'):
    measure(metric='entropy', tasks=('mc',))

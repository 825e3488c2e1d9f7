import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longjax.evals import axes, charts, curves


def _figure(lines, **options):
  return charts.figure(
      charts.Chart(title='T', unit='u', lines=lines, **options))


def _line(y, x=None, **options):
  return charts.Line(
      name='a', x=list(range(len(y))) if x is None else x, y=y, **options)


@given(
    low=st.floats(-1e6, 1e6), size=st.floats(1e-6, 1e6),
    most=st.integers(2, 8))
def test_ticks_cover_the_range_in_few_round_steps(low, size, most):
  high = low + size
  places = axes.ticks(low, high, most)
  slack = 1e-6 * (abs(low) + abs(high) + size)
  assert places[0] <= low + slack and places[-1] >= high - slack
  assert 2 <= len(places) <= most + 1
  # Not wasteful either: most of the axis is data.
  assert places[-1] - places[0] <= 6 * size + slack


def test_ticks_of_a_single_value_still_span_something():
  for value in (0.0, 0.7, -3.0):
    places = axes.ticks(value, value, 5)
    assert places[0] <= value < places[-1]


@pytest.mark.parametrize('value, shown', [
    (0.0, '0'), (1.0, '1'), (0.5, '0.5'), (0.1234, '0.123'), (12.345, '12.35'),
    (1234.5, '1,234'), (2.1e-6, '2.1e-6'), (3e7, '3.0e7'), (-0.25, '-0.25'),
    (100.0, '100'), (math.nan, '–'), (math.inf, '–')])
def test_numbers_are_short(value, shown):
  assert axes.number(value) == shown


def test_the_highest_value_is_drawn_at_the_top_and_gaps_stay_gaps():
  figure = _figure([_line([0.0, 1.0, math.nan, 0.5, 0.0])], y_min=0)
  (path,) = re.findall(r'class="curve ink" d="([^"]*)"', figure)
  assert path.count('M') == 2
  heights = [float(y) for y in re.findall(r'[ML][\d.]+ ([\d.]+)', path)]
  assert heights == [196.0, 10.0, 103.0, 196.0]


def test_a_chart_without_a_finite_value_is_not_drawn():
  assert _figure([_line([math.nan, math.inf])]) == ''
  assert _figure([_line([0.0, -1.0])], is_y_log=True) == ''
  assert _figure([]) == ''


@pytest.mark.parametrize('y', [[5.0], [0.0, 0.0], [1e-9, 1e9], [-1.0, -2.0]])
@pytest.mark.parametrize('is_y_log', [False, True])
def test_odd_data_is_drawn_inside_the_drawing(y, is_y_log):
  figure = _figure([_line(y)], is_y_log=is_y_log)
  if not figure:
    assert is_y_log and not any(v > 0 for v in y)
    return
  for place in re.findall(r'[ML]([\d.e+-]+) ([\d.e+-]+)', figure):
    assert 0 <= float(place[0]) <= 480 and 0 <= float(place[1]) <= 230


def test_a_long_run_is_thinned_and_keeps_its_mean():
  figure = _figure([_line([float(i % 2) for i in range(10_000)])])
  (path,) = re.findall(r'class="curve ink" d="([^"]*)"', figure)
  assert path.count('L') < 400
  assert len(figure) < 60_000


def test_a_moving_average_ignores_gaps_and_is_cut_at_the_ends():
  assert charts.moving_average([1.0, 3.0, math.nan, 5.0], 3) == [
      2.0, 2.0, 4.0, 5.0]
  assert charts.moving_average([1.0, 2.0], 1) == [1.0, 2.0]


def _steps(modes, **values):
  return [
      {'step': 10 + i, 'stage': 'rl',
       'values': {'reward/mean': 0.5, 'aepo/mode': float(m), **values}}
      for i, m in enumerate(modes)]


def test_the_background_is_tinted_where_aepo_masks():
  assert curves.positive_only_ranges(_steps([0, 1, 1, 0, 0, 1])) == [
      (10.5, 12.5), (14.5, 15)]
  assert curves.positive_only_ranges(_steps([1, 0])) == [(10, 10.5)]
  assert curves.positive_only_ranges(_steps([0, 0])) == []


def test_the_entropy_chart_shows_band_and_mode():
  steps = _steps([0, 1, 0], **{
      'entropy/seq_mean': 0.2, 'aepo/low': 0.14, 'aepo/high': 0.25})
  del steps[0]['values']['aepo/low']  # Not measured yet.
  (figure,) = [f for f in curves.rl_charts(steps) if 'Entropy' in f]
  assert 'polygon class="band"' in figure and 'rect class="shade"' in figure
  assert 'POS: negative advantages masked' in figure


def test_stages_are_told_apart_by_what_they_log():
  sft = [{'step': i, 'stage': 'warm', 'values': {'loss': 1.0}}
         for i in range(3)]
  rl = _steps([0, 0], **{'loss': 0.1, 'reward/mc': 0.3, 'reward/zzz': 0.4})
  assert len(curves.sft_charts(sft + rl)) == 1
  reward = curves.rl_charts(sft + rl)[0]
  assert reward.index('mc') < reward.index('zzz')
  assert curves.rl_charts(sft) == [] and curves.sft_charts(rl) == []

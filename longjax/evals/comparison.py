"""Runs of one recipe that differ in one thing, side by side.

An experiment is a recipe whose stages are its arms, each once a seed: they
begin with one policy (`start`) and are told apart by what the steps logged and
by evaluations afterwards. A cell is the mean over seeds, then every seed's own
value, so that a reader sees what chance does.

  config.json        the resolved configuration, with `comparison`
  metrics.jsonl      numbers of every step
  evals/*.json       evaluations
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from longjax import types
from longjax.evals import bootstrap, charts, page, scores, tables

Record = Mapping[str, Any]

# Around the thresholds, within which entropy counts as bounded: a step that
# crosses one is only seen once it has.
_BAND_SLACK = 0.9, 1.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
  """A column: a number of each trained policy.

  Attributes:
    name: heading.
    metric: of metrics.jsonl, over the steps of the arm; '' reads an evaluation.
    take: what of it: 'mean' and 'std' over all steps, 'last' the mean of the
      last fifth, 'change' the same less the mean of the first fifth, 'slope'
      of a straight line, per 100 steps, 'above_band' the share of steps above
      AEPO's upper threshold, 'in_band' the share within [0.9 low, 1.15 high]
      from the first step above high on.
    read: without `metric`: how the evaluation read documents.
    tasks: of the evaluation; none means all.
    lengths: context lengths of the evaluation; none means all.
  """

  name: str
  metric: str = ''
  take: Literal[
      'mean', 'std', 'last', 'change', 'slope', 'above_band',
      'in_band'] = 'last'
  read: Literal['whole', 'agent'] = 'whole'
  tasks: tuple[str, ...] = ()
  lengths: tuple[int, ...] = ()

  def __post_init__(self):
    if self.metric and (self.tasks or self.lengths or self.read != 'whole'):
      raise types.UserError(
          f'comparison measure {self.name!r} takes the metric {self.metric!r} '
          'of the steps; read, tasks and lengths are of evaluations, so leave '
          'out one or the other.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """A row.

  Attributes:
    name: of the row.
    seeds: for each seed the stages of this arm, in order; the last one's
      policy is evaluated.
  """

  name: str
  seeds: tuple[tuple[str, ...], ...]

  def __post_init__(self):
    if not self.seeds or not all(self.seeds):
      raise types.UserError(
          f'comparison arm {self.name!r}: seeds={self.seeds} must name at '
          'least one stage for each seed.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """What is compared.

  Attributes:
    claim: what is asked, as a sentence.
    arms: at least one; gains are over the first.
    measures: columns of the table.
    curves: metrics drawn over the steps.
  """

  claim: str
  arms: tuple[Arm, ...]
  measures: tuple[Measure, ...]
  curves: tuple[str, ...] = ()

  def __post_init__(self):
    if not self.arms or len({len(arm.seeds) for arm in self.arms}) > 1:
      raise types.UserError(
          'comparison.arms must be one or more, each with as many seeds as '
          'the others.')

  @property
  def stages(self) -> list[str]:
    """Names of all stages compared."""
    return [name for arm in self.arms for seed in arm.seeds for name in seed]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """An arm of the table.

  Attributes:
    arm: its name.
    values: of each measure, for each seed; NaN where there is none yet.
    gains: of each measure, for each seed, over the first arm on the same
      examples; empty for metrics and for the first arm.
  """

  arm: str
  values: tuple[tuple[float, ...], ...]
  gains: tuple[tuple[bootstrap.Interval, ...], ...]


def rows(
    comparison: Comparison,
    metrics: Sequence[Record],
    evaluations: Sequence[tables.Evaluation],
) -> list[Row]:
  """The table, arm by arm.

  Args:
    comparison: what is compared.
    metrics: lines of metrics.jsonl.
    evaluations: what `runner.load` returns.
  """
  first = comparison.arms[0]
  made = []
  for arm in comparison.arms:
    values: list[tuple[float, ...]] = []
    gains: list[tuple[bootstrap.Interval, ...]] = []
    for measure in comparison.measures:
      if measure.metric:
        values.append(tuple(
            _taken(measure, metrics, stages) for stages in arm.seeds))
        gains.append(())
        continue
      found = [_records(measure, evaluations, s[-1]) for s in arm.seeds]
      values.append(tuple(map(_reward, found)))
      before = [_records(measure, evaluations, s[-1]) for s in first.seeds]
      gains.append(() if arm == first else tuple(
          scores.gain(old, new)
          for old, new in zip(before, found, strict=True)))
    made.append(Row(arm=arm.name, values=tuple(values), gains=tuple(gains)))
  return made


def section(
    comparison: Comparison,
    metrics: Sequence[Record],
    evaluations: Sequence[tables.Evaluation],
) -> str:
  """The claim, the table and the drawings, as HTML."""
  heads = ''.join(
      f'<th scope="col">{page.text(m.name)}</th>' for m in comparison.measures)
  body = ''
  for row in rows(comparison, metrics, evaluations):
    cells = ''
    for values, gains in zip(row.values, row.gains, strict=True):
      shown = ''.join(
          f'<br><span class="ci">{page.text(_gain(g))}</span>' for g in gains
          if math.isfinite(g.mean))
      cells += f'<td>{page.text(cell(values))}{shown}</td>'
    body += (f'<tr><th scope="row">{page.text(row.arm)}</th>{cells}</tr>')
  drawn = [charts.figure(_curve(comparison, metrics, name))
           for name in comparison.curves]
  drawn += [charts.figure(_by_length(comparison, evaluations, is_agent=agent))
            for agent in (False, True)]
  return (
      f'<p>{page.text(comparison.claim)}</p><div class="panel">'
      f'<table><thead><tr><th scope="col">arm</th>{heads}</tr></thead>'
      f'<tbody>{body}</tbody></table>'
      '<p class="muted small">Mean over seeds, then each seed. Below a score: '
      "each seed's gain over the first arm on the same held-out examples, with "
      'its 95% bootstrap interval.</p></div>'
      f'<div class="grid2">{"".join(drawn)}</div>')


def cell(values: Sequence[float]) -> str:
  """'0.45 (0.43, 0.47)': the mean over seeds, then each."""
  known = [v for v in values if math.isfinite(v)]
  if not known:
    return '–'
  if len(values) == 1:
    return _number(known[0])
  each = ', '.join(_number(v) if math.isfinite(v) else '–' for v in values)
  return f'{_number(float(np.mean(known)))} ({each})'


def _number(value: float) -> str:
  """Three digits that count, without an exponent where it can be helped."""
  if value == 0 or 0.001 <= abs(value) < 10:
    return f'{value:.2f}' if abs(value) >= 0.1 else f'{value:.3f}'
  return f'{value:,.1f}' if abs(value) >= 10 else f'{value:.1e}'


def _gain(gain: bootstrap.Interval) -> str:
  interval = ''
  if gain.low is not None and gain.high is not None:
    interval = f' [{gain.low:+.2f}, {gain.high:+.2f}]'
  return f'{gain.mean:+.2f}{interval}'


def _of_stages(
    metrics: Sequence[Record], stages: Sequence[str], name: str
) -> np.ndarray:
  """A metric over the steps of some stages; f64[steps]."""
  return np.array([
      r['values'].get(name, math.nan) for r in metrics if r['stage'] in stages])


def _taken(
    measure: Measure, metrics: Sequence[Record], stages: Sequence[str]
) -> float:
  """What a measure takes of a metric; NaN before the first step."""
  values, low, high = (_of_stages(metrics, stages, name) for name in (
      measure.metric, 'aepo/low', 'aepo/high'))
  # Of several stages some may not have it.
  is_known = np.isfinite(values)
  values, low, high = values[is_known], low[is_known], high[is_known]
  if not len(values):
    return math.nan
  if measure.take in ('above_band', 'in_band'):
    above = values > high
    if measure.take == 'above_band':
      return float(np.mean(above))
    if not above.any():
      return math.nan
    since = int(np.argmax(above))
    inside = (values >= _BAND_SLACK[0] * low) & (
        values <= _BAND_SLACK[1] * high)
    return float(np.mean(inside[since:]))
  fifth = max(1, len(values) // 5)
  take: dict[str, Callable[[], float]] = {
      'mean': lambda: np.mean(values),
      'std': lambda: np.std(values),
      'last': lambda: np.mean(values[-fifth:]),
      'change': lambda: np.mean(values[-fifth:]) - np.mean(values[:fifth]),
      'slope': lambda: 100 * np.polyfit(
          np.arange(len(values)), values, 1)[0] if len(values) > 1 else 0.0,
  }
  return float(take[measure.take]())


def _records(
    measure: Measure, evaluations: Sequence[tables.Evaluation], stage: str
) -> list[scores.Record]:
  """What a policy was graded for."""
  label = tables.policy_label(stage, is_agent=measure.read == 'agent')
  return [
      r for e in evaluations if tables.label(e['name']) == label
      for r in tables.records(e)
      if not measure.tasks or r.task in measure.tasks
      if not measure.lengths or r.context_length in measure.lengths]


def _reward(records: Sequence[scores.Record]) -> float:
  """Mean over tasks; NaN of nothing."""
  overall = scores.table(records, num_resamples=1)['overall']
  return overall['reward'] if overall else math.nan


def _curve(
    comparison: Comparison, metrics: Sequence[Record], name: str
) -> charts.Chart:
  """A metric over the steps, arms in colours, a line for every seed."""
  lines = []
  for color, arm in enumerate(comparison.arms):
    for seed, stages in enumerate(arm.seeds):
      values = _of_stages(metrics, stages, name)
      lines.append(charts.Line(
          name=f'{arm.name}, {seed}', color=color % 7,
          window=len(values) // 40 * 2 + 1,
          x=list(range(1, len(values) + 1)), y=list(map(float, values))))
  return charts.Chart(title=name, unit='each seed', lines=lines)


def _by_length(
    comparison: Comparison,
    evaluations: Sequence[tables.Evaluation],
    *,
    is_agent: bool,
) -> charts.Chart:
  """Scores over context length, the mean over seeds."""
  lines = []
  for color, arm in enumerate(comparison.arms):
    found: dict[int, list[float]] = {}
    for stages in arm.seeds:
      for evaluation in evaluations:
        if tables.label(evaluation['name']) == tables.policy_label(
            stages[-1], is_agent=is_agent):
          for length, made in evaluation['by_length'].items():
            found.setdefault(int(length), []).append(made['reward'])
    lengths = sorted(found)
    lines.append(charts.Line(
        name=arm.name, color=color % 7, x=lengths,
        y=[float(np.mean(found[n])) for n in lengths]))
  return charts.Chart(
      title='Held-out reward, read '
      + ('by the memory agent' if is_agent else 'as a whole'),
      unit='mean over seeds', lines=lines, x_label='context up to, tokens',
      is_x_log=True, y_min=0.0)

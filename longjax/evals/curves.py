"""The curves of a training run: which numbers are drawn, and how.

Stages are told apart by what they log: RL has 'reward/mean', SFT a 'loss'
without it. Metric names are those of `train.rl_job` and `train.sft_job`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from longjax.evals import charts

# A metrics.jsonl line: {'step': int, 'stage': str, 'values': {...}}.
Record = dict[str, Any]

TASK_ORDER = ('mc', 'multihop', 'reading', 'dialogue', 'numeric', 'keychain')


def rl_charts(records: Sequence[Record]) -> list[str]:
  """Figures of the RL steps; none without any."""
  steps = [r for r in records if 'reward/mean' in r['values']]
  if not steps:
    return []
  return _drawn([
      _reward(steps),
      _entropy(steps),
      _chart(steps, 'Response length', 'tokens, mean over responses',
             [('length/mean', 'mean')], y_min=0),
      _chart(steps, 'Unfinished responses',
             'share cut off at the length cap',
             [('length/truncated', 'truncated')], y_min=0, y_max=0.05),
      _chart(steps, 'Sampler and trainer',
             'difference of the logprobs of one token, nats',
             [('gap/logprob_mean', 'mean'), ('gap/logprob_max', 'max')],
             is_y_log=True),
      _chart(steps, 'Gradient norm', 'before clipping',
             [('grad_norm', 'norm')], y_min=0),
      charts.Chart(
          title='Kept by AEPO', unit='share of responses in the update',
          lines=[_line(steps, 'aepo/kept', 'kept', None, 1)],
          y_min=0.0, y_max=1.0,
          stages=_stages(steps)),
      _chart(steps, 'Memory agent', 'share of turns',
             [('memory/parse_failures', 'without a memory'),
              ('memory/truncated', 'cut off')], y_min=0),
      _chart(steps, 'Speed', 'tokens per second, prompts included',
             [('time/tokens_per_second', 'tokens/s')], y_min=0),
  ])


def sft_charts(records: Sequence[Record]) -> list[str]:
  """Figures of the SFT steps; none without any."""
  steps = [
      r for r in records
      if 'loss' in r['values'] and 'reward/mean' not in r['values']]
  return _drawn([
      _chart(steps, 'Loss', 'nats per response token', [('loss', 'loss')],
             y_min=0),
      _chart(steps, 'Entropy', 'nats per response token',
             [('entropy', 'entropy')], y_min=0),
      _chart(steps, 'Gradient norm', 'before clipping',
             [('grad_norm', 'norm')], y_min=0),
      _chart(steps, 'Speed', 'tokens per second',
             [('time/tokens_per_second', 'tokens/s')], y_min=0),
  ])


def task_order(task: str) -> tuple[int, str]:
  """Sorts tasks as the recipe lists them, others after them by name."""
  known = task in TASK_ORDER
  return (TASK_ORDER.index(task) if known else len(TASK_ORDER), task)


def _drawn(candidates: Sequence[charts.Chart]) -> list[str]:
  figures = [charts.figure(chart) for chart in candidates]
  return [figure for figure in figures if figure]


def _reward(steps: Sequence[Record]) -> charts.Chart:
  names = {name for r in steps for name in r['values']}
  tasks = sorted(
      (n.removeprefix('reward/') for n in names
       if n.startswith('reward/') and n != 'reward/mean'), key=task_order)
  window = _window(steps)
  lines = [_line(steps, 'reward/mean', 'mean', None, window)]
  lines += [
      _line(steps, f'reward/{task}', task, color, window)
      for color, task in enumerate(tasks)]
  unit = 'while training, 0 to 1'
  if window > 1:
    unit += f', averaged over {window} steps'
  return charts.Chart(
      title='Reward by task', unit=unit, lines=lines, y_min=0.0,
      stages=_stages(steps))


def _entropy(steps: Sequence[Record]) -> charts.Chart:
  line = _line(steps, 'entropy/seq_mean', 'sequence mean', None, 1)
  low = [r['values'].get('aepo/low', math.nan) for r in steps]
  high = [r['values'].get('aepo/high', math.nan) for r in steps]
  has_band = any(
      math.isfinite(a) and math.isfinite(b) for a, b in zip(low, high))
  return charts.Chart(
      title='Entropy and AEPO',
      unit='nats per token at the sampling temperature',
      lines=[line, _line(steps, 'entropy/token_mean', 'token mean', 5, 1)],
      y_min=0.0,
      band=charts.Line(name='', x=line.x, y=low, low=low, high=high)
      if has_band else None,
      band_name='band',
      shades=positive_only_ranges(steps),
      shade_name='POS: negative advantages masked',
      stages=_stages(steps))


def positive_only_ranges(
    steps: Sequence[Record],
) -> list[tuple[float, float]]:
  """Ranges of steps, ends half a step out, in which AEPO was in mode POS."""
  ranges: list[tuple[float, float]] = []
  is_open = False
  for record in steps:
    is_positive_only = record['values'].get('aepo/mode', 0.0) == 1.0
    step = record['step']
    if is_positive_only and is_open:
      ranges[-1] = (ranges[-1][0], step + 0.5)
    elif is_positive_only:
      ranges.append((step - 0.5, step + 0.5))
    is_open = is_positive_only
  first, last = steps[0]['step'], steps[-1]['step']
  return [(max(a, first), min(b, last)) for a, b in ranges]


def _chart(
    steps: Sequence[Record],
    title: str,
    unit: str,
    names: Sequence[tuple[str, str]],
    **options: Any,
) -> charts.Chart:
  lines = [
      _line(steps, name, label, color or None, _window(steps))
      for color, (name, label) in enumerate(names)]
  return charts.Chart(
      title=title, unit=unit, lines=lines, stages=_stages(steps), **options)


def _line(
    steps: Sequence[Record],
    name: str,
    label: str,
    color: int | None,
    window: int,
) -> charts.Line:
  return charts.Line(
      name=label, color=color, window=window,
      x=[r['step'] for r in steps],
      y=[r['values'].get(name, math.nan) for r in steps])


def _window(steps: Sequence[Record]) -> int:
  """An odd number of steps, about a twentieth of the run."""
  return len(steps) // 40 * 2 + 1


def _stages(steps: Sequence[Record]) -> list[tuple[float, str]]:
  """Where stages begin, if there are several."""
  starts = [
      (new['step'], new['stage']) for old, new in itertools.pairwise(steps)
      if old['stage'] != new['stage']]
  return [(steps[0]['step'], steps[0]['stage']), *starts] if starts else []

"""Before and after: evaluations side by side, with their intervals."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from longjax.evals import axes, bootstrap, charts, curves, page, scores

# What `runner.load` returns for one evaluation.
Evaluation = Mapping[str, Any]

# Name, a cell for each evaluation, and what `scores.gain` compares.
_Row = tuple[str, Sequence[Mapping[str, Any] | None], dict[str, Any]]


def label(name: str) -> str:
  """'0_base' -> 'base': the leading number only orders."""
  number, separator, rest = name.partition('_')
  return rest if separator and number.isdecimal() else name


def policy_label(policy: str, *, is_agent: bool) -> str:
  """`label` of an evaluation of a policy, by how documents are read."""
  return f'{policy}_agent' if is_agent else policy


def by_mode(
    evaluations: Sequence[Evaluation],
) -> list[tuple[str, list[Evaluation]]]:
  """Those that can be compared: how documents were read, and in which runs.

  Returns:
    (how in words, evaluations) where there are any; the first has no words if
    there is no other.
  """
  whole = [e for e in evaluations if not e['facts'].get('part_len')]
  in_parts = [e for e in evaluations if e['facts'].get('part_len')]
  if not in_parts:
    return [('', whole)] if whole else []
  found = [('documents read as a whole', whole),
           ('documents read part by part, by the memory agent', in_parts)]
  return [(how, some) for how, some in found if some]


def records(evaluation: Evaluation) -> list[scores.Record]:
  """The records of a loaded evaluation."""
  return [
      scores.Record(
          **{**r, 'gold': tuple(r['gold']), 'evidence': tuple(r['evidence'])})
      for r in evaluation['records']]


def headline(evaluations: Sequence[Evaluation]) -> str:
  """The overall score of each evaluation in large figures."""
  parts = []
  for evaluation in evaluations:
    cell = evaluation['overall']
    parts.append(
        f'<div><div class="muted">{page.text(label(evaluation["name"]))}</div>'
        f'<div class="value">{_score(cell["reward"])}</div>'
        f'<div class="muted small">{_interval(cell["low"], cell["high"])}'
        '</div></div>')
  return f'<div class="scores">{"".join(parts)}</div>'


def by_task(evaluations: Sequence[Evaluation]) -> str:
  """Rows are task types, columns evaluations, then the last gain."""
  tasks = sorted(
      {t for e in evaluations for t in e['by_task']}, key=curves.task_order)
  rows: list[_Row] = [
      ('mean over task types', [e['overall'] for e in evaluations], {})]
  rows += [
      (task, [e['by_task'].get(task) for e in evaluations], {'task': task})
      for task in tasks]
  return _table('task type', evaluations, rows)


def by_length(evaluations: Sequence[Evaluation]) -> str:
  """Rows are context lengths, columns evaluations, then the last gain."""
  rows = [
      (f'{n:,} tokens', [e['by_length'].get(str(n)) for e in evaluations],
       {'context_length': n})
      for n in _lengths(evaluations)]
  return _table('context up to', evaluations, rows)


def length_chart(evaluations: Sequence[Evaluation]) -> str:
  """Reward over context length, one line an evaluation."""
  lengths = _lengths(evaluations)
  if not lengths:
    return ''
  lines = []
  for i, evaluation in enumerate(evaluations):
    cells = [evaluation['by_length'].get(str(n), {}) for n in lengths]

    def column(key, cells=cells):
      values = (cell.get(key) for cell in cells)
      return [math.nan if v is None else v for v in values]

    # The last one is what the run is for: in the colour of text.
    is_last = i == len(evaluations) - 1
    lines.append(charts.Line(
        name=label(evaluation['name']), color=None if is_last else i,
        shift=5.0 * (i - (len(evaluations) - 1) / 2), x=lengths,
        y=column('reward'), low=column('low'), high=column('high')))
  return charts.figure(charts.Chart(
      title='Held-out reward by context length',
      unit='mean over task types, 95% intervals', lines=lines,
      x_label='context length, tokens', x_ticks=lengths, is_x_log=True,
      y_min=0.0))


def matrix(evaluations: Sequence[Evaluation]) -> str:
  """Task types by context lengths, every evaluation in each cell."""
  lengths = _lengths(evaluations)
  tasks = sorted(
      {t for e in evaluations for t in e['by_task']}, key=curves.task_order)
  heads = ''.join(f'<th scope="col">{n:,}</th>' for n in lengths)
  names = ' → '.join(label(e['name']) for e in evaluations)
  body = []
  for task in tasks:
    cells = []
    for length in lengths:
      found = [
          e['by_task_and_length'].get(task, {}).get(str(length))
          for e in evaluations]
      shown = ' → '.join(_score(c['reward']) if c else '–' for c in found)
      cells.append(f'<td>{shown if any(found) else "–"}</td>')
    body.append(
        f'<tr><th scope="row">{page.text(task)}</th>{"".join(cells)}</tr>')
  return (
      '<details class="matrix"><summary>Every task type at every length'
      '</summary><div class="panel"><p class="muted small">'
      f'{page.text(names)}; columns are context lengths in tokens</p>'
      f'<table><thead><tr><th></th>{heads}</tr></thead><tbody>'
      + ''.join(body) + '</tbody></table></div></details>')


def health(evaluations: Sequence[Evaluation]) -> str:
  """Counts and what went wrong with responses, one row an evaluation."""
  heads = ('evaluation', 'examples', 'responses', 'cut off', 'no answer',
           'mean length', 'how')
  body = []
  for evaluation in evaluations:
    cell = evaluation['overall']
    facts = ', '.join(f'{k} {_fact(v)}' for k, v in evaluation['facts'].items())
    values = (
        f'{cell["num_examples"]:,}', f'{cell["num_responses"]:,}',
        f'{cell["truncated"]:.1%}', f'{cell["no_answer"]:.1%}',
        f'{cell["response_length"]:.1f} tokens', facts)
    cells = ''.join(f'<td>{page.text(v)}</td>' for v in values)
    body.append(
        f'<tr><th scope="row">{page.text(label(evaluation["name"]))}</th>'
        f'{cells}</tr>')
  return (
      '<table class="health"><thead><tr>'
      + ''.join(f'<th scope="col">{h}</th>' for h in heads)
      + f'</tr></thead><tbody>{"".join(body)}</tbody></table>')


def _table(
    first_head: str,
    evaluations: Sequence[Evaluation],
    rows: Sequence[_Row],
) -> str:
  heads = [first_head, *(label(e['name']) for e in evaluations)]
  results: list[list[scores.Record]] = []
  if len(evaluations) > 1:
    heads.append(f'{heads[-1]} − {heads[-2]}')
    results = [records(e) for e in evaluations[-2:]]
  body = []
  for name, cells, chosen in rows:
    tds = [_cell(cell) for cell in cells]
    if results:
      tds.append(_gain(scores.gain(results[0], results[1], **chosen)))
    total = '' if chosen else ' class="total"'
    body.append(
        f'<tr{total}><th scope="row">{page.text(name)}</th>{"".join(tds)}'
        '</tr>')
  columns = ''.join(f'<th scope="col">{page.text(h)}</th>' for h in heads)
  return (
      f'<table><thead><tr>{columns}</tr></thead>'
      f'<tbody>{"".join(body)}</tbody></table>')


def _cell(cell: Mapping[str, Any] | None) -> str:
  if cell is None:
    return '<td>–</td>'
  share = 100 * min(max(cell['reward'], 0.0), 1.0)
  return (
      f'<td>{_score(cell["reward"])} <span class="ci">'
      f'{_interval(cell["low"], cell["high"])}</span>'
      f'<span class="track"><i style="width:{share:.1f}%"></i></span></td>')


def _gain(gain: bootstrap.Interval) -> str:
  if not math.isfinite(gain.mean):
    return '<td>–</td>'
  kind = ''
  if gain.low is not None and gain.low > 0:
    kind = ' class="up"'
  elif gain.high is not None and gain.high < 0:
    kind = ' class="down"'
  return (
      f'<td{kind}><span class="delta">{_signed(gain.mean)}</span> '
      f'<span class="ci">{_interval(gain.low, gain.high, _signed)}</span></td>')


def _lengths(evaluations: Sequence[Evaluation]) -> list[int]:
  return sorted({int(n) for e in evaluations for n in e['by_length']})


def _score(value: float) -> str:
  return f'{value:.2f}'


def _signed(value: float) -> str:
  return f'{value:+.2f}'.replace('-', '−')


def _interval(low: float | None, high: float | None, form=_score) -> str:
  return '' if low is None or high is None else f'[{form(low)}, {form(high)}]'


def _fact(value: Any) -> str:
  if isinstance(value, float):
    return axes.number(value)
  return value if isinstance(value, str) else json.dumps(value)

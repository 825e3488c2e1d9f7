"""The before/after table for a terminal or a log file.

  held-out reward      | sft               | rl                | rl - sft
  mean over task types | 0.35 [0.31, 0.39] | 0.56 [0.52, 0.60] | +0.21 [...]
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import rich.box
import rich.console
import rich.table

from longjax import config as config_lib
from longjax.data import records
from longjax.evals import (
    bootstrap,
    comparison,
    curves,
    runner,
    scores,
    tables,
)

# Enough for five evaluations; a log file has no edge.
_LOG_WIDTH = 160


def show(workdir: str | os.PathLike[str], stream: TextIO) -> None:
  """Writes the scores of all evaluations of a run; nothing if there are none.

  Args:
    workdir: of the run.
    stream: colours and lines on a terminal, plain text elsewhere.
  """
  evaluations = [e for e in runner.load(workdir) if e['records']]
  console = rich.console.Console(
      file=stream, width=None if stream.isatty() else _LOG_WIDTH,
      highlight=False, markup=False)
  config_file = pathlib.Path(workdir) / 'config.json'
  content = json.loads(config_file.read_bytes()) if config_file.exists() else {}
  if content.get('comparison'):
    _compare(console, config_lib.build(
        comparison.Comparison, content['comparison']), records.read(
            pathlib.Path(workdir) / 'metrics.jsonl'), evaluations)
    return  # Its arms are too many for columns.
  for how, some in tables.by_mode(evaluations):
    if how:
      console.print(f'\n{how[0].upper()}{how[1:]}:')
    console.print(_table(some, is_terminal=stream.isatty()))


def _compare(
    console: rich.console.Console,
    made: comparison.Comparison,
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[tables.Evaluation],
) -> None:
  """The arms of an experiment."""
  console.print(made.claim)
  table = rich.table.Table(
      box=rich.box.ROUNDED if console.is_terminal else rich.box.ASCII2)
  table.add_column('mean (each seed)')
  for measure in made.measures:
    table.add_column(measure.name)
  for row in comparison.rows(made, metrics, evaluations):
    table.add_row(row.arm, *map(comparison.cell, row.values))
  console.print(table)


def _table(
    evaluations: Sequence[tables.Evaluation], *, is_terminal: bool
) -> rich.table.Table:
  """Scores side by side, and the last gain."""
  table = rich.table.Table(
      box=rich.box.ROUNDED if is_terminal else rich.box.ASCII2)
  table.add_column('held-out reward')
  for evaluation in evaluations:
    table.add_column(tables.label(evaluation['name']), no_wrap=True)
  if len(evaluations) > 1:
    last, before = (tables.label(e['name']) for e in evaluations[:-3:-1])
    table.add_column(f'{last} - {before}', no_wrap=True)
    pair = [tables.records(e) for e in evaluations[-2:]]
  else:
    pair = []
  tasks = sorted(
      {t for e in evaluations for t in e['by_task']}, key=curves.task_order)
  for task in [None, *tasks]:
    cells = [
        _cell(e['overall'] if task is None else e['by_task'].get(task))
        for e in evaluations]
    if pair:
      cells.append(_gain(scores.gain(*pair, task=task)))
    table.add_row(
        task or 'mean over task types', *cells, end_section=task is None)
  return table


def _cell(cell: Mapping[str, Any] | None) -> str:
  if cell is None:
    return '-'
  interval = ''
  if cell['low'] is not None and cell['high'] is not None:
    interval = f' [{cell["low"]:.2f}, {cell["high"]:.2f}]'
  return f'{cell["reward"]:.2f}{interval}'


def _gain(gain: bootstrap.Interval) -> str:
  if not math.isfinite(gain.mean):  # No example in common.
    return '-'
  interval = ''
  if gain.low is not None and gain.high is not None:
    interval = f' [{gain.low:+.2f}, {gain.high:+.2f}]'
  return f'{gain.mean:+.2f}{interval}'

"""A benchmark as tables for a terminal and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TextIO

import rich.box
import rich.console
import rich.table

from longjax.bench import rates, record

_GIB = 1024**3
_LOG_WIDTH = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """All that is told.

  Attributes:
    title: suite, model, device, mesh.
    limits: what devices can do.
    records: of all cases so far.
  """

  title: str
  limits: rates.Rates
  records: Sequence[record.Record]

  def content(self) -> dict[str, Any]:
    """For JSON."""
    return {
        'title': self.title,
        'assumptions': dataclasses.asdict(self.limits),
        'records': [r.figures(self.limits) for r in self.records],
        'ratios': [r.figures() for r in record.ratios(self.records)]}


def show(report: Report, stream: TextIO) -> None:
  """Writes the tables: colours and lines on a terminal, else plain text."""
  is_terminal = stream.isatty()
  console = rich.console.Console(
      file=stream, width=None if is_terminal else _LOG_WIDTH, highlight=False,
      markup=False)
  box = rich.box.ROUNDED if is_terminal else rich.box.ASCII2
  console.print(f'\n{report.title}')
  console.print(f'Assumed: {report.limits.source}.\n')
  console.print(_speeds(report, box))
  compared = record.ratios(report.records)
  if compared:
    console.print(_ratios(compared, box))
  for line in _others(report):
    console.print(line)


def _speeds(report: Report, box: rich.box.Box) -> rich.table.Table:
  """A row for each variant that was timed."""
  share = '% of matmul' if report.limits.is_measured else '% MFU'
  table = rich.table.Table(
      box=box, title='tokens and operations: each prompt once, only pairs that '
      'see each other; medians', title_justify='left')
  table.add_column('case', no_wrap=True)
  table.add_column('variant', no_wrap=True)
  for name in ('tokens/s', 'seconds', 'CPU s', 'TFLOP/s', share,
               '% of bandwidth', 'peak GiB', '% padding',
               '% repeated', 'compiled in'):
    table.add_column(name, justify='right')
  for one in report.records:
    if not one.is_timed:
      continue
    made = one.figures(report.limits)
    table.add_row(
        one.case, one.variant, _number(made['tokens_per_second']),
        _number(made['seconds']), _number(made['cpu_seconds']),
        _number(made['tflops']), _percent(made['share_of_peak']),
        _percent(made['share_of_bandwidth']), _gib(made['peak_bytes']),
        _percent(made.get('padding')),
        _percent(made.get('repeated')), f'{made["compile_seconds"]:.1f} s')
  return table


def _ratios(
    compared: Sequence[record.Ratio], box: rich.box.Box
) -> rich.table.Table:
  """What sharing gains."""
  table = rich.table.Table(
      box=box,
      title='unshared / shared; ideal: operations needed, bytes for decode',
      title_justify='left')
  table.add_column('case', no_wrap=True)
  for name in ('ideal', 'seconds', 'of ideal', 'CPU s', 'of ideal',
               'peak memory'):
    table.add_column(name, justify='right')
  for one in compared:
    made = one.figures()
    table.add_row(
        one.case, f'{one.ideal:.2f}', f'{one.seconds:.2f}',
        f'{made["share_of_ideal"]:.0%}', f'{one.cpu_seconds:.2f}',
        f'{made["cpu_share_of_ideal"]:.0%}', f'{one.peak_bytes:.2f}')
  return table


def _others(report: Report) -> list[str]:
  """Losses, gaps, errors, and what did not fit."""
  lines = []
  for one in report.records:
    facts = dict(one.facts)
    for name in ('padding', 'repeated'):
      facts.pop(name, None)
    if one.is_timed:
      facts |= one.time.values
    if facts:
      lines.append(f'{one.case}, {one.variant}: ' + ', '.join(
          f'{name} {value:.6g}' for name, value in facts.items()))
    elif not one.is_timed:
      lines.append(f'{one.case}, {one.variant}: does not fit into memory')
  return lines


def _number(value: float) -> str:
  """Three digits at least."""
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def _percent(share: float | None) -> str:
  return '-' if share is None else f'{share * 100:.1f}'


def _gib(size: int | None) -> str:
  return '-' if size is None else f'{size / _GIB:.2f}'

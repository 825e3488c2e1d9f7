"""A plan as a page for a terminal and as JSON."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, TextIO

import jax
import rich.box
import rich.console
import rich.table

from longjax import config
from longjax.planner import flops, layout, plan, search, topologies
from longjax.train import rl_stage

_GIB = 1024**3
_LOG_WIDTH = 140


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
  """All that was found out about a stage.

  Attributes:
    label: of the stage in its run.
    plan: of its programs.
    longest: None if not searched for.
    smallest: None if not searched for, or there is none.
    is_searched: whether the two were searched for.
  """

  label: str
  plan: plan.StagePlan
  longest: search.Longest | None = None
  smallest: search.Smallest | None = None
  is_searched: bool = False


def show(planned: Planned, stream: TextIO) -> None:
  """Writes tables and verdict."""
  is_terminal = stream.isatty()
  console = rich.console.Console(
      file=stream, width=None if is_terminal else _LOG_WIDTH, highlight=False,
      markup=False)
  box = rich.box.ROUNDED if is_terminal else rich.box.ASCII2
  question = planned.plan.question
  console.print(f'\n{planned.label}: {_stage(question.stage)}')
  console.print(_model(question))
  console.print(
      f'{question.topology}: '
      f'{topologies.num_devices(question.topology)} devices on '
      f'{topologies.num_chips(question.topology)} chips; '
      f'mesh {plan.mesh_text(question.mesh)}')
  console.print(_attention(planned.plan) + '\n')
  console.print(_memory(planned.plan, box))
  console.print(_speed(planned.plan, box))
  for line in verdict(planned):
    console.print(line)


def _stage(stage: Any) -> str:
  if isinstance(stage, rl_stage.RlStage):
    return (
        f'{stage.num_prompts} prompts of {stage.max_prompt_len:,} tokens, '
        f'{stage.num_samples} responses of '
        f'{stage.sampler.max_response_len:,} each; rows of '
        f'{", ".join(f"{row_len:,}" for row_len in stage.row_lens)}')
  return f'{stage.num_rows} rows of {stage.row_len:,} tokens'


def _model(question: plan.Question) -> str:
  total, active = (
      _number(count(question.model) / 1e6)
      for count in (flops.num_parameters, flops.num_active))
  return (f'{question.model.num_layers} layers, {total} million parameters, '
          f'{active} million active')


def _attention(made: plan.StagePlan) -> str:
  """How the update attends."""
  chosen = made.programs[-1].work.attention
  assert chosen is not None
  text = (f'remat {made.question.compute.remat.value}; attention by '
          f'{chosen.backend}, blocks of {chosen.block_len} tokens')
  if made.question.mesh.seq > 1:
    text += ', keys by ' + ('ring' if chosen.is_ring else 'all_gather')
  return text


def _memory(made: plan.StagePlan, box: rich.box.Box) -> rich.table.Table:
  """What the compiler says."""
  capacity = made.question.chip.memory_bytes / _GIB
  level = 'default level' if made.question.is_optimized else 'level O0'
  table = rich.table.Table(
      box=box, title=f'Compiled by libtpu {topologies.libtpu_version()} with '
      f'jax {jax.__version__}, {level}: GiB of HBM per device, of '
      f'{capacity:.2f}', title_justify='left')
  table.add_column('program', no_wrap=True)
  table.add_column('run on')
  for name in ('arguments', 'temporaries', 'state beside', 'peak',
               'peak + 25%', 'host', 'compiled in', 'cpu'):
    table.add_column(name, justify='right')
  for program in made.programs:
    facts = program.facts

    def gib(number):
      return f'{number / _GIB:.2f}'

    peak = gib(facts.needed) if facts.needed else '?'
    with_margin = gib(facts.needed * plan.MARGIN) if facts.needed else '?'
    if not plan.fits(facts, made.question):
      with_margin += ' !'
    table.add_row(
        program.name, program.work.what, gib(facts.arguments),
        gib(facts.temporaries), gib(facts.beside), peak, with_margin,
        gib(facts.host), f'{facts.seconds:.0f} s',
        f'{facts.cpu_seconds:.0f} s')
  return table


def _speed(made: plan.StagePlan, box: rich.box.Box) -> rich.table.Table:
  """What we estimate."""
  table = rich.table.Table(
      box=box, title='Estimated at the length caps and the vendor\'s peak '
      'rates: at best', title_justify='left')
  table.add_column('program', no_wrap=True)
  for name in ('FLOPs needed', 'executed', 'balance', 'HBM GB', 'ICI GB',
               'compute s', 'HBM s', 'ICI s', 'bound by', 'MFU',
               'runs a step', 'seconds a step'):
    table.add_column(name, justify='right')
  for program in made.programs:
    work, line = program.work, program.roofline
    sent = sum(t.num_bytes for t in work.transfers)
    table.add_row(
        program.name, f'{work.needed.total:.2e}',
        f'{work.executed.total / work.needed.total:.2f}x',
        f'{1 / work.imbalance:.0%}',
        _number(work.memory_bytes / 1e9), _number(sent / 1e9),
        _number(line.compute), _number(line.memory), _number(line.network),
        line.bound, f'{line.mfu:.1%}', f'{work.num_runs:,.0f}',
        _number(line.seconds * work.num_runs))
  return table


def _number(value: float) -> str:
  """Three digits."""
  if not value:
    return '0'
  digits = max(0, 2 - math.floor(math.log10(abs(value))))
  return f'{value:,.{min(digits, 6)}f}'


def verdict(planned: Planned) -> list[str]:
  """The answers, a line each."""
  made, question = planned.plan, planned.plan.question
  failing = [
      p for p in made.programs if not plan.fits(p.facts, question)]
  lines = []
  if made.fits:
    most = max(made.programs, key=lambda p: p.facts.needed)
    share = most.facts.needed / question.chip.memory_bytes
    lines.append(
        f'FITS on {question.topology}: {most.name} needs most, {share:.0%} of '
        'HBM; 80% is the limit.')
  else:
    lines.append(
        f'DOES NOT FIT on {question.topology}: '
        + ', '.join(p.name for p in failing)
        + ' would need more than 80% of HBM.')
    lines += [f'  {p.name}: {p.facts.error}' for p in failing if p.facts.error]
  lines.append(
      f'A step takes {_number(made.step_seconds)} s at best (estimate).')
  if not planned.is_searched:
    return lines
  found = planned.longest
  if found is not None:
    lengths = f'{search.sequence_len(found.stage):,} tokens'
    if isinstance(found.stage, rl_stage.RlStage):
      lengths += (f' ({found.stage.max_prompt_len:,} + '
                  f'{found.stage.sampler.max_response_len:,})')
    at = ', '.join(f'{factor:.2f}' for factor in found.compiled)
    if found.stretch < search.MOST_STRETCH:
      lines.append(
          f'Longest context that fits: {lengths}, {found.stretch:.2f} times '
          f'these lengths; {found.limited_by} sets the limit (a line through '
          f'compilations at {at} times).')
    else:
      lines.append(
          f'Longest context that fits: {lengths} or more; it was not looked '
          f'for beyond {search.MOST_STRETCH:.0f} times these lengths.')
  if planned.smallest is None:
    lines.append('No listed topology of this generation holds it.')
  else:
    asked = planned.smallest.question
    lines.append(
        f'Smallest listed topology that fits: {asked.topology} with mesh '
        f'{plan.mesh_text(asked.mesh)} (compiled).')
  return lines


def write(
    path: pathlib.Path, planned: Sequence[Planned], *, config_file: str
) -> None:
  """Writes the JSON that holds all of it."""
  content = {
      'config': config_file,
      'jax': jax.__version__,
      'libtpu': topologies.libtpu_version(),
      'margin': plan.MARGIN,
      'compiled': 'facts of each program: arguments, outputs, temporaries, '
                  'peak, host and beside in bytes per device, seconds',
      'estimated': 'work and roofline of each program',
      'stages': [_content(p) for p in planned],
  }
  path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def _content(planned: Planned) -> dict[str, Any]:
  made, question = planned.plan, planned.plan.question
  return {
      'label': planned.label,
      'topology': question.topology,
      'num_chips': topologies.num_chips(question.topology),
      'hbm_bytes': question.chip.memory_bytes,
      'optimization': 'default' if question.is_optimized else 'O0',
      'mesh': config.resolved(question.mesh),
      'model': config.resolved(question.model),
      'compute': config.resolved(question.compute),
      'stage': config.resolved(question.stage),
      'fits': made.fits,
      'step_seconds': made.step_seconds,
      'programs': {p.name: _program(p) for p in made.programs},
      'longest': planned.longest and {
          'sequence_len': search.sequence_len(planned.longest.stage),
          'row_len': layout.row_lens(planned.longest.stage)[-1],
          'stretch': planned.longest.stretch,
          'limited_by': planned.longest.limited_by,
          'compiled_at': planned.longest.compiled},
      'smallest': planned.smallest and {
          'topology': planned.smallest.question.topology,
          'mesh': config.resolved(planned.smallest.question.mesh),
          'facts': {
              name: dataclasses.asdict(facts) | {'needed': facts.needed}
              for name, facts in planned.smallest.facts.items()}},
  }


def _program(program: plan.ProgramPlan) -> dict[str, Any]:
  work = program.work
  return {
      'facts': dataclasses.asdict(program.facts) | {
          'needed': program.facts.needed},
      'work': {
          'what': work.what, 'num_runs': work.num_runs,
          'needed_flops': dataclasses.asdict(work.needed),
          'executed_flops': dataclasses.asdict(work.executed),
          'imbalance': work.imbalance, 'memory_bytes': work.memory_bytes,
          'attention': work.attention and dataclasses.asdict(work.attention),
          'transfers': [
              dataclasses.asdict(t) | {'kind': t.kind.value}
              for t in work.transfers]},
      'roofline': dataclasses.asdict(program.roofline) | {
          'seconds': program.roofline.seconds,
          'bound': program.roofline.bound},
  }

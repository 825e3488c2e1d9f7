"""report.html: what a run learnt, on one self-contained page.

Built from the files of a work directory alone, so it can be built again at
any time, of a finished run or a running one:

  config.json      the resolved configuration
  run.json         optional facts: device, seed, versions, command, ...
  metrics.jsonl    numbers of every step
  rollouts.jsonl   rollouts kept for reading
  evals/*.json     evaluations, e.g. 0_base, 1_sft, 2_rl
  models/*.json    merges
  gradients/*.json policies whose gradients were measured

Whatever is missing is left out.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from longjax import config as config_lib
from longjax import types
from longjax.data import records as record_files
from longjax.evals import (
  comparison,
  curves,
  gradients,
  page,
  reading,
  runner,
  tables,
)

REPORT_FILE = 'report.html'


def write(
    workdir: str | os.PathLike[str],
    *,
    title: str | None = None,
    max_rollouts: int = 48,
    answers_per_task: int = 2,
) -> pathlib.Path:
  """Writes report.html in one rename.

  Args:
    workdir: of the run.
    title: heading; None takes the work directory's name.
    max_rollouts: prompts shown with their responses, spread over the run.
    answers_per_task: held-out questions a task type shown with their answers.

  Returns:
    Where the page is.

  Raises:
    UserError: a file is damaged, or the page cannot be written.
  """
  workdir = pathlib.Path(workdir)
  title = title or f'longjax run: {workdir.resolve().name}'
  config = _read_json(workdir / 'config.json')
  facts = _read_json(workdir / 'run.json')
  metrics = record_files.read(workdir / 'metrics.jsonl')
  rollouts = record_files.read(workdir / 'rollouts.jsonl')
  evaluations = [e for e in runner.load(workdir) if e['records']]
  sections = [
      ('comparison', 'Comparison',
       _comparison(config, metrics, evaluations)),
      ('result', 'Held-out result', _result(evaluations)),
      ('rl', 'Reinforcement learning', _figures(curves.rl_charts(metrics))),
      ('sft', 'Supervised fine-tuning',
       _figures(curves.sft_charts(metrics))),
      ('gradients', 'Entropy and gradients', gradients.section(workdir)),
      ('merge', 'Merge', _merges(workdir)),
      ('rollouts', 'Rollouts', reading.rollouts(
          rollouts, max_groups=max_rollouts)),
      ('answers', 'Held-out answers',
       ''.join(reading.answers(some, per_task=answers_per_task)
               for _, some in tables.by_mode(evaluations))),
      ('run', 'Run', _run(config, facts, metrics)),
  ]
  sections = [s for s in sections if s[2]]
  links = ''.join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
  path = workdir / REPORT_FILE
  record_files.write_text(path, page.render(title, [
      f'<h1>{page.text(title)}</h1>', _summary(metrics, facts),
      f'<nav>{links}</nav>',
      *(f'<section><h2 id="{key}">{name}</h2>{content}</section>'
        for key, name, content in sections)]))
  return path


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_bytes())
  except ValueError as error:
    raise types.UserError(
        f'{path} is damaged: {error}; delete it and run the same command '
        'again.') from error


def _summary(
    metrics: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> str:
  """One line under the title: short facts, steps and seconds by stage."""
  parts = [
      f'{key} <b>{page.text(value)}</b>' for key, value in facts.items()
      if not isinstance(value, dict | list) and len(str(value)) <= 40]
  for stage, (num_steps, seconds) in _stages(metrics).items():
    spent = f' in {_duration(seconds)}' if seconds else ''
    parts.append(f'{page.text(stage)} <b>{num_steps:,} steps</b>{spent}')
  spans = ''.join(f'<span>{part}</span>' for part in parts)
  return f'<div class="facts muted small">{spans}</div>'


def _stages(
    metrics: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[int, float]]:
  """Steps and seconds of each stage."""
  stages: dict[str, tuple[int, float]] = {}
  for record in metrics:
    num_steps, seconds = stages.get(record['stage'], (0, 0.0))
    seconds += record['values'].get('time/step_seconds', 0.0)
    stages[record['stage']] = (num_steps + 1, seconds)
  return stages


def _duration(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{rest} s'


def _result(evaluations: Sequence[tables.Evaluation]) -> str:
  return ''.join(
      (f'<h3>{page.text(how[0].upper() + how[1:])}</h3>' if how else '')
      + _result_of_mode(some) for how, some in tables.by_mode(evaluations))


def _result_of_mode(evaluations: Sequence[tables.Evaluation]) -> str:
  return (
      '<div class="panel">' + tables.headline(evaluations)
      + tables.by_task(evaluations)
      + '<p class="muted small">Mean reward on held-out examples with 95% '
      'bootstrap intervals over examples. The last column is the difference '
      'on the same examples; coloured where its interval leaves out zero.</p>'
      '</div><h3>By context length</h3><div class="grid2">'
      + tables.length_chart(evaluations) + '<div class="panel">'
      + tables.by_length(evaluations) + '</div></div>'
      + tables.matrix(evaluations) + '<h3>Responses</h3><div class="panel">'
      + tables.health(evaluations) + '</div>')


def _comparison(
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[tables.Evaluation],
) -> str:
  """The arms of an experiment; nothing if the run is none."""
  if not config.get('comparison'):
    return ''
  return comparison.section(
      config_lib.build(comparison.Comparison, config['comparison']),
      metrics, evaluations)


def _merges(workdir: pathlib.Path) -> str:
  """What was merged, and with which coefficients."""
  rows = []
  for path in sorted((workdir / 'models').glob('*.json')):
    made = _read_json(path)
    shares = ', '.join(
        f'{name} {share:.3f}' for name, share in zip(
            made['experts'], made['coefficients'], strict=True))
    how = ', '.join(f'{k} {_value(v)}' for k, v in made['merge'].items())
    rows.append((f'{path.stem}: from {made["base"]}', shares, how))
  if not rows:
    return ''
  body = ''.join(
      f'<tr><th scope="row">{page.text(name)}</th><td>{page.text(shares)}</td>'
      f'<td>{page.text(how)}</td></tr>' for name, shares, how in rows)
  return (
      '<div class="panel"><table><thead><tr><th>policy</th><th>experts, mean '
      'coefficient of their matrices</th><th>how</th></tr></thead><tbody>'
      f'{body}</tbody></table></div>')


def _figures(figures: Sequence[str]) -> str:
  return f'<div class="grid2">{"".join(figures)}</div>' if figures else ''


def _run(
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
) -> str:
  rows = [(k, _value(v)) for k, v in facts.items()]
  for stage, (num_steps, seconds) in _stages(metrics).items():
    rows.append((stage, f'{num_steps:,} steps, {_duration(seconds)}'))
  body = ''.join(
      f'<tr><th scope="row">{page.text(k)}</th><td>{page.text(v)}</td></tr>'
      for k, v in rows)
  parts = f'<table><tbody>{body}</tbody></table>' if rows else ''
  if config:
    shown = json.dumps(config, indent=2, ensure_ascii=False)
    parts += ('<details><summary>Configuration (config.json)</summary>'
              f'<pre>{page.text(shown)}</pre></details>')
  return f'<div class="panel">{parts}</div>' if parts else ''


def _value(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)

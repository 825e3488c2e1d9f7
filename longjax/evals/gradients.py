"""Entropy against gradients, as `train.gradient_stage` measured them.

  {workdir}/gradients/{name}.json   {'tokens': rank correlation, 'responses'}
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from longjax.data import records
from longjax.evals import charts, page

FOLDER = 'gradients'
_NUM_BINS = 10


def result(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """The file of a policy."""
  return workdir / FOLDER / f'{name}.json'


def save(
    workdir: pathlib.Path,
    name: str,
    *,
    responses: Sequence[Mapping[str, Any]],
    tokens: np.ndarray,  # f32[2, n]
) -> None:
  """Writes what was measured, in one rename; see `gradient_stage.Measured`."""
  records.write_text(result(workdir, name), json.dumps(
      {'tokens': spearman(*tokens), 'responses': list(responses)}))


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
  """Rank correlation; 0 of fewer than three pairs or of a constant."""
  if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
    return 0.0
  return float(stats.spearmanr(first, second).statistic)


def section(workdir: pathlib.Path) -> str:
  """Rank correlations of each policy, and the norm over the entropy.

  Nothing if no policy was measured.
  """
  found = {
      path.stem: json.loads(path.read_bytes())
      for path in sorted((workdir / FOLDER).glob('*.json'))}
  if not found:
    return ''
  body = ''
  drawn: dict[str, list[charts.Line]] = {
      'logit_norm': [], 'parameter_norm': []}
  for color, (name, content) in enumerate(found.items()):
    failed = [r for r in content['responses'] if r['is_failed']]
    others = [r for r in content['responses'] if not r['is_failed']]
    exact = [r for r in failed if r['parameter_norm'] is not None]
    cells = (
        f'{len(failed):,}', _rho(failed, 'logit_norm'),
        f'{content["tokens"]:.2f}', _rho(others, 'logit_norm'),
        f'{len(exact):,}', _rho(exact, 'parameter_norm'))
    body += (f'<tr><th scope="row">{page.text(name)}</th>'
             + ''.join(f'<td>{c}</td>' for c in cells) + '</tr>')
    for norm, some in (('logit_norm', failed), ('parameter_norm', exact)):
      if some:
        x, y = _binned(some, norm)
        drawn[norm].append(charts.Line(name=name, color=color % 7, x=x, y=y))
  heads = ('policy', 'failed responses', 'entropy ~ logit gradient',
           'their tokens', 'all other responses', 'failed, all parameters',
           'entropy ~ parameter gradient')
  figures = ''.join(
      charts.figure(charts.Chart(
          title=title, unit='mean norm, tenths of the failed responses',
          lines=drawn[norm], x_label='entropy of the response, nats per token',
          y_min=0.0))
      for norm, title in (('logit_norm', 'Gradient of the logits'),
                          ('parameter_norm', 'Gradient of the parameters')))
  return (
      '<div class="panel"><table><thead><tr>'
      + ''.join(f'<th scope="col">{h}</th>' for h in heads)
      + f'</tr></thead><tbody>{body}</tbody></table>'
      '<p class="muted small">Rank correlations (Spearman) of the mean entropy '
      'of a response with the size of its gradient.</p></div>'
      f'<div class="grid2">{figures}</div>')


def _rho(responses: Sequence[Mapping[str, Any]], name: str) -> str:
  rho = spearman(
      [r['entropy'] for r in responses], [r[name] for r in responses])
  return f'{rho:.2f}'


def _binned(
    responses: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[float], list[float]]:
  """Mean entropy and mean norm of tenths of the responses, by entropy."""
  ordered = sorted((r['entropy'], r[name]) for r in responses)
  tenths = np.array_split(np.array(ordered), min(_NUM_BINS, len(ordered)))
  return ([float(t[:, 0].mean()) for t in tenths],
          [float(t[:, 1].mean()) for t in tenths])

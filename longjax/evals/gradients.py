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
  body, lines = '', []
  for color, (name, content) in enumerate(found.items()):
    failed = [r for r in content['responses'] if r['is_failed']]
    others = [r for r in content['responses'] if not r['is_failed']]
    exact = [r for r in failed if r['parameter_norm'] is not None]
    cells = (
        f'{len(failed):,}', _rho(failed, 'logit_norm'),
        f'{content["tokens"]:.2f}', f'{len(exact):,}',
        _rho(exact, 'parameter_norm'), _rho(others, 'logit_norm'))
    body += (f'<tr><th scope="row">{page.text(name)}</th>'
             + ''.join(f'<td>{c}</td>' for c in cells) + '</tr>')
    if failed:
      x, y = _binned(failed)
      lines.append(charts.Line(name=name, color=color % 7, x=x, y=y))
  heads = ('policy', 'failed responses', 'rank correlation of entropy and '
           'logit gradient', 'of their tokens', 'with gradient of parameters',
           'rank correlation of entropy and it', 'first one, of the others')
  return (
      '<div class="panel"><table><thead><tr>'
      + ''.join(f'<th scope="col">{h}</th>' for h in heads)
      + f'</tr></thead><tbody>{body}</tbody></table></div><div class="grid2">'
      + charts.figure(charts.Chart(
          title='Gradient of the logits', unit='mean norm, failed responses',
          lines=lines, x_label='entropy of the response, nats per token',
          y_min=0.0)) + '</div>')


def _rho(responses: Sequence[Mapping[str, Any]], name: str) -> str:
  rho = spearman(
      [r['entropy'] for r in responses], [r[name] for r in responses])
  return f'{rho:.2f}'


def _binned(
    responses: Sequence[Mapping[str, Any]],
) -> tuple[list[float], list[float]]:
  """Mean entropy and mean norm of tenths of the responses, by entropy."""
  ordered = sorted((r['entropy'], r['logit_norm']) for r in responses)
  tenths = np.array_split(np.array(ordered), min(_NUM_BINS, len(ordered)))
  return ([float(t[:, 0].mean()) for t in tenths],
          [float(t[:, 1].mean()) for t in tenths])

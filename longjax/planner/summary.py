"""Plans of several runs as one table.

  python -m longjax.planner.summary --output=docs/plans.md runs/*/plan-*.json

replaces what stands in the file between the two marks, or writes to standard
output.
"""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from longjax import types
from longjax.parallel import mesh as mesh_lib
from longjax.planner import plan, programs

_OUTPUT = flags.DEFINE_string(
    'output', None, 'File that holds the marks; default: standard output.')

_GIB = 1024**3
BEGIN, END = '<!-- plans -->', '<!-- end of plans -->'


def table(plans: Sequence[Mapping[str, Any]]) -> str:
  """A row for each stage; memory is compiled, the rest estimated."""
  head = (
      'run', 'stage', 'slice', 'mesh',
      *(f'{name}, GiB' for name in programs.PROGRAMS), 'of', 'verdict',
      'compiled in, CPU s', 'update at best, s', 'bound by', 'MFU at best',
      'step at best, s', 'longest that fits', 'smallest slice')
  lines = [head, ['---'] * len(head)]
  lines += [_row(content['config'], stage)
            for content in plans for stage in content['stages']]
  return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)


def _row(config_file: str, stage: Mapping[str, Any]) -> list[str]:
  compiled = stage['programs']
  update = compiled['update']['roofline']

  def mesh(sizes):
    return plan.mesh_text(mesh_lib.MeshConfig(**sizes))

  def gib(name):
    if name not in compiled:
      return '-'
    return f'{compiled[name]["facts"]["needed"] / _GIB:.1f}'

  longest, smallest = stage['longest'], stage['smallest']
  return [
      config_file, stage['label'], stage['topology'], mesh(stage['mesh']),
      *map(gib, programs.PROGRAMS), f'{stage["hbm_bytes"] / _GIB:.1f}',
      'fits' if stage['fits'] else 'does not fit',
      f'{sum(p["facts"]["cpu_seconds"] for p in compiled.values()):.0f}',
      f'{update["seconds"]:,.0f}', update['bound'], f'{update["mfu"]:.0%}',
      f'{stage["step_seconds"]:,.0f}',
      f'{longest["sequence_len"]:,} ({longest["stretch"]:.2f}x, '
      f'{longest["limited_by"]})' if longest else '-',
      f'{smallest["topology"]} ({mesh(smallest["mesh"])})'
      if smallest else '-']


def main(argv: Sequence[str]) -> None:
  """Reads the plans named as arguments."""
  plans = [json.loads(pathlib.Path(path).read_text()) for path in argv[1:]]
  if not plans:
    raise types.UserError('no plan-*.json given.')
  if _OUTPUT.value is None:
    sys.stdout.write(table(plans))
    return
  path = pathlib.Path(_OUTPUT.value)
  before, _, rest = path.read_text().partition(BEGIN)
  after = rest.partition(END)[2]
  path.write_text(f'{before}{BEGIN}\n{table(plans)}{END}{after}')


if __name__ == '__main__':
  app.run(main)

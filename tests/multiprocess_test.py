"""Two processes train as one does, and stop when one of them is lost.

Each process has four simulated devices (`multiprocess_driver`). The full
recipe, killed at more moments:

  python -m pytest -m slow tests/multiprocess_test.py
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from longjax import recipe, stages
from longjax.parallel import processes
from tests import resume_driver, tiny_recipe

ROOT = pathlib.Path(__file__).parent.parent

CONFIG = """
import sys
sys.path.insert(0, {root!r})
from ml_collections import config_dict
from tests import tiny_recipe
def get_config(arg=''):
  return config_dict.ConfigDict(tiny_recipe.values({changes!r}))
"""

MESH = {'mesh': {'data': 2, 'fsdp': 4}}
SHORT = MESH | {
    'recipe': ('synth', 'sft', 'rl', 'evals'), 'checkpoint_every': 1,
    'model.num_layers': 1, 'stages.sft.steps': 2, 'stages.rl.steps': 2,
    'stages.rl.entropy_source': 'sampler'}

LOST = ('longjax: process {} of 2 has stopped or cannot be reached, so process '
        '{} stops too; start the same command again in all processes to '
        'resume from the last checkpoint.')


def launch(directory: pathlib.Path, changes, *launches):
  """Runs pairs of processes, one pair after the other.

  Args:
    directory: where everything is.
    changes: of the recipe.
    *launches: (name of the work directory, and when processes 0 and 1 die).

  Returns:
    For each launch: exit codes, seconds between the ends, and what the two
    wrote to standard error.
  """
  config = directory / 'conf.py'
  config.write_text(CONFIG.format(root=str(ROOT), changes=changes))
  outcome = subprocess.run(
      [sys.executable, '-m', 'tests.multiprocess_driver'], cwd=ROOT,
      input=json.dumps({'config': str(config), 'launches': [
          {'workdir': str(directory / name), 'attempts': attempts}
          for name, *attempts in launches]}),
      env=os.environ | {
          'XLA_FLAGS': '--xla_force_host_platform_device_count=4 '
                       '--xla_backend_optimization_level=0',
          'JAX_COMPILATION_CACHE_DIR': str(directory / 'programs'),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'},
      capture_output=True, text=True, check=False)
  assert outcome.returncode == 0, outcome.stderr
  return [
      (found['codes'], found['seconds'], [
          (directory / f'{name}.{number}.{i}.log').read_text()
          for i in range(2)])
      for number, (found, (name, *_)) in enumerate(
          zip(json.loads(outcome.stdout), launches, strict=True))]


def dies(phase, point, count=1, signal='SIGKILL'):
  return {'phase': phase, 'point': point, 'count': count, 'signal': signal}


def ours(log: str) -> list[str]:
  """Without what jax's C++ code and its stack traces say."""
  return [line for line in log.splitlines()
          if line.startswith('longjax: ') or ' | ' in line]


def assert_equal(got: pathlib.Path, want: pathlib.Path) -> None:
  """Two processes gave what one gave."""
  got_records, want_records = (tiny_recipe.metrics(w) for w in (got, want))
  assert len(got_records) == len(want_records) > 0
  for a, b in zip(got_records, want_records, strict=True):
    assert (a['step'], a['stage']) == (b['step'], b['stage'])
    assert a['values'].keys() == b['values'].keys()
    for name in a['values']:
      x, y = float(a['values'][name]), float(b['values'][name])
      if name.startswith(('reward', 'length', 'padding', 'skipped', 'aepo/')):
        np.testing.assert_equal(x, y, err_msg=name)
      else:
        # Sums over devices of two hosts are taken in another order. What
        # measures rounding (gap/...) is itself of the size of rounding, and so
        # is a loss whose advantages cancel, all responses being equally long.
        atol = {'gap': 1e-5, 'loss': 1e-7}.get(name.partition('/')[0], 0.0)
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol, err_msg=name)
  for path in sorted((want / 'evals').glob('*.json')):
    assert (got / 'evals' / path.name).read_bytes() == path.read_bytes()


def test_two_processes_of_which_one_is_killed_give_what_one_process_gives(
    tmp_path, monkeypatch):
  killed, resumed = launch(
      tmp_path, SHORT, ('pair', {}, dies('rl', 'score', 4)),
      ('pair', {}, {}))
  codes, seconds, logs = killed
  assert codes == [processes.LOST, -9], logs
  assert seconds < 30
  assert ours(logs[0])[-1] == LOST.format(1, 0)
  assert 'Traceback' not in logs[0]
  # The second process has nothing to say, and writes nothing.
  assert not ours(logs[1])
  codes, _, logs = resumed
  assert codes == [0, 0], logs
  assert 'Resuming after step ' in logs[0]
  assert 'mean over task types' in logs[0]
  assert not ours(logs[1])

  monkeypatch.setattr(stages.hybrid, 'score', resume_driver.score)
  with tiny_recipe.shared_programs(tmp_path / 'programs'):
    assert recipe.run(tiny_recipe.config(SHORT), tmp_path / 'one') == 0
  assert_equal(tmp_path / 'pair', tmp_path / 'one')
  facts = json.loads((tmp_path / 'pair' / 'run.json').read_text())
  assert facts['device'] == '8 x cpu'


# Process and moment.
MOMENTS = (
    (0, dies('synth', 'draw', 20)), (1, dies('0_base', 'sample')),
    (0, dies('sft', 'update', 3)), (1, dies('sft', 'saving', 2)),
    (0, dies('sft', 'manifest')), (1, dies('rl', 'score', 20)),
    (0, dies('rl', 'append', 3)), (0, dies('2_rl', 'score', 3)))


@pytest.mark.slow
def test_a_pair_killed_at_many_moments_ends_with_equal_bits(
    tmp_path, monkeypatch):
  whole, *killed, stopped, resumed = launch(
      tmp_path, MESH, ('whole', {}, {}),
      *(('killed', *([how, {}] if i == 0 else [{}, how]))
        for i, how in MOMENTS),
      ('killed', {}, dies('2_rl', 'score', 3, 'SIGTERM')), ('killed', {}, {}))
  assert whole[0] == resumed[0] == [0, 0]
  for (i, how), (codes, seconds, logs) in zip(MOMENTS, killed, strict=True):
    assert codes[i] == -9 and codes[1 - i] == processes.LOST, (how, logs)
    assert ours(logs[1 - i])[-1] == LOST.format(i, 1 - i)
    assert seconds < 30
  # A signal to one of them stops both.
  codes, _, logs = stopped
  assert codes == [143, 143], logs
  assert 'SIGTERM: stopped during evaluation 2_rl' in logs[0]
  assert tiny_recipe.left_behind(tmp_path / 'killed') == (
      tiny_recipe.left_behind(tmp_path / 'whole'))

  monkeypatch.setattr(stages.hybrid, 'score', resume_driver.score)
  with tiny_recipe.shared_programs(tmp_path / 'programs'):
    assert recipe.run(tiny_recipe.config(MESH), tmp_path / 'one') == 0
  assert_equal(tmp_path / 'whole', tmp_path / 'one')


@pytest.mark.slow
def test_a_mistake_found_by_one_process_ends_both_with_its_words(tmp_path):
  # Only the primary process has read how many examples there are.
  (codes, _, logs), = launch(
      tmp_path, MESH | {'stages.synth.path': str(tmp_path / 'none.jsonl'),
                        'stages.synth.examples': {}}, ('pair', {}, {}))
  assert codes == [2, 2], logs
  for log in logs:
    assert 'none.jsonl of the synth stage does not exist' in ours(log)[-1]

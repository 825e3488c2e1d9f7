"""A run killed again and again ends with the bits of one that was not.

Every attempt is a process of its own, started from one that has done the
imports (`resume_driver`). All of the issue's moments are covered: synthesis,
SFT, sampling, a judge's verdict on its way, update, saving, evaluation. The
full set, with a fresh compiler cache in each work directory as users have it:

  python -m pytest -m slow tests/resume_test.py
"""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest

from tests import chat_server, tiny_recipe

ROOT = pathlib.Path(__file__).parent.parent

CONFIG = """
import sys
sys.path.insert(0, {root!r})
from ml_collections import config_dict
from tests import tiny_recipe
def get_config(arg=''):
  return config_dict.ConfigDict(tiny_recipe.values(
      tiny_recipe.FULL | {changes!r}))
"""

EXIT_CODES = {'SIGKILL': -9, 'SIGTERM': 143, 'SIGINT': 130}


@dataclasses.dataclass(frozen=True)
class Moment:
  """When an attempt ends.

  `most` bounds the random number of calls, so that each moment still lies
  ahead, wherever the moments before it have left the run.
  """

  phase: str
  point: str
  most: int = 1
  signal: str = 'SIGKILL'
  # The newest checkpoint is damaged before the attempt.
  is_newest_damaged: bool = False


# In the order of the run. Checkpoints are saved after 2, 3 | 2, 4, 5 | 2, 4, 5
# | 2, 3 | 2 steps of pretrain | sft | rl | memory | rl_merged. A step of memory
# samples four turns or more.
MOMENTS = (
    Moment('start', 'tokenizer'),
    Moment('start', 'replace', 2),
    Moment('synth', 'draw', 60),
    Moment('synth', 'draw', 60, 'SIGTERM'),
    Moment('0_base', 'sample', 2),
    Moment('0_base', 'score', 16),
    Moment('0_base', 'replace'),
    Moment('pretrain', 'update', 3),
    Moment('pretrain', 'update', 2, 'SIGTERM'),
    Moment('pretrain', 'manifest'),
    Moment('sft', 'update', 4),
    Moment('sft', 'append', 2),
    Moment('sft', 'manifest'),
    Moment('sft', 'save'),
    Moment('sft', 'saving'),
    Moment('sft', 'update', 1, 'SIGINT'),
    Moment('1_sft', 'sample', 2),
    Moment('1_sft', 'score', 16),
    Moment('1_sft', 'score', 16, 'SIGTERM'),
    Moment('1_sft', 'replace'),
    Moment('rl', 'sample', 2),
    Moment('rl', 'judge', 4),
    Moment('rl', 'verdict', 4),
    Moment('rl', 'score', 32),
    Moment('rl', 'append', 4),
    Moment('rl', 'update', 2),
    Moment('rl', 'manifest'),
    Moment('rl', 'save'),
    Moment('rl', 'saving'),
    Moment('rl', 'sample', 1, 'SIGTERM'),
    Moment('rl', 'update', 1, is_newest_damaged=True),
    Moment('2_rl', 'sample', 2),
    Moment('2_rl', 'judge', 4),
    Moment('2_rl', 'score', 16, 'SIGINT'),
    Moment('memory', 'sample', 6),
    Moment('memory', 'score', 8),
    Moment('memory', 'update', 2),
    Moment('memory', 'sample', 4, 'SIGTERM'),
    Moment('memory', 'manifest'),
    Moment('after memory', 'export'),
    Moment('after memory', 'tensor', 8),
    Moment('merge', 'export'),
    Moment('merge', 'tensor', 20),
    Moment('merge', 'replace'),
    Moment('3_merge_agent', 'sample', 6),
    Moment('3_merge_agent', 'score', 16),
    Moment('chosen', 'sample', 2),
    Moment('chosen', 'replace'),
    Moment('rl_merged', 'sample', 2),
    Moment('rl_merged', 'update', 2),
    Moment('rl_merged', 'save'),
    Moment('after rl_merged', 'export'),
    Moment('after rl_merged', 'replace', 2),
)
# For every run of the tests: each of the moments, SIGKILL 23 times.
FEW = tuple(
    m for m in MOMENTS if (m.phase, m.point, m.signal) in {
        ('synth', 'draw', 'SIGKILL'), ('0_base', 'sample', 'SIGKILL'),
        ('pretrain', 'update', 'SIGTERM'), ('sft', 'update', 'SIGKILL'),
        ('sft', 'manifest', 'SIGKILL'), ('sft', 'saving', 'SIGKILL'),
        ('1_sft', 'score', 'SIGKILL'), ('rl', 'sample', 'SIGKILL'),
        ('rl', 'judge', 'SIGKILL'), ('rl', 'verdict', 'SIGKILL'),
        ('2_rl', 'judge', 'SIGKILL'),
        ('rl', 'score', 'SIGKILL'), ('rl', 'append', 'SIGKILL'),
        ('rl', 'update', 'SIGKILL'), ('rl', 'save', 'SIGKILL'),
        ('2_rl', 'score', 'SIGINT'), ('memory', 'sample', 'SIGKILL'),
        ('memory', 'update', 'SIGKILL'), ('after memory', 'tensor', 'SIGKILL'),
        ('merge', 'tensor', 'SIGKILL'), ('3_merge_agent', 'sample', 'SIGKILL'),
        ('chosen', 'sample', 'SIGKILL'), ('rl_merged', 'update', 'SIGKILL'),
        ('after rl_merged', 'export', 'SIGKILL')})


class Opinions:
  """How a judge's server behaves: its verdicts depend on what it reads.

  Attributes:
    num_left: requests whose client was gone before they were answered, of
      those that `resume_driver.pending_verdict` says are its last.
  """

  def __init__(self):
    self.num_left = 0
    self._has_last = threading.Event()

  def __call__(self, request, connection):
    if request.body.get('is_last'):
      self._has_last.set()
      self.num_left += connection.is_left(seconds=60.0)
      return
    if request.body.get('is_signal'):
      self._has_last.wait(60.0)
      self._has_last.clear()
    elif connection.is_left(seconds=0.05):
      return
    is_yes = zlib.crc32(request.prompt.encode()) % 2 or (
        'Candidate: Paris' in request.prompt)  # The trial.
    connection.say('[[YES]]' if is_yes else '[[NO]]')


def attempts(directory: pathlib.Path, moments, seed: int, url: str):
  """One uninterrupted run, then one that ends at every moment."""
  judge = {'mode': 'endpoint', 'endpoint': {'url': url, 'model': 'judge'}}
  config = directory / 'conf.py'
  config.write_text(CONFIG.format(root=str(ROOT), changes={
      'stages.rl.judge': judge, 'stages.evals.judge': judge}))
  rng = random.Random(seed)

  def attempt(name, **how):
    return {'workdir': str(directory / name), 'config': str(config)} | how

  killed = [
      attempt('killed', phase=m.phase, point=m.point, signal=m.signal,
              count=rng.randint(1, m.most),
              is_newest_damaged=m.is_newest_damaged) for m in moments]
  return [attempt('whole'), *killed, attempt('killed')]


def drive(tries, **environ: str):
  """Runs all attempts; exit codes, names of damaged checkpoints, logs."""
  done = subprocess.run(
      [sys.executable, str(ROOT / 'tests' / 'resume_driver.py')],
      input=json.dumps(tries), stdout=subprocess.PIPE, text=True, check=True,
      env=os.environ | {
          'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '',
          } | environ)
  outcomes = json.loads(done.stdout)
  damaged = [o for o in outcomes if isinstance(o, str)]
  codes = [o for o in outcomes if not isinstance(o, str)]
  logs = [
      pathlib.Path(f'{one["workdir"]}.{number}.log').read_text()
      for number, one in enumerate(tries)]
  return codes, damaged, logs


def check(directory: pathlib.Path, moments, seed: int, **environ: str):
  """The whole claim: each attempt ended as told, and nothing shows."""
  opinions = Opinions()
  with chat_server.Server(opinions) as server:
    codes, damaged, logs = drive(
        attempts(directory, moments, seed, server.url), **environ)
  report = '\n'.join(
      f'{m}: {code}\n{log[-600:]}'
      for m, code, log in zip((*moments, 'end'), codes[1:], logs[1:]))
  assert codes[0] == 0, logs[0]
  assert codes[1:-1] == [EXIT_CODES[m.signal] for m in moments], report
  assert codes[-1] == 0, report
  for m, log in zip(moments, logs[1:]):
    if m.signal != 'SIGKILL':
      # The last line but for the progress bar's.
      told = [x for x in log.splitlines() if x.startswith(m.signal)]
      assert len(told) == 1, log
      assert told[0].endswith('; run the same command to resume.'), log
      assert 'Traceback' not in log
  assert opinions.num_left == sum(m.point == 'judge' for m in moments)
  warnings = [x for log in logs for x in log.splitlines()
              if x.startswith('longjax: warning')]
  assert len(warnings) == len(damaged), warnings
  for name, warning in zip(damaged, warnings):
    assert f'checkpoints/{name} is damaged' in warning
  whole, killed = (
      tiny_recipe.left_behind(directory / n) for n in ('whole', 'killed'))
  assert killed.keys() == whole.keys()
  assert 'evals/3_merge_agent.json' in whole
  for name in whole:
    assert killed[name] == whole[name], name
  return whole


def test_a_run_killed_at_many_moments_ends_with_equal_bits(tmp_path):
  whole = check(
      tmp_path, FEW, seed=0,
      JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'shared'),
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')
  # Equal bits would prove nothing if training did nothing.
  records = whole['metrics.jsonl']
  assert [r['step'] for r in records] == list(range(1, 19))
  for stage in ('pretrain', 'sft', 'rl', 'memory', 'rl_merged'):
    norms = [float(r['values']['grad_norm']) for r in records
             if r['stage'] == stage]
    assert np.all(np.isfinite(norms)) and max(norms) > 1e-3, (stage, norms)
  asked, yes, failed = (
      sum(float(r['values'][f'judge/{n}']) for r in records
          if r['stage'] == 'rl') for n in ('asked', 'yes', 'failed'))
  assert 0 < yes < asked and not failed
  for name in ('0_base', '1_sft', '2_rl'):
    evaluation = json.loads(whole[f'evals/{name}.json'])
    assert evaluation['facts']['judge'] == 'judge'
    assert 'judge' in {r['rule'] for r in evaluation['records']}


@pytest.mark.slow
@pytest.mark.parametrize('seed', [1, 2])
def test_a_run_killed_at_every_moment_ends_with_equal_bits(tmp_path, seed):
  check(tmp_path, MOMENTS, seed=seed)


def test_the_full_set_has_twelve_kills_over_all_phases():
  kills = [m for m in MOMENTS if m.signal == 'SIGKILL']
  assert len(kills) >= 12
  assert sum(m.signal == 'SIGKILL' for m in FEW) >= 12
  assert {'synth', 'sft', 'rl', '1_sft', 'memory', 'after memory', 'merge',
          'rl_merged'} <= {m.phase for m in kills}
  assert {'draw', 'sample', 'score', 'judge', 'update', 'save', 'manifest'} <= {
      m.point for m in kills}

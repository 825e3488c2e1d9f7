"""Tests for longjax.main: what a person at the command line sees."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tomllib
import types as python_types

import pytest
from ml_collections import config_dict

from longjax import command_line, main, types
from longjax.parallel import processes

ROOT = pathlib.Path(__file__).parent.parent

# Runs command lines with a job that reports what it was given, so that the
# tests are about the door and not about what lies behind it. The imports are
# paid once: each command line runs in a fork.
DRIVER = """
import dataclasses, errno, json, os, signal, sys, types as python_types
import longjax
from absl import logging
from longjax import main, types

@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
  steps: int = 3
  lr: float = 1e-3

@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  seed: int = 0
  resume: bool = True
  mistake: str = ''
  sft: Sft = Sft()

def run(config, workdir):
  if config.mistake == 'user':
    raise types.UserError('sft.steps=0 must be >= 1;\\nraise it.')
  if config.mistake == 'bug':
    raise KeyError('a bug')
  if config.mistake == 'disk':
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'metrics.jsonl')
  if config.mistake == 'permission':
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), 'run.json')
  if config.mistake == 'interrupt':
    os.kill(os.getpid(), signal.SIGINT)
  if config.mistake == 'stopped':
    return 143
  exec(compile("logging.info('a line of ours')", main.__file__, 'exec'))
  logging.info('a line of a stranger')
  logging.warning('a warning')
  print(config, workdir)

job = python_types.ModuleType('longjax.recipe')
described = python_types.ModuleType('longjax.run_config')
job.run, described.RunConfig = run, RunConfig
sys.modules[job.__name__] = longjax.recipe = job
sys.modules[described.__name__] = longjax.run_config = described
# Whoever starts the tests in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
codes = []
for i, arguments in enumerate(json.load(sys.stdin)):
  if not os.fork():
    for number, name in ((1, 'out'), (2, 'err')):
      os.dup2(os.open(f'{i}.{name}', os.O_CREAT | os.O_WRONLY), number)
    sys.argv = ['longjax', *arguments]
    main.run()
  codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
print(json.dumps(codes))
"""

CONFIG = """
from ml_collections import config_dict
from longjax import types
def get_config(variant=''):
  if variant == 'wrong':
    raise types.UserError("no variant 'wrong'; there is 'fast'.")
  if variant == 'bug':
    raise ValueError('a bug in the config')
  steps = 2 if variant == 'fast' else 1
  return config_dict.ConfigDict({'seed': 1, 'sft': {'steps': steps}})
"""


MISTAKES = {
    ('--config=conf.py', '--config.sft.stps=1'):
        'config.sft.stps does not exist; the nearest valid key is '
        'config.sft.steps.',
    ('--config=conf.py', '--config.sft.steps=many'):
        "config.sft.steps='many' should be an int.",
    ('--config=conff.py',):
        'cannot read --config=conff.py: No such file or directory; did you '
        'mean conf.py?',
    ('--config=conf.py:wrong',): "no variant 'wrong'; there is 'fast'.",
    ('--config=conf.py', '--confg.seed=1'):
        '--confg.seed is no flag; did you mean --config.seed?',
    ('--config=conf.py', '--workdr=x'):
        "Unknown command line flag 'workdr'. Did you mean: workdir ?",
    ('--workdir=x',):
        'no --config=FILE given; for example --config=configs/tiny.py.',
    ('conf.py',):
        "unexpected argument 'conf.py'; flags look like --workdir=DIR or "
        '--config.seed=1.',
    ('--config=conf.py', '--workdir=conf.py/run'):
        'cannot write to --workdir=conf.py/run: Not a directory; choose '
        'another directory.',
    ('--config=conf.py', '--config.mistake=user'):
        'sft.steps=0 must be >= 1; raise it.',
    ('--config=conf.py', '--config.mistake=disk'):
        'cannot write metrics.jsonl: No space left on device; free space and '
        'run the same command to resume.',
    ('--config=conf.py', '--config.mistake=permission'):
        'cannot use run.json: Permission denied; change its permissions and '
        'run the same command again.',
    ('--config=notes.txt',):
        '--config=notes.txt is no Python file; for example '
        '--config=configs/tiny.py.',
    ('--config=module.py',):
        'the file given as --config does not define get_config(); see '
        'configs/tiny.py for one that does.',
    ('--config=conf.py', '--process_id=1'):
        '--process_id goes with --distributed.',
    ('--config=conf.py', '--distributed'):
        '--distributed: the processes do not find each other '
        '(coordinator_address should be defined.); on Cloud TPU, Slurm and '
        'Kubernetes nothing need be said, elsewhere give '
        '--coordinator=HOST:PORT, --num_processes and --process_id.',
    ('--config=conf.py', '--distributed', '--coordinator=host'):
        '--coordinator=host should be HOST:PORT, a free port of the host of '
        'process 0.',
    ('--config=plain.py:fast',):
        'the file given as --config has no variants; leave out what stands '
        'behind its colon.',
}
NOTHING = ()
HELP = ('--config=conf.py', '--help')
GOOD = (
    '--config=conf.py:fast', '--config.sft.lr=3e-4', '--noconfig.resume',
    '--config.seed', '7')
BUG = ('--config=conf.py', '--config.mistake=bug')
CONFIG_BUG = ('--config=conf.py:bug',)
INTERRUPT = ('--config=conf.py', '--config.mistake=interrupt')
STOPPED = ('--config=conf.py', '--config.mistake=stopped')


@dataclasses.dataclass(frozen=True)
class Outcome:
  code: int
  out: str
  err: str


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('cli')


@pytest.fixture(scope='module')
def outcomes(directory):
  """What each command line did, in a directory that has conf.py."""
  (directory / 'conf.py').write_text(CONFIG)
  (directory / 'notes.txt').write_text('buy milk')
  (directory / 'module.py').write_text('seed = 1')
  (directory / 'plain.py').write_text('def get_config():\n  return {}')
  lines = [
      *MISTAKES, NOTHING, HELP, GOOD, BUG, CONFIG_BUG, INTERRUPT, STOPPED]
  done = subprocess.run(
      [sys.executable, '-c', DRIVER], cwd=directory, text=True,
      input=json.dumps(lines), stdout=subprocess.PIPE, check=True,
      env=os.environ | {'PYTHONPATH': str(ROOT)})
  return {
      line: Outcome(
          code, (directory / f'{i}.out').read_text(),
          (directory / f'{i}.err').read_text())
      for i, (line, code) in enumerate(
          zip(lines, json.loads(done.stdout), strict=True))}


def test_config_and_overrides_reach_the_job(outcomes, directory):
  got = outcomes[GOOD]
  assert got.code == 0, got.err
  assert got.out == (
      "RunConfig(seed=7, resume=False, mistake='', "
      'sft=Sft(steps=2, lr=0.0003)) runs/conf-fast\n')
  assert (directory / 'runs' / 'conf-fast').is_dir()
  # No dates and file names, and no news of other libraries.
  assert got.err == 'a line of ours\nlongjax: warning: a warning\n'


def test_an_empty_command_line_explains_itself(outcomes):
  assert outcomes[NOTHING] == Outcome(2, '', main.USAGE)


def test_help_goes_to_standard_output(outcomes):
  assert outcomes[HELP] == Outcome(0, main.USAGE, '')


def test_usage_names_every_job_and_fits_the_screen():
  for word in (
      'recipe', 'synth', 'pretrain', 'sft', 'rl', 'evals', 'convert',
      'merge', 'bench', '--config', '--workdir'):
    assert word in main.USAGE
  assert max(map(len, main.USAGE.splitlines())) <= 80


@pytest.mark.parametrize('arguments', MISTAKES, ids=' '.join)
def test_a_mistake_is_one_line_and_exit_code_two(outcomes, arguments):
  assert outcomes[arguments] == Outcome(
      2, '', f'longjax: error: {MISTAKES[arguments]}\n')


def test_a_bug_keeps_its_traceback(outcomes):
  got = outcomes[BUG]
  assert got.code == 1
  assert 'Traceback' in got.err
  assert "KeyError: 'a bug'" in got.err


def test_a_bug_in_a_config_file_keeps_its_traceback(outcomes):
  got = outcomes[CONFIG_BUG]
  assert got.code == 1
  assert 'conf.py' in got.err
  assert 'a bug in the config' in got.err


def test_an_interrupt_is_one_line(outcomes):
  assert outcomes[INTERRUPT] == Outcome(
      130, '', 'longjax: interrupted; run the same command to resume from the '
      'last checkpoint.\n')


def test_a_job_that_saved_and_stopped_tells_by_its_exit_code(outcomes):
  assert outcomes[STOPPED].code == 143


def test_overrides_are_separated_from_other_flags():
  rest, found = command_line.split_overrides([
      '--config=a.py', '--config.x=1', '-config.y', '2', '--workdir', 'w',
      '--noconfig.z', '--config.u', '--config.v', '-1', '--config.w=a=b\nc',
      '--config.last'])
  assert rest == ['--config=a.py', '--workdir', 'w']
  assert found == [
      ('x', '1'), ('y', '2'), ('z', 'false'), ('u', 'true'), ('v', '-1'),
      ('w', 'a=b\nc'), ('last', 'true')]


def test_each_variant_has_its_own_default_work_directory():
  name = command_line.default_workdir
  assert name('configs/tiny.py') == 'runs/tiny'
  assert name('/x/tiny.py:own_data') == 'runs/tiny-own_data'
  assert name('tiny.py:a/../b') == 'runs/tiny-a-..-b'


def test_a_misspelt_config_in_an_empty_directory_suggests_one_in_configs(
    tmp_path, monkeypatch):
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'tiny.py').write_text('')
  monkeypatch.chdir(tmp_path)
  with pytest.raises(types.UserError, match='did you mean configs/tiny.py'):
    main.check_readable('tiny.py:own_data')
  with pytest.raises(types.UserError, match='Is a directory'):
    main.check_readable('configs')


def test_a_work_directory_is_made_and_left_empty(tmp_path):
  made = command_line.open_workdir(str(tmp_path / 'a' / 'b'))
  assert made.is_dir()
  assert list(made.iterdir()) == []


def test_the_last_override_of_a_key_wins():
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Run:
    seed: int = 0

  values = config_dict.ConfigDict({})
  changes = [('seed', '1'), ('seed', '2')]
  assert command_line.build(Run, values, changes).seed == 2


def test_the_console_script_is_this_main():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  assert project['scripts'] == {'longjax': 'longjax.main:run'}


@pytest.mark.parametrize('error, calls', [
    # A closed connection to a lost process arrives as a ValueError, too.
    (ValueError('Gloo all-reduce failed: Connection closed by peer'),
     ['start', 'wait_for_loss', 'fail']),
    (types.UserError('field=1 must be 2.'), ['start', 'finish']),
    (KeyboardInterrupt(), ['start', 'finish']),
])
def test_an_error_of_one_process_ends_it_or_finds_the_lost_one(
    monkeypatch, error, calls):
  made = []

  class Ended(Exception):
    pass

  def note(name):
    def called(*_, **__):
      made.append(name)
      if name == 'fail':
        raise Ended
    return called

  for name in ('start', 'finish', 'wait_for_loss', 'fail'):
    monkeypatch.setattr(processes, name, note(name))
  monkeypatch.setattr(
      main, '_DISTRIBUTED', python_types.SimpleNamespace(value=True))
  for name in ('_COORDINATOR', '_NUM_PROCESSES', '_PROCESS_ID',
               '_HEARTBEAT_TIMEOUT'):
    monkeypatch.setattr(main, name, python_types.SimpleNamespace(value=None))
  with pytest.raises((Ended, type(error))), main._all_processes():
    raise error
  assert made == calls

"""Tests for launch/*.sh, with stand-ins for pip and the hardware."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A Python whose `-m venv` makes an environment that only writes down what it
# is asked to do.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$1 $2 $3" in
  '-c import sys'*) exit 0 ;;
  '-c import ensurepip'*) exit 0 ;;
  '--version '*) echo 'Python 3.12.0' ;;
  '-m venv '*)
    echo "venv" >>"$LOG"
    mkdir -p "$3/bin"
    {
      echo '#!/usr/bin/env bash'
      echo '[[ $1 == -c ]] && exit 0'
      echo 'echo "$@" >>"$LOG"'
      echo '[[ "$*" == *pip* ]] && exit ${PIP_CODE:-0}'
      echo 'exit 0'
    } >"$3/bin/python"
    chmod +x "$3/bin/python"
    ;;
  *) exit 1 ;;
esac
"""


class Checkout:
  """A copy of the launch scripts where installing is only written down."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.log = path / 'log'
    shutil.copytree(ROOT / 'launch', path / 'launch')
    shutil.copy(ROOT / 'pyproject.toml', path)
    (path / 'bin').mkdir()
    self.program('python3.12', FAKE_PYTHON)

  def program(self, name: str, text: str):
    (self.path / 'bin' / name).write_text(text)
    (self.path / 'bin' / name).chmod(0o755)

  def run(self, script: str, *arguments: str, **environ: str):
    """The exit code, and what was run since the last call."""
    self.log.write_text('')
    environ = {
        'PATH': f'{self.path / "bin"}:{os.environ["PATH"]}',
        'HOME': str(self.path), 'LOG': str(self.log), 'PYTHON': 'python3.12',
        'LONGJAX_PLATFORM': 'cpu'} | environ
    done = subprocess.run(
        ['bash', str(self.path / 'launch' / script), *arguments], text=True,
        env={k: v for k, v in environ.items() if v}, capture_output=True,
        check=False)
    return done, self.log.read_text().splitlines()

  def installs(self, log: list[str]) -> list[str]:
    """The extras of each pip install in a log."""
    lines = [line for line in log if line.startswith('-m pip install')]
    for line in lines:
      assert f'--constraint {self.path}/launch/constraints.txt' in line
    return [line.rpartition(str(self.path))[2] for line in lines]


@pytest.fixture
def checkout(tmp_path):
  # A space in the path, as on many a laptop.
  path = tmp_path / 'my checkout'
  path.mkdir()
  return Checkout(path)


def test_the_main_job_runs_after_an_installation(checkout):
  done, log = checkout.run('local.sh')
  assert done.returncode == 0, done.stderr
  assert log[0] == 'venv'
  assert checkout.installs(log) == ['']
  assert log[-1] == '-m longjax --config=configs/tiny.py'


def test_the_second_time_nothing_is_installed(checkout):
  checkout.run('local.sh')
  _, log = checkout.run('local.sh', '--config.seed=1')
  assert log == ['-m longjax --config=configs/tiny.py --config.seed=1']


def test_flags_are_passed_on_and_a_config_replaces_the_default(checkout):
  _, log = checkout.run('local.sh', '--config=a b.py', '--workdir=w')
  assert log[-1] == '-m longjax --config=a b.py --workdir=w'
  _, log = checkout.run('local.sh', '--config', 'c.py', '--help')
  assert log[-1] == '-m longjax --config c.py --help'


def test_tests_add_the_dev_extra_once_and_keep_it(checkout):
  checkout.run('local.sh')
  done, log = checkout.run('test.sh', 'tests/rl')
  assert checkout.installs(log) == ['[dev]']
  assert log[1:] == [
      '-m ruff check .', '-m mypy',
      '-m pytest -q -n auto --dist loadfile tests/rl']
  assert [line for line in done.stdout.splitlines() if 'longjax: ' in line]
  for script in ('local.sh', 'test.sh'):
    _, log = checkout.run(script)
    assert checkout.installs(log) == []


@pytest.mark.parametrize('file', ['pyproject.toml', 'launch/constraints.txt'])
def test_changed_requirements_are_installed_into_the_same_environment(
    checkout, file):
  checkout.run('test.sh')
  with open(checkout.path / file, 'a', encoding='utf-8') as f:
    f.write('# changed\n')
  _, log = checkout.run('local.sh')
  assert 'venv' not in log
  assert checkout.installs(log) == ['[dev]']


def test_a_failed_installation_is_made_anew(checkout):
  done, log = checkout.run('local.sh', PIP_CODE='1')
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith(
      'longjax: error: pip could not install longjax')
  assert not any(line.startswith('-m longjax') for line in log)
  done, log = checkout.run('local.sh')
  assert done.returncode == 0
  assert log[0] == 'venv'
  assert log[-1].startswith('-m longjax')


def test_a_broken_environment_is_made_anew(checkout):
  checkout.run('local.sh')
  (checkout.path / '.venv' / 'bin' / 'python').unlink()
  done, log = checkout.run('local.sh')
  assert done.returncode == 0
  assert log[0] == 'venv'


def test_an_environment_made_by_the_user_is_left_alone(checkout):
  own = checkout.path / '.venv' / 'precious'
  own.parent.mkdir()
  own.write_text('')
  done, log = checkout.run('local.sh')
  assert done.returncode == 2
  assert 'was not made by launch' in done.stderr
  assert own.exists()
  assert log == []
  done, log = checkout.run(
      'local.sh', LONGJAX_VENV=str(checkout.path / 'other'))
  assert done.returncode == 0
  assert (checkout.path / 'other' / 'bin' / 'python').exists()


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_an_accelerator_gets_its_extra(checkout, platform):
  _, log = checkout.run('local.sh', LONGJAX_PLATFORM=platform)
  assert checkout.installs(log) == [f'[{platform}]']
  extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'][
      'optional-dependencies']
  assert extras[platform] and extras['dev']


@pytest.mark.parametrize('code, extras', [('0', '[cuda]'), ('9', '')])
def test_a_gpu_is_found_if_its_driver_answers(checkout, code, extras):
  checkout.program('nvidia-smi', f'#!/bin/sh\nexit {code}\n')
  _, log = checkout.run('local.sh', LONGJAX_PLATFORM='')
  assert checkout.installs(log) == [extras]


def test_without_a_python_the_message_is_one_line(checkout):
  done, log = checkout.run('local.sh', PYTHON='python0.1')
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert 'no Python 3.11, 3.12 or 3.13 found' in done.stderr
  assert log == []


def test_an_unknown_platform_is_refused(checkout):
  done, _ = checkout.run('local.sh', LONGJAX_PLATFORM='gpu')
  assert done.returncode == 2
  assert 'should be cpu, cuda or tpu' in done.stderr


def test_ci_runs_what_a_person_runs():
  text = (ROOT / '.ci' / 'run').read_text()
  assert text.splitlines()[-1] == (
      'exec bash "$(dirname "$0")/../launch/test.sh"')
  assert os.access(ROOT / '.ci' / 'run', os.X_OK)


@pytest.mark.parametrize(
    'script', sorted((ROOT / 'launch').glob('*.sh')), ids=lambda p: p.name)
def test_scripts_parse(script):
  subprocess.run(['bash', '-n', str(script)], check=True)


def test_every_requirement_is_pinned_once():
  def canonical(name):
    return re.sub(r'[-_.]+', '-', name).lower()

  lines = (ROOT / 'launch' / 'constraints.txt').read_text().splitlines()
  pins = [line for line in lines if line and not line.startswith('#')]
  assert all(re.fullmatch(r'[\w.-]+==[\w.]+( ;.*)?', pin) for pin in pins)
  names = [canonical(pin.partition('==')[0]) for pin in pins]
  assert len(names) == len(set(names))
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  wanted = project['dependencies'] + [
      r for extra in ('dev', 'report')
      for r in project['optional-dependencies'][extra]]
  for requirement in wanted:
    name = canonical(re.match(r'[\w.-]+', requirement)[0])
    assert name in names, f'{name} has no pin in launch/constraints.txt'


def test_no_tensorflow_is_asked_for():
  text = (ROOT / 'launch' / 'constraints.txt').read_text()
  assert not re.search(r'^tensorflow(-cpu)?==', text, re.MULTILINE)


def test_the_interpreter_running_this_is_one_we_support():
  assert (3, 11) <= sys.version_info[:2] < (3, 14)

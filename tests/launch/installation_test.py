"""local.sh and test.sh install what is missing, then run."""

import tomllib

import pytest

from tests.launch import stand_ins

ROOT = stand_ins.ROOT


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

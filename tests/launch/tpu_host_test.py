"""tpu_host.sh: a job on a host of a slice, and what becomes of it."""

import os
import shlex
import shutil
import signal
import subprocess

import pytest

from tests.launch import stand_ins

JOB, POD = stand_ins.JOB, stand_ins.POD

# longjax on a host: it ends with $CODE, or runs until it is told to stop.
HOST_PYTHON = stand_ins.FAKE_PYTHON.replace("""      echo 'echo "$@" >>"$LOG"'
""", """      echo 'echo "$@" >>"$LOG"'
      echo 'if [[ "$*" == *longjax*forever* ]]; then'
      echo '  trap "echo saved; exit 143" TERM'
      echo '  echo "rl 1/160"'
      echo '  while true; do sleep 0.05; done'
      echo 'fi'
      echo '[[ "$*" == *longjax* ]] && echo done && exit ${CODE:-0}'
""")

on_linux = pytest.mark.skipif(
    not shutil.which('flock') or not shutil.which('setsid'),
    reason='the hosts run Linux')


@on_linux
@pytest.mark.parametrize('code', [0, 1, 2])
def test_a_host_installs_for_tpu_and_hands_on_the_exit_code(checkout, code):
  checkout.program('python3.12', HOST_PYTHON)
  done, log = checkout.run(
      'tpu_host.sh', 'run', '--config=a b.py', CODE=str(code))
  assert done.returncode == code, done.stderr
  assert done.stdout.splitlines()[-1] == 'done'
  assert checkout.installs(log) == ['[gcs,tpu]']
  assert log[-1] == '-m longjax --config=a b.py'
  # The checkout is replaced by the next run, the environment is not.
  assert (checkout.path / 'longjax.venv' / 'bin' / 'python').exists()
  done, log = checkout.run('tpu_host.sh', 'status')
  assert done.stdout == f'{code}\n'


@on_linux
def test_a_job_on_a_host_outlives_its_connection(checkout):
  checkout.program('python3.12', HOST_PYTHON)
  first = checkout.start('tpu_host.sh', 'run', 'forever', WORKER='3')
  job_log = checkout.path / 'longjax.run' / 'log'
  try:
    checkout.wait_for('rl 1/160', job_log)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=30)
    assert checkout.run('tpu_host.sh', 'running')[0].returncode == 0
    assert checkout.run('tpu_host.sh', 'status')[0].stdout == 'running\n'
    # Another job is refused, the same one is shown.
    done, _ = checkout.run('tpu_host.sh', 'run', 'other')
    assert done.returncode == 3
    assert 'another job is running on this slice: longjax forever' in (
        done.stderr)
    again = checkout.start('tpu_host.sh', 'run', 'forever', WORKER='3')
    assert 'the job is running' in again.stdout.readline()
  finally:
    done, _ = checkout.run('tpu_host.sh', 'stop')
  assert done.returncode == 0, done.stderr
  output, _ = again.communicate(timeout=30)
  assert again.returncode == 143
  assert '[worker 3] rl 1/160' in output
  assert '[worker 3] saved' in output
  assert checkout.run('tpu_host.sh', 'running')[0].returncode == 1
  assert checkout.run('tpu_host.sh', 'status')[0].stdout == '143\n'


@on_linux
def test_the_command_of_a_pod_works_on_a_host(checkout, tmp_path):
  checkout.program('python3.12', HOST_PYTHON)
  done, _ = checkout.run('tpu_pod.sh', '--dry_run', *POD, *JOB)
  commands = [x for x in done.stdout.splitlines() if x[0] != '#']
  [pack] = [x for x in commands if x.startswith('tar')]
  [ssh] = [x for x in commands if 'tpu-vm ssh' in x]
  subprocess.run(['bash', '-c', pack], check=True)
  home = tmp_path / 'host'
  home.mkdir()
  shutil.copy(checkout.tmp / 'longjax-pod.tgz', home / 'longjax.tgz')
  for _ in range(2):
    done = subprocess.run(
        ['bash', '-c', shlex.split(ssh)[-1].removeprefix('--command=')],
        cwd=home, env=checkout.environ(HOME=str(home), PYTHON='python3.12'),
        capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
  assert (home / 'longjax' / 'configs' / 'tiny.py').exists()
  log = checkout.log.read_text().splitlines()
  assert log.count('venv') == 1
  assert log[-1] == (
      '-m longjax --distributed --config=configs/tiny.py '
      '--workdir=gs://bucket/run')

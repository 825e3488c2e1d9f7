"""Tests for launch/*.sh, with stand-ins for pip, clusters and the hardware.

What the cluster scripts print with --dry_run is kept under
tests/testdata/launch. After a deliberate change of a command:

  LONGJAX_UPDATE_GOLDEN=1 python -m pytest tests/launch_test.py
"""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
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

# The next line of file $FILES/$1.
NEXT = """
next() {
  head -n 1 "$FILES/$1"
  if (($(wc -l <"$FILES/$1") > 1)); then
    tail -n +2 "$FILES/$1" >"$FILES/rest"
    mv "$FILES/rest" "$FILES/$1"
  fi
}
"""

# Stand-ins for the clusters' programs: they write down what they are asked to
# do and answer from files (`Checkout.answers`).
CLUSTER_PROGRAMS = {
    'gcloud': '#!/usr/bin/env bash' + NEXT + """
case "$*" in
  *queued-resources\\ describe*)
    echo 'describe' >>"$LOG"
    state=$(next states)
    case $state in
      NOT_FOUND) echo "ERROR: NOT_FOUND: Resource was not found." >&2 ;;
      ERROR) printf 'ERROR: you are\\nnot logged in.\\n' >&2 ;;
      *) echo "$state"; exit ;;
    esac
    exit 1
    ;;
  *queued-resources\\ create*)
    echo create >>"$LOG"
    exit "$(next creates)"
    ;;
  *queued-resources\\ delete*) echo delete >>"$LOG" ;;
  *tpu-vm\\ scp*) echo copy >>"$LOG" ;;
  *tpu_host.sh\\ status*)
    echo status >>"$LOG"
    next statuses
    ;;
  *tpu_host.sh\\ stop*)
    echo stop >>"$LOG"
    touch "$FILES/stopped"
    ;;
  *tpu_host.sh\\ run\\ *)
    all=$*
    echo "run${all##*tpu_host.sh run}" >>"$LOG"
    echo 'rl 1/160'
    code=$(next codes)
    if [[ $code == forever ]]; then
      while [[ ! -e $FILES/stopped ]]; do sleep 0.05; done
      code=143
    fi
    exit "$code"
    ;;
  *) echo "$*" >>"$LOG" ;;
esac
""",
    'xpk': """#!/usr/bin/env bash
echo "xpk $*" >>"$LOG"
exit "${XPK_CODE:-0}"
""",
    'kubectl': '#!/usr/bin/env bash' + NEXT + """
case "$*" in
  get\\ pods*phase*) next pods ;;
  get\\ pods*exitCode*) next codes ;;
  get\\ jobset*) next states ;;
  *)
    echo "kubectl $*" >>"$LOG"
    echo 'rl 1/160'
    ;;
esac
""",
    'sbatch': """#!/usr/bin/env bash
echo "sbatch $*" >>"$LOG"
echo 'Submitted batch job 17'
""",
    'srun': """#!/usr/bin/env bash
echo "srun $*" >>"$LOG"
if [[ -n ${SRUN_WAITS-} ]]; then
  trap 'echo saved >>"$LOG"; exit 143' TERM
  touch "$FILES/running"
  while true; do sleep 0.05; done
fi
exit "${SRUN_CODE:-0}"
""",
    'scontrol': """#!/usr/bin/env bash
echo "scontrol $*" >>"$LOG"
[[ $1 != show ]] || echo "JobId=17 JobState=${JOB_STATE-} Reason=None"
""",
    'curl': '#!/usr/bin/env bash\necho "${WORKER:-0}"\n',
}


class Checkout:
  """A copy of the launch scripts where installing is only written down."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.log = path / 'log'
    self.tmp = path.parent / 'tmp'
    self.tmp.mkdir()
    self.started: list[subprocess.Popen] = []
    shutil.copytree(ROOT / 'launch', path / 'launch')
    shutil.copy(ROOT / 'pyproject.toml', path)
    shutil.copytree(ROOT / 'configs', path / 'configs')
    (path / 'bin').mkdir()
    self.program('python3.12', FAKE_PYTHON)
    for name, text in CLUSTER_PROGRAMS.items():
      self.program(name, text)

  def program(self, name: str, text: str):
    (self.path / 'bin' / name).write_text(text)
    (self.path / 'bin' / name).chmod(0o755)

  def environ(self, **environ: str) -> dict[str, str]:
    """What a script runs in; an empty value takes a variable away."""
    environ = {
        'PATH': f'{self.path / "bin"}:{os.environ["PATH"]}',
        'HOME': str(self.path), 'LOG': str(self.log), 'PYTHON': 'python3.12',
        'TMPDIR': str(self.tmp), 'FILES': str(self.tmp),
        'LONGJAX_POLL_SECONDS': '0', 'LONGJAX_PLATFORM': 'cpu'} | environ
    return {name: value for name, value in environ.items() if value}

  def run(self, script: str, *arguments: str, **environ: str):
    """The exit code, and what was run since the last call."""
    self.log.write_text('')
    done = subprocess.run(
        ['bash', str(self.path / 'launch' / script), *arguments], text=True,
        env=self.environ(**environ), capture_output=True, check=False,
        timeout=60)
    return done, self.log.read_text().splitlines()

  def start(self, script: str, *arguments: str, **environ: str):
    """The same in the background."""
    self.log.write_text('')
    process = subprocess.Popen(
        ['bash', str(self.path / 'launch' / script), *arguments], text=True,
        env=self.environ(**environ), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
        # A test run in the background would hand on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    self.started.append(process)
    return process

  def kill(self):
    """Ends what a failed test left in the background."""
    for process in self.started:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

  def wait_for(self, text: str, path: pathlib.Path | None = None):
    deadline = time.monotonic() + 30
    path = path or self.log
    while not (path.exists() and text in path.read_text()):
      assert time.monotonic() < deadline, path.exists() and path.read_text()
      time.sleep(0.02)

  def answers(self, **lines: list[str]):
    """What the stand-ins give, one line a call; the last one again and again.

    `states` are those of the queued resource, `codes` the exit codes of the
    job, `statuses` what is left of it on the hosts.
    """
    for name, values in lines.items():
      (self.tmp / name).write_text(
          ''.join(f'{value}\n' for value in values))

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
  made = Checkout(path)
  yield made
  made.kill()


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


JOB = ['--', '--config=configs/tiny.py', '--workdir=gs://bucket/run']
POD = ['--name=pod', '--zone=us-east5-a', '--accelerator_type=v6e-64']
XPK = ['--name=load', '--cluster=large', '--tpu_type=v6e-64']

DRY_RUNS = {
    'tpu_pod': ['tpu_pod.sh', *POD, *JOB],
    # A word that has to be quoted, twice over.
    'tpu_pod_flags': [
        'tpu_pod.sh', '--name', 'pod', '--zone=us-east5-a', '--project=mine',
        '--accelerator-type=v5p-256', '--spot', '--keep',
        '--create_flags=--network=n --internal-ips',
        '--ssh_flags=--internal-ip', *JOB, "--config.note=it's here"],
    'tpu_pod_setup_only': ['tpu_pod.sh', *POD, '--setup_only'],
    'tpu_pod_stop': [
        'tpu_pod.sh', '--name=pod', '--zone=us-east5-a', '--stop'],
    'xpk': ['xpk.sh', *XPK, *JOB],
    'xpk_flags': [
        'xpk.sh', *XPK, '--project=mine', '--zone=us-east5-a', '--detach',
        '--docker_image=gcr.io/mine/longjax:1', '--restarts=3',
        '--xpk_flags=--priority=high', *JOB, "--config.note=it's here"],
    'slurm_gpu': [
        'slurm_gpu.sh', '--nodes=4', '--', '--config=configs/tiny.py',
        '--workdir=/shared/runs/tiny'],
    'slurm_gpu_flags': [
        'slurm_gpu.sh', '--gpus_per_node=4', '--cpus_per_gpu=12',
        '--partition=gpu', '--account=lab', '--time=24:00:00', '--name=rl',
        '--sbatch_flags=--mem=0 --constraint=h100',
        '--container=ghcr.io#mine/longjax:1', '--',
        '--config=configs/tiny.py', '--workdir=/scratch/a run'],
}


@pytest.mark.parametrize('name', DRY_RUNS)
def test_a_dry_run_prints_its_commands_and_runs_nothing(checkout, name):
  script, *arguments = DRY_RUNS[name]
  done, log = checkout.run(
      script, '--dry_run', *arguments, LONGJAX_POLL_SECONDS='')
  assert done.returncode == 0, done.stderr
  assert done.stderr == ''
  assert log == []
  assert not list(checkout.tmp.iterdir())
  path = ROOT / 'tests' / 'testdata' / 'launch' / f'{name}.txt'
  text = done.stdout.replace(str(checkout.path), '/my checkout').replace(
      str(checkout.tmp), '/tmp')
  if os.environ.get('LONGJAX_UPDATE_GOLDEN'):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
  assert text == path.read_text()


def test_a_dry_run_can_be_pasted(checkout):
  script, *arguments = DRY_RUNS['tpu_pod_flags']
  done, _ = checkout.run(script, '--dry_run', *arguments)
  [line] = [x for x in done.stdout.splitlines() if 'tpu_host.sh run' in x]
  words = shlex.split(line)
  assert words[:5] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh']
  assert words[-1].startswith('--command=')
  # What the shell of the host makes of it.
  assert shlex.split(words[-1])[-3:] == [
      '--config=configs/tiny.py', '--workdir=gs://bucket/run',
      "--config.note=it's here"]


def test_help_says_what_every_flag_does(checkout):
  for script in ('tpu_pod.sh', 'xpk.sh', 'slurm_gpu.sh'):
    done, log = checkout.run(script, '--help')
    text = (ROOT / 'launch' / script).read_text()
    valued, switches = re.search(
        r"parse_flags '([^']*)' ('[^']*'|\w+) ", text).groups()
    flags = [*valued.split(), *switches.strip("'").split(), 'dry_run']
    for flag in flags:
      assert f'--{flag}' in done.stdout, flag
    assert (done.returncode, done.stderr, log) == (0, '', [])
    assert 'SBATCH' not in done.stdout


@pytest.mark.parametrize('script, arguments, message', [
    ('tpu_pod.sh', ['--zone=z', *JOB], '--name is missing'),
    ('tpu_pod.sh', ['--name=n', '--zone=z', *JOB], '--accelerator_type is mis'),
    ('tpu_pod.sh', POD, 'no job given'),
    ('tpu_pod.sh', [*POD, '--config=configs/tiny.py'],
     "--config is no flag of this script (see --help); longjax's own flags"),
    ('tpu_pod.sh', [*POD, 'configs/tiny.py'], "unexpected argument 'configs"),
    ('tpu_pod.sh', [*POD, '--keep=no', *JOB], '--keep takes no value'),
    ('tpu_pod.sh', [*POD, '--project=', *JOB], '--project needs a value'),
    ('tpu_pod.sh', [*POD, '--project'], '--project needs a value'),
    ('tpu_pod.sh', [*POD, '--max_restarts=ten', *JOB], 'be a whole number'),
    ('tpu_pod.sh', [*POD, '--spot', '--reserved', *JOB], 'exclude each other'),
    ('tpu_pod.sh', [*POD[:2], '--accelerator_type=v5e-16', *JOB],
     'calls a v5e slice v5litepod-16'),
    ('tpu_pod.sh', [*POD[:2], '--accelerator_type=tpu7x-64', *JOB], 'xpk.sh'),
    ('tpu_pod.sh', [*POD[:2], '--accelerator_type=v9-8', *JOB],
     'name its --runtime_version'),
    ('tpu_pod.sh', [*POD, '--', '--config=configs/tiny.py', '--workdir=runs'],
     '--workdir=runs should be a gs:// directory'),
    ('tpu_pod.sh', [*POD, '--', '--config=configs/tiny.py'], 'no --workdir'),
    ('tpu_pod.sh', [*POD, '--', '--workdir=gs://b/r'], 'no --config=FILE'),
    ('tpu_pod.sh', [*POD, '--', '--config', 'configs/tinny.py:a', JOB[2]],
     'cannot read --config=configs/tinny.py in'),
    ('tpu_pod.sh', [*POD, '--', f'--config={ROOT}/configs/tiny.py', JOB[2]],
     'should be a path within the checkout'),
    ('xpk.sh', [*XPK[1:], *JOB], '--name is missing'),
    ('xpk.sh', ['--name=My_run', *XPK[1:], *JOB], 'at most 40 of a-z'),
    ('xpk.sh', [*XPK, '--docker_image=a', '--base_docker_image=b', *JOB],
     'exclude each other'),
    ('xpk.sh', [*XPK, '--', '--config=configs/tiny.py', '--workdir=/tmp/run'],
     'should be a gs:// directory'),
    ('slurm_gpu.sh', ['--nodes=two', *JOB], 'should be a whole number'),
    ('slurm_gpu.sh', ['--gpus-per-task=1', *JOB], 'no flag of this script'),
    ('slurm_gpu.sh', [], 'no job given'),
])
def test_mistakes_are_one_line_before_anything_is_rented(
    checkout, script, arguments, message):
  done, log = checkout.run(script, *arguments)
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert line.startswith('longjax: error: ')
  assert message in line
  assert log == []


@pytest.mark.parametrize('script, arguments, program', [
    ('tpu_pod.sh', [*POD, *JOB], 'gcloud'),
    ('xpk.sh', [*XPK, *JOB], 'xpk'),
    ('xpk.sh', [*XPK, *JOB], 'kubectl'),
    ('slurm_gpu.sh', JOB, 'sbatch'),
])
def test_a_missing_program_is_named(checkout, tmp_path, script, arguments,
                                    program):
  (checkout.path / 'bin' / program).unlink()
  # The rest of the machine's programs would bring a real one along.
  (tmp_path / 'few').mkdir()
  for name in ('bash', 'dirname', 'env', 'sed', 'grep'):
    (tmp_path / 'few' / name).symlink_to(shutil.which(name))
  done, log = checkout.run(
      script, *arguments, PATH=f'{checkout.path / "bin"}:{tmp_path / "few"}')
  assert done.returncode == 2
  assert f'there is no {program} on this machine' in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert log == []


def test_a_pod_is_requested_awaited_used_and_deleted(checkout):
  checkout.answers(
      states=['NOT_FOUND', 'NOT_FOUND', 'WAITING_FOR_RESOURCES',
              'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'],
      creates=['0'], codes=['0'])
  done, log = checkout.run('tpu_pod.sh', *POD, *JOB)
  assert done.returncode == 0, done.stderr
  assert [x for x in log if x != 'describe'] == [
      'create', 'copy',
      'run --distributed --config=configs/tiny.py --workdir=gs://bucket/run',
      'delete']
  lines = done.stdout.splitlines()
  # A state is said once, not at every look.
  assert lines == [
      'longjax: requesting v6e-64 as pod in us-east5-a',
      'longjax: slice pod is WAITING_FOR_RESOURCES',
      'longjax: slice pod is PROVISIONING',
      'longjax: installing on every host of pod', 'rl 1/160',
      'longjax: deleting slice pod']
  assert not list(checkout.tmp.glob('*.tgz'))


def pod_steps(log: list[str]) -> list[str]:
  return [line.partition(' ')[0] for line in log if line != 'describe']


def test_a_checkout_that_cannot_be_packed_costs_nothing(checkout):
  checkout.answers(states=['NOT_FOUND'], creates=['0'])
  done, log = checkout.run(
      'tpu_pod.sh', *POD, *JOB, TMPDIR=str(checkout.path / 'nowhere'))
  assert done.returncode == 2
  assert 'could not pack the checkout' in done.stderr
  assert 'create' not in log


def test_a_slice_that_is_there_is_used_and_kept_if_asked(checkout):
  checkout.answers(states=['ACTIVE'], codes=['0'])
  done, log = checkout.run('tpu_pod.sh', *POD, '--keep', *JOB)
  assert done.returncode == 0
  assert pod_steps(log) == ['copy', 'run']
  assert 'is billed until: gcloud compute tpus queued-resources delete' in (
      done.stdout)


def test_a_preempted_job_is_run_again_on_a_new_slice(checkout):
  checkout.answers(
      states=['ACTIVE', 'ACTIVE', 'ACTIVE', 'SUSPENDING', 'SUSPENDED',
              'NOT_FOUND', 'WAITING_FOR_RESOURCES', 'ACTIVE'],
      creates=['0'], codes=['143', '0'])
  done, log = checkout.run('tpu_pod.sh', *POD, '--spot', *JOB)
  assert done.returncode == 0, done.stderr
  assert pod_steps(log) == [
      'copy', 'run', 'delete', 'create', 'copy', 'run', 'delete']
  # The same command resumes.
  assert len({line for line in log if line.startswith('run')}) == 1
  assert 'slice pod is SUSPENDED; restart 1 of 10' in done.stdout


@pytest.mark.parametrize('code', ['1', '2', '130', '143'])
def test_the_jobs_own_exit_code_is_final(checkout, code):
  checkout.answers(states=['ACTIVE'], codes=[code], statuses=[code])
  done, log = checkout.run('tpu_pod.sh', *POD, *JOB)
  assert done.returncode == int(code)
  assert pod_steps(log).count('run') == 1
  assert log[-1] == 'delete'


def test_a_broken_connection_does_not_start_the_job_again(checkout):
  checkout.answers(
      states=['ACTIVE'], codes=['255', '255'], statuses=['running', '0'])
  done, log = checkout.run('tpu_pod.sh', *POD, *JOB)
  assert done.returncode == 0
  assert pod_steps(log) == ['copy', 'run', 'status', 'run', 'status', 'delete']
  assert 'the connection broke; the job goes on' in done.stdout


def test_restarts_come_to_an_end(checkout):
  checkout.answers(
      states=['ACTIVE'], codes=['134'], statuses=['134'])
  done, log = checkout.run('tpu_pod.sh', *POD, '--max_restarts=2', *JOB)
  assert done.returncode == 1
  assert pod_steps(log).count('run') == 3
  assert log[-1] == 'delete'
  [line] = done.stderr.splitlines()
  assert line == (
      'longjax: error: the job ended with exit code 134; gave up after 2 '
      'restarts. The same command resumes from --workdir.')


def test_a_request_that_fails_is_not_repeated_for_ever(checkout):
  checkout.answers(states=['NOT_FOUND', 'NOT_FOUND', 'FAILED'], creates=['0'])
  done, log = checkout.run('tpu_pod.sh', *POD, '--max_restarts=0', *JOB)
  assert done.returncode == 1
  assert 'slice pod is FAILED; gave up after 0 restarts' in done.stderr
  assert pod_steps(log) == ['create', 'delete']


@pytest.mark.parametrize('states, creates, message', [
    (['NOT_FOUND'], ['1'], 'gcloud could not request the slice'),
    (['ERROR'], ['0'], 'gcloud: ERROR: you are not logged in.'),
])
def test_what_gcloud_refuses_is_a_mistake_of_the_users(
    checkout, states, creates, message):
  checkout.answers(states=states, creates=creates)
  done, log = checkout.run('tpu_pod.sh', *POD, *JOB)
  assert done.returncode == 2
  assert message in done.stderr
  assert set(pod_steps(log)) <= {'create'}


def test_without_network_a_run_is_not_given_up(checkout):
  checkout.answers(
      states=['ACTIVE', 'ACTIVE', *['ERROR'] * 12, 'ACTIVE'], codes=['1'],
      statuses=['1'])
  done, log = checkout.run('tpu_pod.sh', *POD, *JOB)
  assert done.returncode == 1
  assert done.stderr.count('gcloud cannot tell how slice pod is') == 2
  assert pod_steps(log) == ['copy', 'run', 'status', 'delete']


def test_a_slice_deleted_by_hand_is_not_requested_again(checkout):
  checkout.answers(
      states=['ACTIVE', 'ACTIVE', 'NOT_FOUND'], creates=['0'], codes=['255'])
  done, log = checkout.run('tpu_pod.sh', *POD, *JOB)
  assert done.returncode == 1
  assert 'was deleted by someone else' in done.stderr
  assert 'create' not in pod_steps(log)


def test_another_job_on_the_slice_keeps_it(checkout):
  checkout.answers(states=['ACTIVE'], codes=['3'])
  done, log = checkout.run('tpu_pod.sh', *POD, *JOB)
  assert done.returncode == 2
  assert 'delete' not in pod_steps(log)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('flags, last', [([], 'delete'), (['--keep'], 'stop')])
def test_a_signal_stops_the_job_on_the_hosts(checkout, number, flags, last):
  checkout.answers(states=['ACTIVE'], codes=['forever'])
  process = checkout.start('tpu_pod.sh', *POD, *flags, *JOB)
  checkout.wait_for('run')
  process.send_signal(number)
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 128 + number, output
  log = checkout.log.read_text().splitlines()
  assert pod_steps(log) == ['copy', 'run', 'stop'] + ['delete'][:not flags]
  assert log[-1] == last


def test_a_job_left_behind_can_be_stopped(checkout):
  checkout.answers(states=['ACTIVE'])
  done, log = checkout.run('tpu_pod.sh', *POD[:2], '--stop')
  assert done.returncode == 0, done.stderr
  assert pod_steps(log) == ['stop', 'delete']
  checkout.answers(states=['NOT_FOUND'])
  done, log = checkout.run('tpu_pod.sh', *POD[:2], '--stop')
  assert done.returncode == 2
  assert 'there is no slice pod in us-east5-a' in done.stderr


# longjax on a host: it ends with $CODE, or runs until it is told to stop.
HOST_PYTHON = FAKE_PYTHON.replace("""      echo 'echo "$@" >>"$LOG"'
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


def test_a_workload_is_submitted_and_its_log_shown_over_restarts(checkout):
  checkout.answers(
      pods=['', 'load-0 Pending', 'load-0 Running', 'load-1 Running',
            'load-1 Running'],
      states=['', '', '', '', 'Completed'])
  done, log = checkout.run('xpk.sh', *XPK, *JOB)
  assert done.returncode == 0, done.stderr
  assert log[0].startswith('xpk workload create --workload=load ')
  assert log[1:] == [
      'kubectl logs load-0 --follow', 'kubectl logs load-1 --follow',
      'kubectl logs load-1 --follow --since=0s']
  assert 'restarted as load-1' in done.stdout
  assert 'to stop it:        xpk workload delete' in done.stdout
  assert not list(checkout.tmp.glob('longjax*'))


@pytest.mark.parametrize('code', ['1', '2', ''])
def test_a_failed_workload_gives_the_jobs_exit_code(checkout, code):
  checkout.answers(pods=['load-0 Failed'], states=['Failed'], codes=[code])
  done, _ = checkout.run('xpk.sh', *XPK, *JOB)
  assert done.returncode == int(code or 1)


def test_a_detached_workload_says_how_to_see_it(checkout):
  done, log = checkout.run('xpk.sh', *XPK, '--detach', *JOB)
  assert done.returncode == 0, done.stderr
  assert len(log) == 1
  for command in ('workload list', 'workload delete', 'kubectl logs --follow'):
    assert command in done.stdout


def test_a_workload_that_xpk_refuses_is_a_mistake_of_the_users(checkout):
  done, _ = checkout.run('xpk.sh', *XPK, *JOB, XPK_CODE='1')
  assert done.returncode == 2
  assert 'xpk could not create workload load' in done.stderr


def test_a_slurm_job_is_installed_and_submitted(checkout):
  done, log = checkout.run('slurm_gpu.sh', '--nodes=2', *JOB)
  assert done.returncode == 0, done.stderr
  assert checkout.installs(log) == ['[cuda,gcs]']
  assert log[-1].startswith('sbatch --job-name=longjax --chdir=')
  assert log[-1].endswith(
      '/launch/slurm_gpu.sh -- --config=configs/tiny.py '
      '--workdir=gs://bucket/run')


def slurm_job(checkout, tmp_path, **environ):
  """As sbatch runs it: a copy of the script, elsewhere."""
  copy = tmp_path / 'slurm_script'
  shutil.copy(ROOT / 'launch' / 'slurm_gpu.sh', copy)
  environ = {
      'SLURM_JOB_ID': '17', 'SLURM_JOB_NUM_NODES': '2',
      'SLURM_GPUS_ON_NODE': '4', 'SLURM_CPUS_PER_TASK': '6',
      'SLURM_SUBMIT_DIR': str(checkout.path)} | environ
  return checkout.start(str(copy), *JOB, **environ)


def test_a_slurm_job_runs_one_process_a_gpu(checkout, tmp_path):
  for code in (0, 1, 2):
    process = slurm_job(checkout, tmp_path, SRUN_CODE=str(code))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    log = checkout.log.read_text().splitlines()
    assert log[-1] == (
        'srun --nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=6 '
        f'--kill-on-bad-exit=0 --wait=600 {checkout.path}/.venv/bin/python '
        '-m longjax --distributed --config=configs/tiny.py '
        '--workdir=gs://bucket/run')


@pytest.mark.parametrize('state, is_requeued', [
    ('RUNNING', True), ('CANCELLED', False), ('PENDING', False)])
def test_a_slurm_job_saves_and_is_queued_again_only_out_of_time(
    checkout, tmp_path, state, is_requeued):
  process = slurm_job(
      checkout, tmp_path, SRUN_WAITS='1', JOB_STATE=state,
      SLURM_RESTART_COUNT='1')
  running = checkout.tmp / 'running'
  checkout.wait_for('', running)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 143, output
  assert 'resuming, restart 1' in output
  log = checkout.log.read_text().splitlines()
  assert 'saved' in log
  assert ('scontrol requeue 17' in log) == is_requeued


def test_a_slurm_job_submitted_elsewhere_says_so(checkout, tmp_path):
  process = slurm_job(checkout, tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 2
  assert output.startswith('longjax: error: submit from the checkout')


def test_slurm_reads_the_directives_before_the_first_command():
  lines = (ROOT / 'launch' / 'slurm_gpu.sh').read_text().splitlines()
  head = lines[:next(i for i, x in enumerate(lines) if not x.startswith('#'))]
  assert '#SBATCH --requeue' in head
  assert '#SBATCH --signal=B:TERM@120' in head
  assert '#SBATCH --open-mode=append' in head


def test_ci_runs_what_a_person_runs():
  text = (ROOT / '.ci' / 'run').read_text()
  assert text.splitlines()[-1] == (
      'exec bash "$(dirname "$0")/../launch/test.sh"')
  assert os.access(ROOT / '.ci' / 'run', os.X_OK)


@pytest.mark.parametrize(
    'script', sorted((ROOT / 'launch').glob('*.sh')), ids=lambda p: p.name)
def test_scripts_parse(script):
  subprocess.run(['bash', '-n', str(script)], check=True)


def test_scripts_are_clean_for_shellcheck():
  program = shutil.which('shellcheck') or shutil.which(
      'shellcheck', path=os.path.dirname(sys.executable))
  if program is None:
    pytest.skip('shellcheck comes with the dev extra')
  done = subprocess.run(
      [program, *sorted(map(str, (ROOT / 'launch').glob('*.sh')))],
      capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


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

"""Stand-ins for pip, clusters and hardware, for tests of launch/*.sh."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

ROOT = pathlib.Path(__file__).parent.parent.parent

# What scripts are called with.
JOB = ['--', '--config=configs/tiny.py', '--workdir=gs://bucket/run']
POD = ['--name=pod', '--zone=us-east5-a', '--accelerator_type=v6e-64']
XPK = ['--name=load', '--cluster=large', '--tpu_type=v6e-64']

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

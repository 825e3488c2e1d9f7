"""slurm_gpu.sh: submits itself, and is the job."""

import shutil
import signal

import pytest

from tests.launch import stand_ins

ROOT, JOB = stand_ins.ROOT, stand_ins.JOB


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

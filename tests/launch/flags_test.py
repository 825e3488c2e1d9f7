"""What the cluster scripts are asked is checked before anything is rented.

What they print with --dry_run is kept under tests/testdata/launch. After a
deliberate change of a command:

  LONGJAX_UPDATE_GOLDEN=1 python -m pytest tests/launch/flags_test.py
"""

import os
import re
import shlex
import shutil

import pytest

from tests.launch import stand_ins

ROOT = stand_ins.ROOT
JOB, POD, XPK = stand_ins.JOB, stand_ins.POD, stand_ins.XPK

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

"""tpu_pod.sh: a slice is requested, used, resumed and always given back."""

import signal

import pytest

from tests.launch import stand_ins

JOB, POD = stand_ins.JOB, stand_ins.POD


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

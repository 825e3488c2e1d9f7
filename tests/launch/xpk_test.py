"""xpk.sh: a workload is submitted and followed."""

import pytest

from tests.launch import stand_ins

JOB, XPK = stand_ins.JOB, stand_ins.XPK


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

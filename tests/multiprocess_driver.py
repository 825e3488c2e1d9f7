"""Runs the tiny recipe as two processes, again and again.

A program, not a test: reads JSON from standard input, {'config': ...,
'launches': [{'workdir': ..., 'attempts': [{...}, {...}]}, ...]}, and writes
for each launch the exit codes of processes 0 and 1, and the seconds between
their ends. The imports are paid once: each process is a fork, with four
devices, in which `longjax.main` runs as from a shell. When one of them is to
die is told as in `resume_driver`. Outputs go to {workdir}.{launch}.{id}.log.
"""

import json
import os
import signal
import socket
import sys
import time

from longjax import main, recipe
from longjax.parallel import processes
from tests import resume_driver

HEARTBEAT_TIMEOUT = 10
LONGEST_SECONDS = 1200


def start(arguments, attempt, log: str) -> int:
  """One process; its system's id."""
  if child := os.fork():
    return child
  signal.alarm(LONGEST_SECONDS)  # A test that hangs leaves nothing behind.
  opened = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
  os.dup2(opened, 1)
  os.dup2(opened, 2)
  resume_driver.install(attempt)
  sys.argv = ['longjax', *arguments]
  main.run()
  raise AssertionError('main.run exits')


def run(number: int, config: str, workdir: str, attempts):
  """One launch."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  children = {}
  for i, attempt in enumerate(attempts):
    arguments = [
        f'--config={config}', f'--workdir={workdir}', '--distributed',
        f'--coordinator={address}', f'--num_processes={len(attempts)}',
        f'--process_id={i}', f'--heartbeat_timeout={HEARTBEAT_TIMEOUT}']
    children[start(arguments, attempt, f'{workdir}.{number}.{i}.log')] = i
  codes, ends = {}, []
  while children:
    child, status = os.wait()
    codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
    ends.append(time.monotonic())
  return {'codes': [codes[i] for i in sorted(codes)],
          'seconds': ends[-1] - ends[0]}


if __name__ == '__main__':
  assert recipe and processes  # Imported once, for all processes.
  given = json.load(sys.stdin)
  json.dump([
      run(i, given['config'], launch['workdir'], launch['attempts'])
      for i, launch in enumerate(given['launches'])], sys.stdout)

"""A job run by two processes at once."""

import os
import pathlib
import socket
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments: str, num_devices: int) -> tuple[list[int], list[str]]:
  """Runs `python -m longjax` twice, as processes 0 and 1.

  Args:
    *arguments: of the command line.
    num_devices: of each process.

  Returns:
    Their exit codes, and what they wrote to standard error.
  """
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  flag = f'--xla_force_host_platform_device_count={num_devices}'
  processes = [
      subprocess.Popen(
          [sys.executable, '-m', 'longjax', *arguments, '--distributed',
           f'--coordinator={address}', '--num_processes=2',
           f'--process_id={i}'],
          cwd=_ROOT, text=True, stderr=subprocess.PIPE,
          env=os.environ | {'XLA_FLAGS': flag})
      for i in range(2)]
  try:
    told = [process.communicate(timeout=300)[1] for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [process.returncode for process in processes], told

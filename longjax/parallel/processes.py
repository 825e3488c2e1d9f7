"""Several processes become one program, and end together.

  processes.start(...)   before any use of a device
  ...                    everything else; see `multihost`
  processes.finish()     when all is done

If a process dies (killed, out of memory, its host gone), the collectives of
the others would wait for it for ever. Each process therefore asks jax's
coordination service, which lives in process 0 and receives heartbeats from
all, who is alive; when somebody is missing it says so in one line and exits
with `LOST`. No state needs saving then: the same command resumes.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
from jax._src import distributed  # Its client has no public name.

from longjax import types

# Exit code after another process was lost: none that a job has of its own, so
# that launchers know to start it again. GKE's tools restart after 42.
LOST = 42

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_CONNECT = 300
# How long processes that are done, or refused something, wait for each other.
_SECONDS_TO_FINISH = 10.0

_is_finishing = threading.Event()
_state: Any = distributed.global_state
_kept: list[Any] = []  # What libc calls and keeps no reference of.


def start(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = 30,
) -> None:
  """Connects this process with the others.

  Args:
    coordinator: HOST:PORT of process 0, a free port of it. None, here and
      below: jax finds out from Cloud TPU, Slurm, Kubernetes, Open MPI or
      JAX_COORDINATOR_ADDRESS.
    num_processes: how many there are.
    process_id: which of them this is, from 0.
    heartbeat_timeout: seconds of silence after which a process counts as lost.

  Raises:
    UserError: they cannot be found or do not all come.
  """
  if coordinator is not None and not re.fullmatch(r'.+:\d+', coordinator):
    raise types.UserError(
        f'--coordinator={coordinator} should be HOST:PORT, a free port of the '
        'host of process 0.')
  # A lost process is ours to report, and signals ours to handle
  # (`checkpoint.StopSignal`). jax would abort, and take SIGTERM for itself.
  jax.config.update('jax_enable_recoverability', True)
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
        coordinator, num_processes, process_id,
        initialization_timeout=_SECONDS_TO_CONNECT,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=int(_SECONDS_TO_FINISH))
  except (RuntimeError, ValueError, TypeError) as error:
    raise types.UserError(
        f'--distributed: the processes do not find each other ({error}); on '
        'Cloud TPU, Slurm and Kubernetes nothing need be said, elsewhere give '
        '--coordinator=HOST:PORT, --num_processes and --process_id.'
    ) from error
  _is_finishing.clear()
  _report_aborts()
  threading.Thread(
      target=_watch, name='lost processes', args=(heartbeat_timeout,),
      daemon=True).start()


def finish() -> None:
  """Waits for the others, for seconds at most, and lets go of them.

  Without it, the first process to exit would be taken for lost.
  """
  client = _state.client
  if client is None:
    return
  _is_finishing.set()
  # Whoever does not come has failed, and says so itself.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    client.wait_at_barrier(
        'longjax/finish', round(_SECONDS_TO_FINISH * 1000))
    if _state.process_id == 0:
      _wait_to_be_last(client)
  jax.distributed.shutdown()


def wait_for_loss(heartbeat_timeout: int) -> None:
  """Lets the watch end this process if another one has been lost.

  For an error that a lost process may have caused, such as a connection that
  was closed; returns if it was something else.
  """
  if _state.client is not None:
    time.sleep(heartbeat_timeout + 2 * _SECONDS_BETWEEN_LOOKS)


def fail() -> NoReturn:
  """Ends this process with the traceback of the exception being handled.

  At once: a collective that never ends would keep an ordinary exit from
  ending, and the others from seeing that this process is lost.
  """
  traceback.print_exc()
  sys.stderr.flush()
  os._exit(1)


def _wait_to_be_last(client: Any) -> None:
  """The service must outlive its clients, which abort without it."""
  everybody = list(range(_state.num_processes))
  deadline = time.monotonic() + _SECONDS_TO_FINISH
  while len(client.get_live_nodes(everybody)) > 1:
    if time.monotonic() > deadline:
      return
    time.sleep(0.01)


def _watch(heartbeat_timeout: int) -> None:
  """Ends this process when another one is lost."""
  client = _state.client
  everybody = list(range(_state.num_processes))
  while not _is_finishing.is_set():
    try:
      alive = client.get_live_nodes(everybody)
    except jax.errors.JaxRuntimeError:
      alive = {i: 0 for i in everybody if i}  # The service is in process 0.
    lost = [i for i in everybody if i not in alive]
    if lost and not _is_finishing.is_set():
      _end(lost)
    time.sleep(_SECONDS_BETWEEN_LOOKS)


def _end(lost: list[int]) -> NoReturn:
  """Says which processes were lost, and exits at once."""
  # The main thread may be inside a collective that never ends.
  names = ', '.join(map(str, lost[:8])) + (', ...' if len(lost) > 8 else '')
  noun = 'process' if len(lost) == 1 else 'processes'
  verb = 'has' if len(lost) == 1 else 'have'
  line = (
      f'longjax: {noun} {names} of {_state.num_processes} {verb} stopped or '
      f'cannot be reached, so process {_state.process_id} stops too; start the '
      'same command again in all processes to resume from the last '
      'checkpoint.\n')
  with contextlib.suppress(Exception):
    sys.stderr.flush()
  os.write(2, line.encode())
  os._exit(LOST)


def _report_aborts() -> None:
  """Says what happened when process 0 is gone.

  jax's client aborts at once when the service is cut off, which Python's own
  signal handlers would come too late for.
  """
  if _state.process_id == 0:
    return
  host, _, port = _state.coordinator_address.rpartition(':')
  address = host.strip('[]'), int(port)

  def report(number: int) -> None:
    try:
      socket.create_connection(address, timeout=5.0).close()
    except OSError:
      _end([0])
    # Something else aborts, with words of its own.
    libc.signal(number, None)

  libc = ctypes.CDLL(None)
  _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(report))
  libc.signal(signal.SIGABRT, _kept[-1])

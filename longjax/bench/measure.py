"""Clocks and gauges: seconds, CPU seconds, compile seconds, peak memory."""

import contextlib
import ctypes
import dataclasses
import gc
import pathlib
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

# What jax reports of every program it makes, in seconds.
_STAGES_OF_COMPILING = (
    '/jax/core/compile/jaxpr_trace_duration',
    '/jax/core/compile/jaxpr_to_mlir_module_duration',
    '/jax/core/compile/backend_compile_duration',
)

_STATUS = pathlib.Path('/proc/self/status')
_CLEAR = pathlib.Path('/proc/self/clear_refs')
_CLEAR_PEAK = '5'  # See `man 5 proc`.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """One timed run.

  Attributes:
    seconds: by the clock on the wall.
    cpu_seconds: of all threads of this process.
    values: what else came out, scalars by name.
  """

  seconds: float
  cpu_seconds: float
  values: Mapping[str, float] = dataclasses.field(default_factory=dict)


def timed(function: Callable[[], Any]) -> tuple[Reading, Any]:
  """Calls a function and waits for the arrays it returns."""
  start, cpu_start = time.perf_counter(), time.process_time()
  result = jax.block_until_ready(function())
  return Reading(
      seconds=time.perf_counter() - start,
      cpu_seconds=time.process_time() - cpu_start), result


def median(readings: Sequence[Reading]) -> Reading:
  """Of each number by itself; `values` are those of the last run."""
  return Reading(
      seconds=statistics.median(r.seconds for r in readings),
      cpu_seconds=statistics.median(r.cpu_seconds for r in readings),
      values=readings[-1].values)


class CompileClock:
  """Seconds jax spends on tracing, lowering and compiling inside `with`."""

  def __init__(self):
    self.seconds = 0.0

  def __enter__(self) -> 'CompileClock':
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *unused: object) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def _listen(
      self, event: str, duration_secs: float, **unused: str | int
  ) -> None:
    if event in _STAGES_OF_COMPILING:
      self.seconds += duration_secs


def reset_peak_memory() -> None:
  """Begins a new peak of the process, where the system can; see below.

  Memory that is free, such as the compiler's, is first given back.
  """
  gc.collect()
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # glibc has it.
  if trim:
    trim(0)
  with contextlib.suppress(OSError):  # Not Linux, or a container forbids it.
    _CLEAR.write_text(_CLEAR_PEAK)


def peak_memory(device: jax.Device) -> int:
  """Bytes: of an accelerator the most ever held, of a CPU the most resident.

  On Linux the resident peak is that since `reset_peak_memory`. Elsewhere, and
  on accelerators, it is that since the process began.
  """
  stats = device.memory_stats() if device.platform != 'cpu' else None
  if stats:
    return stats['peak_bytes_in_use']
  if _STATUS.exists():
    found = re.search(r'VmHWM:\s+(\d+) kB', _STATUS.read_text())
    if found:
      return int(found[1]) * 1024
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return most if sys.platform == 'darwin' else most * 1024

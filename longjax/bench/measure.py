"""Clocks: seconds, CPU seconds, compile seconds."""

import dataclasses
import statistics
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

"""Compiles the programs of the next stage while this one trains.

A stage's caps and rows give it programs of its own, and at scale each takes
the compiler minutes. They are lowered from shapes alone (`planner.programs`)
and compiled in a thread beside training; what comes out stands in the
compilation cache of the work directory, where the next stage finds it.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import logging

from longjax.planner import programs
from longjax.train import rl_stage, run_state, sft_job


def is_worthwhile() -> bool:
  """Whether the host has time to spare, and compiles alone.

  On a CPU training itself would wait for the compiler. Several processes with
  GPUs time kernels together while they compile, so that one that stops at the
  end of a stage would leave the others waiting.
  """
  backend = jax.default_backend()
  return backend == 'tpu' or (backend != 'cpu' and jax.process_count() == 1)


@contextlib.contextmanager
def compiling(
    later: Sequence[Any],
    context: run_state.Context,
    *,
    within: Callable[[Any, run_state.Context], run_state.Context],
) -> Iterator[None]:
  """Compiles for the next stage that trains, while the body runs.

  Args:
    later: the stages after this one.
    context: of the run.
    within: gives the context of a stage.
  """
  training = [s for s in later if isinstance(
      s, rl_stage.RlStage | sft_job.SupervisedConfig)]
  if not training or not is_worthwhile():
    yield
    return
  is_over = threading.Event()
  thread = threading.Thread(
      target=_compile,
      args=(training[0], within(training[0], context), is_over),
      name='compile ahead', daemon=True)
  thread.start()
  try:
    yield
    # The program in work is finished: the next stage waits for it anyhow. A
    # run that is stopped does not, it has little time left.
    is_over.set()
    thread.join()
  finally:
    is_over.set()


def _compile(
    stage: rl_stage.RlStage | sft_job.SupervisedConfig,
    context: run_state.Context,
    is_over: threading.Event,
) -> None:
  """Compiles one program after the other, until none is left or it is over."""
  shapes = programs.Shapes(
      stage=stage, model=context.model, rules=context.rules,
      compute=context.compute, stop_ids=context.tokenizer.stop_ids)
  try:
    for name, of_rows in programs.of_all_rows(shapes):
      if is_over.is_set():
        return
      with context.compute.matmul_precision():
        jitted, arguments = programs.PROGRAMS[name](of_rows)
        jitted.lower(*arguments).compile()
  except Exception:  # Training goes on; it will meet the error itself.
    logging.exception('Compiling the next stage ahead failed.')

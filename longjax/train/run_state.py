"""Everything a restart needs: `RunState`, its checkpoints, the stage loop.

A run is a list of stages; those that train share one loop. After a kill the
newest checkpoint is restored, records past it are forgotten, and the run
repeats the steps it lost bit for bit: every random number is a function of
(seed, stage, step, prompt, sample), and the data iterator's state is saved. (A
judge's verdict is no random number; those of a server are kept in a file.)

A step that is cut between sampling and update is sampled again from the same
parameters and keys, so its rollouts need no place in the checkpoint; those
that one step leaves to the next (`partial`) have one.
"""

import collections
import contextlib
import dataclasses
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from flax import struct

from longjax import types
from longjax.data import prompt_stats as prompt_stats_lib
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib
from longjax.rl import entropy_control
from longjax.train import checkpoint, partial, progress
from longjax.train import metrics as metrics_lib
from longjax.train import state as state_lib


@struct.dataclass
class RunState:
  """What changes while a run goes on.

  Attributes:
    train: parameters, moments, counters of the current stage.
    aepo: mode and baseline of the entropy controller; fresh at every stage.
    carried: responses to go on with, on the host; None if the stage never
      leaves any.
    prompt_stats: what the stage has seen of every prompt, on the host; None
      before its first step, and if it samples none.
  """

  train: state_lib.TrainState
  aepo: entropy_control.AepoState
  carried: partial.Carried | None = None
  prompt_stats: prompt_stats_lib.PromptStats | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
  """What stays the same while a run goes on.

  Attributes:
    workdir: everything the run leaves behind but its checkpoints.
    publish: brings `workdir` to the store it is a copy of, see `mirror`.
    seed: of all randomness.
    rules: mesh, and logical axes to mesh axes.
    tokenizer: of the model.
    model: sizes of the network.
    compute: backends, dtype, remat.
    checkpoint_every: steps between checkpoints.
    max_skipped_in_a_row: so many non-finite steps in a row stop the run.
    metrics: writes numbers.
    rollouts: writes texts to read.
    checkpointer: saves `RunState`.
    stop: set by SIGTERM and SIGINT.
  """

  workdir: pathlib.Path
  publish: Callable[[], None] = lambda: None
  seed: int
  rules: rules_lib.Rules
  tokenizer: tokenizer_lib.Tokenizer
  model: architecture.ModelConfig
  compute: compute_lib.Compute
  checkpoint_every: int
  max_skipped_in_a_row: int
  metrics: metrics_lib.MetricsWriter
  rollouts: metrics_lib.RolloutWriter
  checkpointer: checkpoint.Checkpointer
  stop: checkpoint.StopSignal

  def key(self, stage: str) -> jax.Array:  # key[]
    """The PRNG key of a stage."""
    return jax.random.fold_in(
        jax.random.key(self.seed), zlib.crc32(stage.encode()))

  def check_stop(self, where: str) -> None:
    """Raises `Stopped` if a signal came, where there is nothing to save.

    All processes call it at the same places.
    """
    if self.stop.agree_now():
      raise Stopped(f'stopped {where}')

  def close(self) -> None:
    """Closes the writers."""
    # All they hold is on disk by now but TensorBoard's copy: a full disk must
    # not take the place of the error that is being reported.
    with contextlib.suppress(OSError):
      self.metrics.close()
    with contextlib.suppress(OSError):
      self.rollouts.close()


class Stopped(Exception):
  """The run was asked to stop, and nothing is lost; says where it stands."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
  """Where a run stands; saved beside the arrays.

  Attributes:
    stage: name of the stage that is training.
    stage_step: its steps done.
    global_step: steps done by all stages; numbers checkpoints and metrics.
    data: state of the stage's data iterator; of reinforcement learning, which
      has none, 'num_examples'.
  """

  stage: str
  stage_step: int
  global_step: int
  data: Any = None


def fresh(
    params: types.Params,
    optimizer: optax.GradientTransformation,
    context: Context,
    *,
    carried: partial.Carried | None = None,
    moments: Any = None,
) -> RunState:
  """The state at the start of a stage: all is reset but what is given.

  Args:
    params: the policy.
    optimizer: of the stage.
    context: of the stage; arrays are brought to its mesh.
    carried: responses to go on with.
    moments: the optimizer's state of the stage before, to go on with.
  """
  return RunState(
      train=state_lib.create(
          params, context.model, optimizer, context.rules, moments=moments),
      aepo=multihost.put(entropy_control.init(), context.rules.sharding()),
      carried=carried)


def abstract(
    optimizer: optax.GradientTransformation,
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    *,
    carried: partial.Carried | None = None,
    prompt_stats: prompt_stats_lib.PromptStats | None = None,
) -> RunState:
  """Shapes and shardings to restore into; of what is on the host, examples."""
  replicated = rules.sharding()
  return RunState(
      train=state_lib.abstract(model, optimizer, rules),
      aepo=jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(
              x.shape, x.dtype, sharding=replicated),
          jax.eval_shape(entropy_control.init)),
      carried=carried, prompt_stats=prompt_stats)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
  """What one step of a stage hands to the loop.

  Attributes:
    state: after the step.
    values: its metrics, scalars by name.
    num_tokens: tokens the step computed, for the rate.
  """

  state: RunState
  values: Mapping[str, Any]
  num_tokens: int


def run_stage(
    context: Context,
    state: RunState,
    place: Place,
    *,
    num_steps: int,
    step: Callable[[RunState, int, int], StepResult],
    data_state: Callable[[], Any],
    line: Callable[[int, int, Mapping[str, float]], str],
    num_in_flight: int = 0,
) -> tuple[RunState, Place]:
  """Trains from `place` to the end of the stage.

  Args:
    context: of the run.
    state: where to begin.
    place: where that is.
    num_steps: steps of the whole stage.
    step: (state, step in the stage, global step) -> result; its first
      argument is donated.
    data_state: `Place.data` now, ready for JSON.
    line: (step, num_steps, metrics) -> what to print.
    num_in_flight: steps that may still be computing while the next one is
      dispatched; for steps that would otherwise let the devices wait for the
      host. Whatever a checkpoint covers is written before it.

  Returns:
    State and place at the end of the stage, saved.

  Raises:
    Stopped: a signal came; the state is saved.
    UserError: too many non-finite steps in a row; the last good state stays.
  """
  first_global = place.global_step - place.stage_step
  with progress.Progress(
      num_steps, description=place.stage, unit='step',
      start=place.stage_step) as bar:
    recorder = _Recorder(context, bar, num_steps=num_steps, line=line)
    for stage_step in range(place.stage_step, num_steps):
      global_step = first_global + stage_step + 1
      result = step(state, stage_step, global_step)
      state = result.state
      place = Place(
          stage=place.stage, stage_step=stage_step + 1,
          global_step=global_step, data=data_state())
      recorder.add(place, result)
      is_last = place.stage_step == num_steps
      is_stopped = context.stop.agree()
      if is_last or is_stopped or (
          place.stage_step % context.checkpoint_every == 0):
        recorder.flush(0)
        save(context, state, place)
      else:
        recorder.flush(num_in_flight)
      if is_stopped and not is_last:
        context.checkpointer.wait()
        raise Stopped(f'saved at step {place.stage_step} of {place.stage}')
  return state, place


class _Recorder:
  """Writes the metrics of steps, some steps after they were dispatched."""

  def __init__(
      self,
      context: Context,
      bar: progress.Progress,
      *,
      num_steps: int,
      line: Callable[[int, int, Mapping[str, float]], str],
  ):
    self._context = context
    self._bar = bar
    self._num_steps = num_steps
    self._line = line
    self._waiting: collections.deque[
        tuple[Place, Mapping[str, Any], int]] = collections.deque()
    self._last = time.perf_counter()

  def add(self, place: Place, result: StepResult) -> None:
    """Takes the metrics of a step, which may still be computing."""
    self._waiting.append((place, result.values, result.num_tokens))

  def flush(self, most: int) -> None:
    """Writes until at most `most` steps wait; the oldest first."""
    while len(self._waiting) > most:
      self._write(*self._waiting.popleft())

  def _write(
      self, place: Place, results: Mapping[str, Any], num_tokens: int
  ) -> None:
    values = {k: np.asarray(v).item()
              for k, v in jax.device_get(dict(results)).items()}
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    values['time/step_seconds'] = seconds
    values['time/tokens_per_second'] = num_tokens / seconds
    self._context.metrics.write(place.global_step, place.stage, values)
    self._bar.log_step(self._line(place.stage_step, self._num_steps, values))
    self._bar.advance()
    _check_finite(self._context, values, place)


def save(context: Context, state: RunState, place: Place) -> None:
  """Begins to write a checkpoint; training goes on meanwhile."""
  context.publish()  # Records that a checkpoint covers are stored before it.
  context.checkpointer.save(
      place.global_step, state, dataclasses.asdict(place))


def _check_finite(
    context: Context, values: Mapping[str, float], place: Place
) -> None:
  in_a_row = int(values['skipped_in_a_row'])
  if not in_a_row:
    return
  logging.warning(
      'Step %d of %s: the loss or its gradient is not finite; step skipped '
      '(%d in a row).', place.stage_step, place.stage, in_a_row)
  if in_a_row >= context.max_skipped_in_a_row:
    raise types.UserError(
        f'stage {place.stage} stopped at step {place.stage_step}: '
        f'{in_a_row} steps in a row had a loss or gradient that is not finite '
        f'(max_skipped_in_a_row={context.max_skipped_in_a_row}); lower '
        'the learning rate or look at the data of these steps.')

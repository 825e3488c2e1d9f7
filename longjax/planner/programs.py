"""The programs of a stage, lowered from shapes alone and compiled for a slice.

They are the ones that training runs: `step.make_update`, `step.make_score` and
those of the sampler (`rollout.shapes`): `fill` (prefill), `resume` and `write`
(decode). Arguments are shapes with shardings; there is no array and no device.

P prompts, G samples per prompt, S prompt tokens, R response tokens, B rows, T
tokens of a row, N = P * G responses.
"""

import contextlib
import dataclasses
import functools
import re
import time
import types as python_types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from longjax import rows, types
from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import rules as rules_lib
from longjax.planner import layout
from longjax.planner import memory as memory_lib
from longjax.rollout import shapes as sampler_shapes
from longjax.train import optimizer as optimizer_lib
from longjax.train import rl_job, rl_stage, sft_job
from longjax.train import state as state_lib
from longjax.train import step as step_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
  """What the compiler says of a program; bytes are those of one device.

  Attributes:
    arguments: bytes of arguments.
    outputs: bytes of results that do not take an argument's place.
    temporaries: bytes in between.
    peak: bytes at the worst moment.
    host: bytes of temporaries in host memory.
    beside: bytes of state that wait on the device meanwhile.
    seconds: of compilation, lowering included.
    cpu_seconds: the same of all cores together.
    error: why there is no program. `temporaries` is then what the compiler says
      they would take, 0 if it does not say, and `peak` 0.
  """

  arguments: int = 0
  outputs: int = 0
  temporaries: int = 0
  peak: int = 0
  host: int = 0
  beside: int = 0
  seconds: float = 0.0
  cpu_seconds: float = 0.0
  error: str = ''

  @property
  def needed(self) -> int:
    """Bytes at the worst moment, with what waits on the device meanwhile.

    0 if the program was refused and the compiler does not say why.
    """
    if not self.error:
      return self.peak + self.beside
    if not self.temporaries:
      return 0
    return self.arguments + self.temporaries + self.beside


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
  """What the programs of a stage are compiled for.

  Attributes:
    stage: its configuration.
    model: sizes of the network.
    rules: logical axes to mesh axes.
    compute: backends, dtype, remat.
    row_len: T of rows; 0 means the longest.
    stop_ids: of the sampler; which they are changes neither memory nor speed.
  """

  stage: layout.Stage
  model: architecture.ModelConfig
  rules: rules_lib.Rules
  compute: compute_lib.Compute
  row_len: int = 0
  stop_ids: tuple[int, ...] = (0, 1)

  @property
  def context(self) -> Any:
    """The part of `run_state.Context` that losses read."""
    return python_types.SimpleNamespace(
        model=self.model, rules=self.rules, compute=self.compute)

  def array(self, shape: tuple[int, ...], dtype: Any, *logical: str | None):
    """An argument, placed as training places it."""
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=self.rules.sharding(*logical))

  def rows(self) -> rows.Rows:
    """A micro-batch, [B, T]."""
    shape = (layout.rows_at_once(self.stage, self.rules),
             self.row_len or layout.row_lens(self.stage)[-1])
    made = jax.tree.map(
        lambda x: self.array(shape, x.dtype, 'batch', 'seq'), rows.empty(1, 1))
    if getattr(self.stage, 'replay_experts', False):
      assert self.model.moe is not None
      made = made.replace(expert_ids=self.array(
          (*shape, self.model.num_layers, self.model.moe.num_active),
          self.model.moe.id_dtype, 'batch', 'seq', None, None))
    return made


def optimizer(stage: layout.Stage) -> optax.GradientTransformation:
  """Of a stage; its schedule changes neither shapes nor speed."""
  return optimizer_lib.make(stage.optimizer, num_steps=stage.steps)


def update(shapes: Shapes) -> sampler_shapes.Program:
  """The gradient of a micro-batch, added to what others gave.

  It holds what the step has to hold at once but the moments; what comes after
  it, the optimizer's own program, needs no activations.
  """
  stage = shapes.stage
  loss: Any
  if isinstance(stage, rl_stage.RlStage):
    num_responses = stage.num_prompts * stage.num_samples
    by_token = shapes.array(
        (num_responses, stage.trajectory_len), jnp.float32)
    extras = {
        'advantages': shapes.array((num_responses,), jnp.float32),
        'token_weights': by_token, 'sampler_logprobs': by_token}
    if stage.loss.objective == 'off_policy':
      extras['old_logprobs'] = by_token
    loss = functools.partial(
        rl_job.loss, stage=stage, context=shapes.context)
  else:
    loss = functools.partial(sft_job.loss, context=shapes.context)
    extras = {'num_tokens': shapes.array((), jnp.float32)}
  gradient_transformation = optimizer(stage)
  programs = step_lib.make_update(
      loss, gradient_transformation, config=shapes.model, rules=shapes.rules)
  params, made = _params(shapes), shapes.rows()
  started = jax.eval_shape(programs.start, params, made, extras)

  def summed(like):  # Loss and metrics are whole on every device.
    return jax.tree.map(lambda x: shapes.array(x.shape, x.dtype), like)

  total = step_lib.Total(
      gradients=params, loss=summed(started.loss),
      metrics=summed(started.metrics))
  return programs.accumulate, (params, total, made, extras)


def score(shapes: Shapes) -> sampler_shapes.Program:
  """Log-probabilities and entropies of a micro-batch."""
  stage = shapes.stage
  assert isinstance(stage, rl_stage.RlStage)
  jitted = step_lib.make_score(
      config=shapes.model, temperature=stage.sampler.temperature,
      rules=shapes.rules, compute=shapes.compute)
  return jitted, (_params(shapes), shapes.rows())


def _of_sampler(shapes: Shapes, make: Callable[..., Any]) -> Any:
  stage = shapes.stage
  assert isinstance(stage, rl_stage.RlStage)
  return make(layout.sampler(
      stage, shapes.model, shapes.rules, shapes.compute,
      stop_ids=shapes.stop_ids), stage.engine)


def prefill(shapes: Shapes) -> sampler_shapes.Program:
  """A chunk of as many prompts as are read at once."""
  return _of_sampler(shapes, sampler_shapes.fill)


def resume(shapes: Shapes) -> sampler_shapes.Program:
  """What samples of an earlier step had written, one of each shard."""
  return _of_sampler(shapes, sampler_shapes.resume)


def decode(shapes: Shapes) -> sampler_shapes.Program:
  """Many tokens of every sample that is written at once."""
  return _of_sampler(shapes, sampler_shapes.write)


PROGRAMS: dict[layout.Name, Callable[[Shapes], sampler_shapes.Program]] = {
    'prefill': prefill,
    'resume': resume,
    'decode': decode,
    'score': score,
    'update': update,
}


def names(stage: layout.Stage) -> tuple[layout.Name, ...]:
  """The programs of a stage, in the order a step runs them."""
  if not isinstance(stage, rl_stage.RlStage):
    return ('update',)
  names = list(PROGRAMS)
  if not stage.is_cut:
    names.remove('resume')
  if not stage.is_scored:
    names.remove('score')
  return tuple(names)


def of_all_rows(shapes: Shapes) -> Iterator[tuple[layout.Name, Shapes]]:
  """Each program at each length of rows that it is compiled for."""
  for name in names(shapes.stage):
    row_lens = layout.row_lens(shapes.stage) if (
        name in ('score', 'update')) else (0,)
    for row_len in row_lens:
      yield name, dataclasses.replace(shapes, row_len=row_len)


def _params(shapes: Shapes) -> types.Params:
  return state_lib.abstract(
      shapes.model, optimizer(shapes.stage), shapes.rules).params


def compile_facts(
    name: layout.Name, shapes: Shapes, *, is_optimized: bool
) -> Facts:
  """Compiles one program.

  Args:
    name: which.
    shapes: of what.
    is_optimized: whether the compiler optimises as for a run; without, it
      takes a fraction of the time, and memory comes out within the margin.

  Raises:
    UserError: shapes and mesh do not go together.
  """
  start, cpu_start = time.perf_counter(), time.process_time()
  state = state_lib.abstract(
      shapes.model, optimizer(shapes.stage), shapes.rules)
  # Gradients and scores are formed from parameters only, the sampler has
  # copies of them.
  if name in ('update', 'score'):
    beside = memory_lib.of_tree(state.opt_state)
  else:
    beside = memory_lib.of_tree(state)
  if isinstance(shapes.stage, rl_stage.RlStage) and (
      shapes.stage.judge.mode == 'inprocess'):
    beside += memory_lib.of_tree(state.params)
  if name == 'prefill':
    _, slots = _of_sampler(shapes, sampler_shapes.caches)
    beside += memory_lib.of_tree(slots)
  with shapes.compute.matmul_precision():
    jitted, arguments = PROGRAMS[name](shapes)
    lowered = jitted.lower(*arguments)
  with _optimization(is_optimized):
    try:
      memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
      return Facts(
          arguments=memory_lib.of_tree(arguments), beside=beside,
          temporaries=_wanted(str(error)), error=_first_line(str(error)),
          seconds=time.perf_counter() - start,
          cpu_seconds=time.process_time() - cpu_start)
  return Facts(
      arguments=memory.argument_size_in_bytes,
      outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      peak=memory.peak_memory_in_bytes, host=memory.host_temp_size_in_bytes,
      beside=beside, seconds=time.perf_counter() - start,
      cpu_seconds=time.process_time() - cpu_start)


@contextlib.contextmanager
def _optimization(is_optimized: bool) -> Iterator[None]:
  """The compiler's effort for what is compiled inside."""
  before = jax.config.values['jax_optimization_level']
  if not is_optimized:
    jax.config.update('jax_optimization_level', 'O0')
  try:
    yield
  finally:
    jax.config.update('jax_optimization_level', before)


def _wanted(message: str) -> int:
  """Bytes of temporaries that a refused program would need, 0 if not said."""
  found = re.search(r'([\d.]+)([KMGT])\)? exceeds available HBM', message)
  if found is None:
    return 0
  return int(float(found[1]) * 1024 ** ('KMGT'.index(found[2]) + 1))


def _first_line(message: str) -> str:
  return ' '.join(message.partition('\n')[0].split())

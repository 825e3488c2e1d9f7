"""Supervised stages: pretraining on synthetic streams, and SFT.

Both minimise the cross-entropy of `targets` where `loss_mask` is True; they
differ by the stream of groups they read.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longjax import reductions, rows, types
from longjax.agents import demonstrations
from longjax.agents import memory as memory_lib
from longjax.data import packing, pipeline
from longjax.data import tokenizer as tokenizer_lib
from longjax.parallel import mesh as mesh_lib
from longjax.parallel import token_order
from longjax.rl import loss as loss_lib
from longjax.synthesis import pretraining
from longjax.train import optimizer as optimizer_lib
from longjax.train import progress, run_state
from longjax.train import step as step_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
  """What pretraining and SFT share.

  Attributes:
    start: name of the stage whose policy this one begins with, 'base' for the
      run's; '' goes on from the stage before.
    seed: added to the run's, for stages that repeat each other.
    mesh: devices along each axis while it trains; None takes the run's.
    steps: optimizer steps.
    num_rows: B, rows of a batch.
    row_len: T, tokens of a row.
    rows_at_once: rows of a micro-batch; 0 means all.
    optimizer: see there.
  """

  start: str = ''
  seed: int = 0
  mesh: mesh_lib.MeshConfig | None = None
  steps: int
  num_rows: int
  row_len: int
  rows_at_once: int = 0
  optimizer: optimizer_lib.OptimizerConfig

  def __post_init__(self):
    for name in ('steps', 'num_rows', 'row_len'):
      if getattr(self, name) < 1:
        raise types.UserError(f'{name}={getattr(self, name)} must be >= 1.')
    if self.rows_at_once < 0 or self.num_rows % (self.rows_at_once or 1):
      raise types.UserError(
          f'rows_at_once={self.rows_at_once} must be 0 or divide '
          f'num_rows={self.num_rows}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainStage(SupervisedConfig):
  """Pretraining on text made by `synthesis.pretraining`.

  Attributes:
    job: marks the kind of stage.
    text: what is read.
  """

  job: Literal['pretrain'] = 'pretrain'
  text: pretraining.PretrainingConfig

  def __post_init__(self):
    super().__post_init__()
    if self.text.min_len > self.row_len:
      raise types.UserError(
          f'text.min_len={self.text.min_len} is more than '
          f'row_len={self.row_len}; lower it or use longer rows.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftStage(SupervisedConfig):
  """Fine-tuning on demonstrations of the data set's split `split`.

  Attributes:
    job: marks the kind of stage.
    split: of the data set.
    reasoning_fraction: share of demonstrations that think before answering.
    memory: of the memory agent whose turns are demonstrated as well; None
      demonstrates none.
    memory_fraction: share of examples of which a turn is demonstrated.
    memory_tasks: whose examples these may be; none means those of all tasks.
    lookahead: see `pipeline.SftDataConfig`.
  """

  job: Literal['sft'] = 'sft'
  split: str = 'sft'
  reasoning_fraction: float = 1.0
  memory: memory_lib.MemoryConfig | None = None
  memory_fraction: float = 0.5
  memory_tasks: tuple[str, ...] = ()
  lookahead: int = 16

  def __post_init__(self):
    super().__post_init__()
    if not 0.0 <= self.memory_fraction <= 1.0:
      raise types.UserError(
          f'memory_fraction={self.memory_fraction} must be in [0, 1].')
    self.data(seed=0)  # Its checks, before anything runs.

  def data(self, *, seed: int) -> pipeline.SftDataConfig:
    """What its batches look like."""
    return pipeline.SftDataConfig(
        num_rows=self.num_rows, row_len=self.row_len,
        reasoning_fraction=self.reasoning_fraction, lookahead=self.lookahead,
        seed=seed)


@struct.dataclass
class SupervisedMetrics:
  """Mean entropy of the trained tokens' distributions, nats."""

  entropy: reductions.Average

  def __add__(self, other: 'SupervisedMetrics') -> 'SupervisedMetrics':
    return SupervisedMetrics(entropy=self.entropy + other.entropy)

  def summary(self) -> dict[str, jax.Array]:  # f32[] each
    """Means by name."""
    return {'entropy': self.entropy.mean()}


def loss(
    params: types.Params,
    batch: rows.Rows,
    extras: Mapping[str, jax.Array],
    *,
    context: run_state.Context,
):
  """Cross-entropy over the batch's one token count; see `step.Loss`."""
  scores = step_lib.token_scores(
      params, batch, config=context.model, temperature=1.0,
      rules=context.rules, compute=context.compute)
  nll = loss_lib.cross_entropy(
      logprobs=scores.head.logprobs, loss_mask=batch.loss_mask)
  metrics = SupervisedMetrics(
      entropy=reductions.average(scores.head.entropy, batch.loss_mask))
  return (nll.total / extras['num_tokens'],
          step_lib.with_routing(metrics, scores.routing))


def check(stage: SupervisedConfig, context: run_state.Context) -> None:
  """Refuses batches and rows that do not divide over the mesh."""
  token_order.check_len('row_len', stage.row_len, context.rules.size('seq'))
  shards = context.rules.size('batch')
  # Those of a micro-batch divide the others.
  name = 'rows_at_once' if stage.rows_at_once else 'num_rows'
  if getattr(stage, name) % shards:
    raise types.UserError(
        f'{name}={getattr(stage, name)} does not divide over the {shards} data '
        f'shards of mesh {dict(context.rules.mesh.shape)}; use a multiple of '
        f'{shards}.')


def batches(
    stage: PretrainStage | SftStage,
    context: run_state.Context,
    examples: Sequence[types.TaskExample] | None,
) -> grain.IterDataset:
  """The stage's endless stream of rows."""
  if isinstance(stage, PretrainStage):
    return packing.pack_groups(
        pretraining.groups(
            context.tokenizer, config=stage.text, row_len=stage.row_len,
            seed=context.seed),
        num_rows=stage.num_rows, row_len=stage.row_len)
  assert examples is not None
  return pipeline.sft_batches(
      examples, context.tokenizer, config=stage.data(seed=context.seed),
      demonstrate=_demonstrate(stage, context.tokenizer))


def _demonstrate(
    stage: SftStage, tokenizer: tokenizer_lib.Tokenizer
) -> pipeline.Demonstrate | None:
  """Answers and turns of the memory agent; None if there are only answers."""
  if stage.memory is None:
    return None
  agent = memory_lib.MemoryAgent(tokenizer, stage.memory)

  def demonstrate(
      example: types.TaskExample, rng: np.random.Generator
  ) -> tuple[list[int], list[int]]:
    with_reasoning = rng.random() < stage.reasoning_fraction
    is_turn = rng.random() < stage.memory_fraction
    if is_turn and example.task in (stage.memory_tasks or (example.task,)):
      return demonstrations.turn(
          example, agent, tokenizer, rng, with_reasoning=with_reasoning)
    return pipeline.answer(
        example, tokenizer, with_reasoning=with_reasoning)

  return demonstrate


def run(
    context: run_state.Context,
    stage: PretrainStage | SftStage,
    state: run_state.RunState,
    place: run_state.Place,
    *,
    examples: Sequence[types.TaskExample] | None,
) -> tuple[run_state.RunState, run_state.Place]:
  """Trains one supervised stage.

  Args:
    context: of the run.
    stage: its configuration.
    state: where to begin.
    place: where that is.
    examples: the demonstrations; None for pretraining.

  Returns:
    State and place at its end.
  """
  check(stage, context)

  def stage_loss(params, batch, extras):
    return loss(params, batch, extras, context=context)

  update = step_lib.make_update(
      stage_loss,
      optimizer_lib.make(stage.optimizer, num_steps=stage.steps),
      config=context.model, rules=context.rules)
  # Makes the next batch while this one is computed; its state is that of the
  # batches handed out.
  iterator = iter(grain.experimental.ThreadPrefetchIterDataset(
      batches(stage, context, examples), prefetch_buffer_size=1))
  if place.data is not None:
    iterator.set_state(place.data)

  def step(state, stage_step, global_step):
    del stage_step, global_step
    batch = next(iterator)
    num_tokens = int((batch.meta.group >= 0).sum())
    extras = {'num_tokens': jnp.float32(max(batch.loss_mask.sum(), 1))}
    train, values = update(
        state.train,
        rows.split(batch, stage.rows_at_once or stage.num_rows), extras, True)
    padding = 1.0 - num_tokens / batch.tokens.size
    return run_state.StepResult(
        state=state.replace(train=train), num_tokens=num_tokens,
        values=values | {'padding': padding})

  with contextlib.closing(iterator):
    return run_state.run_stage(
        context, state, place, num_steps=stage.steps, step=step,
        data_state=iterator.get_state, num_in_flight=1,
        line=functools.partial(progress.sft_line, name=place.stage))

"""What a step of reinforcement learning trains on: prompts and responses.

P prompts, G rollouts per prompt, N = P * G responses in prompt-major order, R
response tokens.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

from longjax import rows, types
from longjax.agents import rounds
from longjax.data import dataset, prompts, task_balance
from longjax.parallel import multihost
from longjax.rl import batch
from longjax.rollout import engine as engine_lib
from longjax.train import partial, rl_stage, run_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
  """Rollouts of a step, on the host.

  Attributes:
    prompts: P.
    rollouts: NumPy, [P, G, R]; groups carried over to the next step are empty.
      Of several turns, R counts through the tokens of all of them.
    texts: N, what is graded: the response, or the last of several.
    groups: what stands in rows, prompt by prompt.
    metrics: of the sampler, scalars by name.
    carried: what is left to the next step; None if nothing ever is.
    turns: all that were taken; none if every response is one turn.
  """

  prompts: Sequence[types.Prompt]
  rollouts: types.Rollouts
  texts: Sequence[str]
  groups: Sequence[Sequence[rows.Group]]
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
  carried: partial.Carried | None = None
  turns: Sequence[rounds.Turn] = ()


class Sampler(Protocol):
  """Draws a step's prompts and writes the responses to them.

  Attributes:
    engine: what writes.
  """

  engine: engine_lib.Engine

  def __call__(
      self, params: types.Params, stage_step: int,
      carried: partial.Carried | None = None,
  ) -> Sampled:
    """Samples.

    Args:
      params: the policy.
      stage_step: the number of the step.
      carried: what the step before left; None if none ever does.
    """


class OneTurn:
  """A `Sampler` whose responses are one turn each."""

  def __init__(
      self,
      context: run_state.Context,
      stage: rl_stage.RlStage,
      *,
      examples: dataset.Examples,
      balance: task_balance.TaskBalancedSampler,
      name: str,
  ):
    """Prepares a stage.

    Args:
      context: of the run.
      stage: its configuration.
      examples: what prompts are made of.
      balance: which of them each step asks.
      name: of the stage; its samples depend on it.
    """
    self._context = context
    self._stage = stage
    self._examples = examples
    self._balance = balance
    self._name = name
    self.engine = engine(stage, context)

  def __call__(
      self, params: types.Params, stage_step: int,
      carried: partial.Carried | None = None,
  ) -> Sampled:
    """See `Sampler`."""
    stage, context = self._stage, self._context
    drawn = self._draw(stage_step, carried)
    chosen = [
        prompts.to_prompt(
            self._examples[int(i)], context.tokenizer,
            max_len=stage.max_prompt_len) for i in drawn.example]
    born = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        context.key(self._name), drawn.born)
    session = self.engine.session(params)
    rollouts = session.sample(
        chosen, engine_lib.prompt_keys(born, chosen),
        num_samples=stage.num_samples, begun=drawn.begun,
        should_cut=self._cut(drawn))
    metrics = session.stats.metrics()
    if carried is not None:
      rollouts, carried = partial.split(drawn, rollouts)
      metrics |= partial.metrics(drawn, rollouts)
    return Sampled(
        prompts=chosen, rollouts=rollouts,
        texts=[engine_lib.response_text(context.tokenizer, rollouts, p, g)
               for p, g in np.ndindex(*rollouts.lengths.shape)],
        groups=batch.groups(chosen, rollouts), metrics=metrics,
        carried=carried)

  def _draw(
      self, stage_step: int, carried: partial.Carried | None
  ) -> partial.Drawn:
    """The prompts of a step."""
    if carried is None:
      example = self._balance.batch(stage_step)
      return partial.Drawn(
          example=example, born=np.full(example.size, stage_step))

    def stream(place: int) -> int:
      step, index = divmod(place, self._stage.num_prompts)
      # A batch lists task by task; a part of it should have of all.
      rng = np.random.default_rng((self._context.seed, step))
      return int(rng.permutation(self._balance.batch(step))[index])

    return partial.draw(carried, stage_step, stream)

  def _cut(self, drawn: partial.Drawn) -> Callable[[types.Rollouts], bool]:
    """Whether enough is written; see `RlStage.cut_tokens`."""
    stage, start = self._stage, time.monotonic()

    def is_late() -> bool:
      return time.monotonic() - start >= stage.cut_seconds

    def should_cut(rollouts: types.Rollouts) -> bool:
      if not stage.is_cut or not partial.is_complete(rollouts).any():
        return False
      num_new = int(rollouts.lengths.sum()) - drawn.num_begun
      if 0 < stage.cut_tokens <= num_new:
        return True
      return stage.cut_seconds > 0 and multihost.on_primary(is_late)

    return should_cut


def engine(
    stage: rl_stage.RlStage, context: run_state.Context
) -> engine_lib.Engine:
  """What writes in a stage."""
  return engine_lib.Engine(
      model=context.model, sampler=stage.sampler, engine=stage.engine,
      stop_ids=context.tokenizer.stop_ids, rules=context.rules,
      compute=context.compute, record_experts=stage.replay_experts)

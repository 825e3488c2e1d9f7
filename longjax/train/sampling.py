"""What a step of reinforcement learning trains on: prompts and responses.

P prompts, G rollouts per prompt, N = P * G responses in prompt-major order, R
response tokens.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from longjax import rows, types
from longjax.agents import rounds
from longjax.data import prompts, task_balance
from longjax.parallel import multihost
from longjax.rl import batch
from longjax.rollout import engine as engine_lib
from longjax.train import partial, rl_stage, run_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
  """Rollouts of a step, on the host.

  Attributes:
    prompts: P.
    example: i[P] index of each prompt's example.
    rollouts: NumPy, [P, G, R]; groups carried over to the next step are empty.
      Of several turns, R counts through the tokens of all of them.
    texts: N, what is graded: the response, or the last of several.
    groups: what stands in rows, prompt by prompt.
    metrics: of the sampler, scalars by name.
    carried: what is left to the next step; None if nothing ever is.
    turns: all that were taken; none if every response is one turn.
  """

  prompts: Sequence[types.Prompt]
  example: np.ndarray
  rollouts: types.Rollouts
  texts: Sequence[str]
  groups: Sequence[Sequence[rows.Group]]
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
  carried: partial.Carried | None = None
  turns: Sequence[rounds.Turn] = ()


class Submit(Protocol):
  """Takes a response to grade; `reward.grading.Grader.submit` is one."""

  def __call__(
      self, key: tuple[int, int], example: types.TaskExample, text: str, *,
      is_finished: bool,
  ) -> None:
    """Begins to grade response `key`, (prompt, sample); does not wait."""


class Sampler(Protocol):
  """Draws a step's prompts and writes the responses to them.

  Attributes:
    engine: what writes.
  """

  engine: engine_lib.Engine

  def __call__(
      self, params: types.Params, stage_step: int,
      carried: partial.Carried | None = None,
      *, submit: Submit,
  ) -> Sampled:
    """Samples.

    Args:
      params: the policy.
      stage_step: the number of the step.
      carried: what the step before left; None if none ever does.
      submit: called with each response as soon as it has ended; also with
        those that are carried over to the next step, which calls it again.
    """


class OneTurn:
  """A `Sampler` whose responses are one turn each."""

  def __init__(
      self,
      context: run_state.Context,
      stage: rl_stage.RlStage,
      *,
      examples: Sequence[types.TaskExample],
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
      *, submit: Submit,
  ) -> Sampled:
    """See `Sampler`."""
    stage, context = self._stage, self._context
    drawn = self._draw(stage_step, carried)
    chosen = [
        prompts.to_prompt(
            self._examples[int(i)], context.tokenizer,
            max_len=stage.max_prompt_len) for i in drawn.example]
    born = engine_lib.fold_in(context.key(self._name), drawn.born)
    texts: dict[tuple[int, int], str] = {}

    def on_end(rollouts: types.Rollouts, p: int, g: int) -> None:
      text = engine_lib.response_text(context.tokenizer, rollouts, p, g)
      texts[p, g] = text
      submit((p, g), chosen[p].example, text,
             is_finished=bool(rollouts.is_finished[p, g]))

    session = self.engine.session(params)
    rollouts = session.sample(
        chosen, engine_lib.prompt_keys(born, chosen),
        num_samples=stage.num_samples, begun=drawn.begun,
        should_cut=self._cut(drawn), on_end=on_end)
    metrics = session.stats.metrics()
    if carried is not None:
      rollouts, carried = partial.split(drawn, rollouts)
      metrics |= partial.metrics(drawn, rollouts)
    return Sampled(
        prompts=chosen, example=drawn.example, rollouts=rollouts,
        texts=[texts[p, g] if length else ''
               for (p, g), length in np.ndenumerate(rollouts.lengths)],
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

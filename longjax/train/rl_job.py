"""Reinforcement learning: sample, grade, decide, update.

  prompts   --sampling-->        rollouts    G responses each, prefilled once
  rollouts  --reward.grading-->  scores      meanwhile, as responses end
  scores    --graded-->          rewards     f32[N], of what is trained on
  rows      --score-->           old log-probabilities, entropies
  all       --rl.batch.plan-->   advantages, AEPO decision, token weights
  rows      --update-->          a better policy

Shapes: P prompts, G rollouts per prompt, N = P * G responses, R response
tokens, B rows, T positions.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longjax import rows, types
from longjax.data import prompt_stats, task_balance
from longjax.parallel import multihost
from longjax.reward import grading
from longjax.reward import judge as judge_lib
from longjax.rl import batch, entropy_control, overlong
from longjax.rl import loss as loss_lib
from longjax.train import graded as graded_lib
from longjax.train import (
  kept_rollouts,
  memory_sampling,
  partial,
  progress,
  rl_stage,
  run_state,
  sampling,
)
from longjax.train import optimizer as optimizer_lib
from longjax.train import step as step_lib

PROMPT_STATS_FOLDER = 'prompt_stats'

Score = Callable[..., types.Score]


def loss(
    params: types.Params,
    packed: rows.Rows,
    extras: Mapping[str, jax.Array],
    *,
    stage: rl_stage.RlStage,
    context: run_state.Context,
):
  """The policy-gradient loss of some rows; see `step.Loss`.

  `extras` holds arrays by response: advantages f32[N], token_weights,
  sampler_logprobs and, off policy, old_logprobs f32[N, R].
  """
  scores = step_lib.token_scores(
      params, packed, config=context.model,
      temperature=stage.sampler.temperature, rules=context.rules,
      compute=context.compute)

  def of_token(values):  # f32[N, R] -> f32[B, T]
    return values[packed.trajectory, packed.response_index]

  old_logprobs = extras.get('old_logprobs')
  output = loss_lib.policy_gradient_loss(
      logprobs=scores.head.logprobs,
      old_logprobs=None if old_logprobs is None else of_token(old_logprobs),
      sampler_logprobs=of_token(extras['sampler_logprobs']),
      advantages=extras['advantages'][packed.trajectory],
      weights=of_token(extras['token_weights']),
      loss_mask=packed.loss_mask,
      objective=stage.loss.objective, eps_low=stage.loss.eps_low,
      eps_high=stage.loss.eps_high, dual_clip=stage.loss.dual_clip,
      tis_cap=stage.loss.tis_cap)
  return output.loss, step_lib.with_routing(output.metrics, scores.routing)


def _stratum(example: types.TaskExample) -> tuple[str, bool]:
  """Whose rewards share a deviation: a task's, dense ones apart from 0 or 1."""
  return example.task, example.kind == 'mrcr'


class RlJob:
  """The compiled programs and data of one stage; `step` is the recipe.

  Attributes:
    engine: what writes.
    ids: of the examples.
  """

  def __init__(
      self,
      context: run_state.Context,
      stage: rl_stage.RlStage,
      *,
      examples: Sequence[types.TaskExample],
      score: Score,
      judge: judge_lib.Judge | None = None,
      name: str = 'rl',
  ):
    """Prepares a stage.

    Args:
      context: of the run.
      stage: its configuration.
      examples: what prompts are made of.
      score: the rules: (example, response text, is_finished=) -> Score.
      judge: who is asked where they find no match; its owner closes it.
      name: of the stage; its samples depend on it.
    """
    rl_stage.check(stage, context)
    self._context = context
    self._name = name
    self._stage = stage
    self._make_grader = functools.partial(
        grading.Grader, judge=judge, score=score)
    # Reads all once.
    of_example = [(example.id, _stratum(example)) for example in examples]
    self.ids = [name for name, _ in of_example]
    strata = [stratum for _, stratum in of_example]
    self._strata = sorted(set(strata))
    task_of = [task for task, _ in strata]
    self._tasks = sorted(set(task_of))
    sampler = (
        sampling.OneTurn if stage.memory is None
        else memory_sampling.MemoryTurns)
    self._sample: sampling.Sampler = sampler(
        context, stage, examples=examples, name=name,
        balance=task_balance.TaskBalancedSampler(
            task_of if stage.task_balanced else [''] * len(task_of),
            batch_size=stage.num_asked, seed=context.seed))
    self.engine = self._sample.engine

    def stage_loss(params, packed, extras):
      return loss(params, packed, extras, stage=stage, context=context)

    self._update = step_lib.make_update(
        stage_loss,
        optimizer_lib.make(
            stage.optimizer, num_steps=(
                stage.steps * stage.num_minibatches * stage.num_epochs)),
        config=context.model, rules=context.rules)
    self._score_rows = step_lib.make_score(
        config=context.model, temperature=stage.sampler.temperature,
        rules=context.rules, compute=context.compute)

  def step(
      self, state: run_state.RunState, stage_step: int, global_step: int
  ) -> run_state.StepResult:
    """One batch: rollouts, grades, the AEPO decision, the update(s)."""
    stage, context = self._stage, self._context
    asked = self.rollout(state.train.params, stage_step, state.carried)
    stats = self._seen(state.prompt_stats, asked)
    graded = graded_lib.to_train(
        asked, stage, seed=context.seed, step=stage_step)
    packed = self._minibatches(graded)
    entropy, entropy_t1, old_logprobs = self._measure(
        state.train.params, graded, packed)
    plan = self.plan(state.aepo, graded, entropy, entropy_t1)
    extras = {
        'advantages': plan.advantages,
        'token_weights': plan.token_weights,
        'sampler_logprobs': _by_response(graded.sampled.rollouts.logprobs),
    }
    if stage.loss.objective == 'off_policy':
      extras['old_logprobs'] = old_logprobs

    train = state.train
    values: dict[str, Any] = {}
    in_a_row = []
    for _ in range(stage.num_epochs):
      for part, is_applied in zip(packed, plan.is_applied, strict=True):
        train, values = self._update(
            train, part.micro_batches, extras, is_applied)
        in_a_row.append(values['skipped_in_a_row'])
    if stage_step % stage.rollouts_every == 0 or stage_step == stage.steps - 1:
      kept_rollouts.write(
          context, graded, plan, asked=asked, name=self._name,
          tasks=self._tasks, turn=stage_step // stage.rollouts_every,
          global_step=global_step)
    entropy_control.check_baseline(plan.aepo, stage.aepo)
    # Of several updates the last one's values are logged, but a bad one
    # before it must not go unseen.
    values['skipped_in_a_row'] = functools.reduce(jnp.maximum, in_a_row)
    return run_state.StepResult(
        state=run_state.RunState(
            train=train, aepo=plan.aepo, carried=graded.sampled.carried,
            prompt_stats=stats),
        values=(plan.metrics | values | graded_lib.sampled_metrics(asked)
                | graded_lib.entropy_metrics(graded, entropy)
                | dict(asked.metrics) | dict(graded.metrics)
                | dict(graded.sampled.metrics) | prompt_stats.metrics(stats)
                | {'aepo/skipped_steps': jnp.sum(~plan.is_applied)}
                | batch.padding(packed)),
        num_tokens=stage.num_epochs * sum(p.num_needed for p in packed))

  def rollout(
      self,
      params: types.Params,
      stage_step: int,
      carried: partial.Carried | None = None,
  ) -> graded_lib.Graded:
    """Samples and grades the responses of a step; see `sampling.Sampler`."""
    grader = self._make_grader()
    sampled = self._sample(params, stage_step, carried, submit=grader.submit)
    lengths = sampled.rollouts.lengths
    grades = grader.collect(list(map(tuple, np.argwhere(lengths > 0).tolist())))
    scores = [grades.scores.get(key) for key in np.ndindex(*lengths.shape)]
    return graded_lib.Graded(
        sampled=sampled, scores=scores, metrics=grades.metrics,
        rewards=np.asarray(
            [s.reward if s else 0.0 for s in scores], np.float32))

  def plan(
      self,
      aepo: entropy_control.AepoState,
      graded: graded_lib.Graded,
      entropy: np.ndarray,  # f32[N, R]
      entropy_t1: np.ndarray,  # f32[N, R]
  ) -> batch.Plan:
    """Advantages, the AEPO decision and token weights of a batch."""
    stage = self._stage
    num_prompts, num_samples = graded.sampled.rollouts.lengths.shape
    stat_ids = [
        self._strata.index(_stratum(p.example)) for p in graded.sampled.prompts]
    return batch.plan(
        aepo,
        rewards=jnp.asarray(graded.rewards),
        lengths=jnp.asarray(graded.lengths),
        group_ids=jnp.repeat(jnp.arange(num_prompts), num_samples),
        stat_ids=jnp.repeat(jnp.asarray(stat_ids), num_samples),
        entropy=jnp.asarray(entropy), entropy_t1=jnp.asarray(entropy_t1),
        keep=overlong.keep(
            jnp.asarray(graded.lengths), jnp.asarray(graded.is_finished),
            config=stage.overlong),
        num_groups=num_prompts, num_stats=len(self._strata),
        num_minibatches=stage.num_minibatches,
        advantage_config=stage.advantage, aepo_config=stage.aepo,
        clip_config=stage.clip, loss_norm=stage.loss.loss_norm)

  def _measure(
      self, params: types.Params, graded: graded_lib.Graded,
      packed: Sequence[batch.Packed],
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entropies (at the temperature, at 1) and log-probabilities, [N, R]."""
    rollouts = graded.sampled.rollouts
    # What an older policy began was not drawn from this one.
    is_current = not graded.sampled.metrics.get('partial/old_tokens')
    if self._stage.entropy_source == 'sampler' and is_current:
      return (_by_response(rollouts.entropy),
              _by_response(rollouts.entropy_t1),
              _by_response(rollouts.logprobs))
    micro_batches = [made for part in packed for made in part.micro_batches]
    scores = multihost.to_host([
        self._score_rows(params, step_lib.put_rows(made, self._context.rules))
        for made in micro_batches])
    num_responses, max_len = rollouts.lengths.size, rollouts.tokens.shape[2]

    def by_response(name):
      return batch.unpack(
          [getattr(s, name) for s in scores], micro_batches,
          num_responses=num_responses, max_response_len=max_len)

    return (by_response('entropy'), by_response('entropy_t1'),
            by_response('logprobs'))

  def _seen(
      self, stats: prompt_stats.PromptStats | None, asked: graded_lib.Graded
  ) -> prompt_stats.PromptStats:
    """What is known of prompts after a step."""
    shape = asked.sampled.rollouts.lengths.shape
    return prompt_stats.update(
        stats or prompt_stats.nothing(len(self.ids)),
        examples=asked.sampled.example, rewards=asked.rewards.reshape(shape),
        lengths=asked.lengths.reshape(shape),
        is_finished=asked.is_finished.reshape(shape))

  def _minibatches(self, graded: graded_lib.Graded) -> list[batch.Packed]:
    """Rows of each optimizer batch, in order."""
    stage = self._stage
    groups = graded.sampled.groups
    size = len(groups) // stage.num_minibatches
    return [
        batch.pack_groups(
            list(itertools.chain(*groups[start:start + size])),
            row_lens=stage.row_lens,
            num_rows=rl_stage.rows_at_once(stage, self._context.rules))
        for start in range(0, len(groups), size)]


def _by_response(values: jax.Array) -> np.ndarray:
  """[P, G, R] -> [N, R]."""
  return np.asarray(values).reshape(-1, values.shape[-1])


def run(
    context: run_state.Context,
    stage: rl_stage.RlStage,
    state: run_state.RunState,
    place: run_state.Place,
    *,
    examples: Sequence[types.TaskExample],
    score: Score,
    judge: judge_lib.Judge | None = None,
) -> tuple[run_state.RunState, run_state.Place]:
  """Trains one stage of reinforcement learning; see `run_state.run_stage`.

  At its end WORKDIR/prompt_stats/STAGE.jsonl says how each prompt went.
  """
  job = RlJob(
      context, stage, examples=examples, score=score, judge=judge,
      name=place.stage)
  state, place = run_state.run_stage(
      context, state, place, num_steps=stage.steps, step=job.step,
      # What a restart has to know of the examples.
      data_state=lambda: {'num_examples': len(examples)},
      line=functools.partial(progress.rl_line, name=place.stage))
  path = context.workdir / PROMPT_STATS_FOLDER / f'{place.stage}.jsonl'
  stats = state.prompt_stats
  assert stats is not None
  multihost.on_primary(lambda: prompt_stats.write(path, stats, job.ids))
  context.publish()
  return state, place

"""Reinforcement learning: sample, grade, decide, update.

  prompts   --sampling-->        rollouts    G responses each, prefilled once
  rollouts  --reward.hybrid-->   rewards     f32[N]
  rows      --score-->           old log-probabilities, entropies
  all       --rl.batch.plan-->   advantages, AEPO decision, token weights
  rows      --update-->          a better policy

Shapes: P prompts, G rollouts per prompt, N = P * G responses, R response
tokens, B rows, T positions.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longjax import rows, types
from longjax.data import dataset, task_balance
from longjax.parallel import multihost
from longjax.rl import batch, entropy_control
from longjax.rl import loss as loss_lib
from longjax.train import (
  memory_sampling,
  partial,
  progress,
  rl_stage,
  run_state,
  sampling,
)
from longjax.train import metrics as metrics_lib
from longjax.train import optimizer as optimizer_lib
from longjax.train import step as step_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graded:
  """Rollouts and their grades, on the host.

  Attributes:
    sampled: the rollouts.
    scores: N; None of what is carried over.
    rewards: f32[N], what is trained on.
  """

  sampled: sampling.Sampled
  scores: list[types.Score | None]
  rewards: np.ndarray


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
  """The compiled programs and data of one stage; `step` is the recipe."""

  def __init__(
      self,
      context: run_state.Context,
      stage: rl_stage.RlStage,
      *,
      examples: dataset.Examples,
      score: Score,
      name: str = 'rl',
  ):
    """Prepares a stage.

    Args:
      context: of the run.
      stage: its configuration.
      examples: what prompts are made of.
      score: grades (example, response text, is_finished=) -> Score.
      name: of the stage; its samples depend on it.
    """
    rl_stage.check(stage, context)
    self._context = context
    self._name = name
    self._stage = stage
    self._score_response = score
    strata = [_stratum(example) for example in examples]  # Reads all once.
    self._strata = sorted(set(strata))
    task_of = [task for task, _ in strata]
    self._tasks = sorted(set(task_of))
    sampler = (
        sampling.OneTurn if stage.memory is None
        else memory_sampling.MemoryTurns)
    self._sample: sampling.Sampler = sampler(
        context, stage, examples=examples, name=name,
        balance=task_balance.TaskBalancedSampler(
            task_of, batch_size=stage.num_prompts, seed=context.seed))
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
    stage = self._stage
    graded = self.rollout(state.train.params, stage_step, state.carried)
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
      self._write_rollouts(graded, plan, global_step, stage_step)
    entropy_control.check_baseline(plan.aepo, stage.aepo)
    # Of several updates the last one's values are logged, but a bad one
    # before it must not go unseen.
    values['skipped_in_a_row'] = functools.reduce(jnp.maximum, in_a_row)
    return run_state.StepResult(
        state=run_state.RunState(
            train=train, aepo=plan.aepo, carried=graded.sampled.carried),
        values=(plan.metrics | values | self._task_metrics(graded, entropy)
                | dict(graded.sampled.metrics)
                | {'aepo/skipped_steps': jnp.sum(~plan.is_applied)}
                | batch.padding(packed)),
        num_tokens=stage.num_epochs * sum(p.num_needed for p in packed))

  def rollout(
      self,
      params: types.Params,
      stage_step: int,
      carried: partial.Carried | None = None,
  ) -> Graded:
    """Samples and grades the responses of a step; see `sampling.Sampler`."""
    sampled = self._sample(params, stage_step, carried)
    rollouts, num_samples = sampled.rollouts, self._stage.num_samples
    scores = [
        self._score_response(
            sampled.prompts[i // num_samples].example, text,
            is_finished=bool(is_finished)) if length else None
        for i, (text, length, is_finished) in enumerate(zip(
            sampled.texts, rollouts.lengths.reshape(-1),
            rollouts.is_finished.reshape(-1), strict=True))]
    rewards = np.asarray([s.reward if s else 0.0 for s in scores], np.float32)
    if self._stage.shuffle_rewards:
      rng = np.random.default_rng((self._context.seed, stage_step))
      is_trained = rollouts.lengths.reshape(-1) > 0
      rewards[is_trained] = rng.permutation(rewards[is_trained])
    return Graded(sampled=sampled, scores=scores, rewards=rewards)

  def plan(
      self,
      aepo: entropy_control.AepoState,
      graded: Graded,
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
        lengths=jnp.asarray(graded.sampled.rollouts.lengths.reshape(-1)),
        group_ids=jnp.repeat(jnp.arange(num_prompts), num_samples),
        stat_ids=jnp.repeat(jnp.asarray(stat_ids), num_samples),
        entropy=jnp.asarray(entropy), entropy_t1=jnp.asarray(entropy_t1),
        num_groups=num_prompts, num_stats=len(self._strata),
        num_minibatches=stage.num_minibatches,
        advantage_config=stage.advantage, aepo_config=stage.aepo,
        clip_config=stage.clip, loss_norm=stage.loss.loss_norm)

  def _measure(
      self, params: types.Params, graded: Graded,
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

  def _minibatches(self, graded: Graded) -> list[batch.Packed]:
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

  def _task_metrics(
      self,
      graded: Graded,
      entropy: np.ndarray,  # f32[N, R]
  ) -> dict[str, float]:
    """Mean reward and entropy by task, and how responses ended."""
    rollouts, asked = graded.sampled.rollouts, graded.sampled.prompts
    lengths = rollouts.lengths
    is_trained = lengths.reshape(-1) > 0
    rewards = np.asarray([s.reward for s in graded.scores if s])
    # Values past a response's end are 0.
    entropies = (entropy.sum(axis=1)[is_trained]
                 / lengths.reshape(-1)[is_trained])
    tasks = np.repeat(
        [p.example.task for p in asked], lengths.shape[1])[is_trained]
    present = [t for t in self._tasks if (tasks == t).any()]
    by_task = {f'reward/{t}': rewards[tasks == t].mean() for t in present}
    return by_task | {
        f'entropy_by_task/{t}': entropies[tasks == t].mean() for t in present
    } | {
        'reward/mean': np.mean(list(by_task.values())),
        'length/truncated': (
            1.0 - rollouts.is_finished[lengths > 0].mean()),
    }

  def _write_rollouts(
      self, graded: Graded, plan: batch.Plan, global_step: int,
      stage_step: int,
  ) -> None:
    """Keeps all responses to one prompt, tasks taking turns."""
    turn = stage_step // self._stage.rollouts_every
    num_tasks = len(self._tasks)

    def places_off(p: int) -> int:
      task = self._tasks.index(graded.sampled.prompts[p].example.task)
      return (task - turn) % num_tasks

    # A batch of fewer prompts than tasks may lack the one whose turn it is.
    trained = np.flatnonzero(graded.sampled.rollouts.lengths.any(axis=1))
    p = min(trained.tolist(), key=places_off)
    num_samples = graded.sampled.rollouts.lengths.shape[1]
    advantages, keep = jax.device_get((plan.advantages, plan.keep))
    samples = []
    for g in range(num_samples):
      i, length = p * num_samples + g, graded.sampled.rollouts.lengths[p, g]
      score = graded.scores[i]
      assert score is not None
      samples.append(metrics_lib.Sample(
          text=graded.sampled.texts[i], score=score,
          advantage=float(advantages[i]), length=int(length),
          entropy=float(graded.sampled.rollouts.entropy[p, g].sum() / length),
          is_finished=bool(graded.sampled.rollouts.is_finished[p, g]),
          is_kept=bool(keep[i])))
    prompt = graded.sampled.prompts[p]
    self._context.rollouts.write(
        global_step, self._name, prompt.example, samples,
        prompt_text=self._context.tokenizer.decode(prompt.tokens))


def _by_response(values: jax.Array) -> np.ndarray:
  """[P, G, R] -> [N, R]."""
  return np.asarray(values).reshape(-1, values.shape[-1])


def run(
    context: run_state.Context,
    stage: rl_stage.RlStage,
    state: run_state.RunState,
    place: run_state.Place,
    *,
    examples: dataset.Examples,
    score: Score,
) -> tuple[run_state.RunState, run_state.Place]:
  """Trains one stage of reinforcement learning; see `run_state.run_stage`."""
  job = RlJob(
      context, stage, examples=examples, score=score, name=place.stage)
  return run_state.run_stage(
      context, state, place, num_steps=stage.steps, step=job.step,
      data_state=lambda: None,
      line=functools.partial(progress.rl_line, name=place.stage))

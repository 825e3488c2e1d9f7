"""The gradients stage: how entropy goes with the size of the gradient.

AEPO takes a failed response's entropy for how much its gradient would move the
policy (QwenLong-L1.5, arXiv:2512.12967, Sec. 4.4). This stage samples as a
stage of reinforcement learning would, trains nothing, and finds for each
response its mean entropy and how large its gradient is:

  by the logits      mean over tokens of |d log p_a / d z| =
                     sqrt(1 - 2 p_a + sum_v p_v^2), in closed form
  by the parameters  |d mean_t log p_a / d theta|, of some failed responses

A response fails if its reward is below the mean of its group, by more than
rounding.

Shapes: N responses, R response tokens, B rows, T positions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from longjax import rows as rows_lib
from longjax import types
from longjax.parallel import multihost
from longjax.rl import batch
from longjax.train import graded as graded_lib
from longjax.train import progress, rl_job, rl_stage, run_state, sampling
from longjax.train import step as step_lib

# A reward is below its group's mean by more than rounding.
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientStage:
  """What is sampled and measured.

  Attributes:
    job: marks the kind of stage.
    rl: how prompts are drawn and answered; `steps` batches of them.
    num_exact: failed responses of which the gradient with respect to all
      parameters is computed, the first ones.
  """

  job: Literal['gradients'] = 'gradients'
  rl: rl_stage.RlStage
  num_exact: int = 32

  def __post_init__(self):
    if self.num_exact < 0:
      raise types.UserError(
          f'gradients.num_exact={self.num_exact} must be >= 0.')
    if self.rl.memory is not None or self.rl.is_cut:
      raise types.UserError(
          'gradients.rl.memory and cut steps do not go with job=gradients, '
          'which looks at whole responses; leave them out.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """What was found.

  Attributes:
    responses: id, task, reward, is_failed, length, entropy (mean, nats),
      logit_norm and parameter_norm (None where it was not computed) of each.
    tokens: f32[2, n] entropy and logit norm of each token of failed responses.
  """

  responses: Sequence[Mapping[str, Any]]
  tokens: np.ndarray


def run(
    stage: GradientStage,
    name: str,
    context: run_state.Context,
    params: types.Params,
    *,
    examples: Sequence[types.TaskExample],
    score: rl_job.Score,
) -> Measured:
  """Measures one policy.

  Args:
    stage: its configuration.
    name: of the stage; samples depend on it.
    context: of the run.
    params: the policy.
    examples: what prompts are made of.
    score: the rules.
  """
  job = rl_job.RlJob(
      context, stage.rl, examples=examples, score=score, name=name)
  probe = _Probe(stage, context, params)
  with progress.Progress(
      stage.rl.steps, description=name, unit='step') as bar:
    for number in range(stage.rl.steps):
      context.check_stop(f'during {name}')
      probe.add(job.rollout(params, number))
      bar.advance()
  return Measured(
      responses=probe.responses,
      tokens=np.concatenate([np.zeros((2, 0)), *probe.tokens], axis=1))


class _Probe:
  """Looks at batches of responses of one policy.

  Attributes:
    responses: see `Measured`.
    tokens: f32[2, R] of each failed response.
  """

  def __init__(
      self,
      stage: GradientStage,
      context: run_state.Context,
      params: types.Params,
  ):
    self.responses: list[dict[str, Any]] = []
    self.tokens: list[np.ndarray] = []
    self._stage = stage
    self._context = context
    self._params = params
    self._at_temperature = [
        step_lib.make_score(
            config=context.model, temperature=temperature, rules=context.rules,
            compute=context.compute) for temperature in (1.0, 0.5)]
    self._parameter_norm = _parameter_norm(context)
    self._num_exact = 0

  def add(self, graded: graded_lib.Graded) -> None:
    """Measures a batch."""
    sampled = graded.sampled
    num_prompts, num_samples = sampled.rollouts.lengths.shape
    entropy, norm = self._by_token(graded)
    grouped = graded.rewards.reshape(num_prompts, num_samples)
    is_failed = (grouped < grouped.mean(1, keepdims=True) - _EPSILON).ravel()
    for i in np.flatnonzero(graded.lengths).tolist():
      length = int(graded.lengths[i])
      example = sampled.prompts[i // num_samples].example
      found = dict(
          id=example.id, task=example.task, reward=float(graded.rewards[i]),
          is_failed=bool(is_failed[i]), length=length,
          entropy=float(entropy[i, :length].mean()),
          logit_norm=float(norm[i, :length].mean()), parameter_norm=None)
      if is_failed[i]:
        self.tokens.append(np.stack([entropy[i, :length], norm[i, :length]]))
        if self._num_exact < self._stage.num_exact:
          self._num_exact += 1
          found['parameter_norm'] = float(multihost.to_host(
              self._parameter_norm(self._params, self._alone(sampled, i))))
      self.responses.append(found)

  def _by_token(
      self, graded: graded_lib.Graded
  ) -> tuple[np.ndarray, np.ndarray]:
    """Entropy (nats) and |d log p_a / d z| of every token; f32[N, R] each.

    With log p at temperatures 1 and 1/2, 2 log p_1(a) - log p_2(a) is the
    logarithm of sum_v p_v^2: no logits need be kept.
    """
    rollouts = graded.sampled.rollouts
    micro_batches = batch.pack(
        graded.sampled.prompts, rollouts, row_lens=self._stage.rl.row_lens,
        num_rows=rl_stage.rows_at_once(
            self._stage.rl, self._context.rules)).micro_batches
    one, half = (multihost.to_host([
        score(self._params, step_lib.put_rows(made, self._context.rules))
        for made in micro_batches]) for score in self._at_temperature)

    def by_response(scores, name):
      return batch.unpack(
          [getattr(s, name) for s in scores], micro_batches,
          num_responses=graded.lengths.size,
          max_response_len=rollouts.tokens.shape[2])

    logprobs = by_response(one, 'logprobs')
    collision = np.exp(2 * logprobs - by_response(half, 'logprobs'))
    squared = 1 - 2 * np.exp(logprobs) + collision
    return by_response(one, 'entropy'), np.sqrt(np.maximum(squared, 0.0))

  def _alone(self, sampled: sampling.Sampled, index: int) -> rows_lib.Rows:
    """Rows with one response only."""
    (group,) = sampled.groups[index // sampled.rollouts.lengths.shape[1]]
    branch = next(b for b in group.branches if b.trajectory == index)
    (made,) = batch.pack_groups(
        [dataclasses.replace(group, branches=[branch])],
        row_lens=self._stage.rl.row_lens,
        num_rows=self._context.rules.size('batch')).micro_batches
    return step_lib.put_rows(made, self._context.rules)


def _parameter_norm(
    context: run_state.Context,
) -> Callable[[types.Params, rows_lib.Rows], jax.Array]:
  """Compiles the norm f32[] of the gradient of the mean log-probability."""

  def mean_logprob(params, batch):
    scores = step_lib.token_scores(
        params, batch, config=context.model, temperature=1.0,
        rules=context.rules, compute=context.compute).head
    kept = jnp.where(batch.loss_mask, scores.logprobs, 0.0)
    return jnp.sum(kept) / jnp.sum(batch.loss_mask)

  return jax.jit(lambda params, batch: optax.global_norm(
      jax.grad(mean_logprob)(params, batch)))

"""From the graded responses of a step to those that are trained on.

  Sampled  --reward.grading-->  Graded, all that was sampled, raw rewards
  Graded   --to_train-->        Graded, what is trained on, shaped rewards

In between groups are chosen (`data.dynamic_sampling`), mixed over mini-batches,
and rewards are shaped (`rl.overlong`).

Shapes: Q prompts sampled, P prompts trained on, G rollouts per prompt, N
responses in prompt-major order, R response tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longjax import rows, types
from longjax.data import dynamic_sampling
from longjax.rl import overlong
from longjax.train import rl_stage, sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graded:
  """Rollouts and their grades, on the host.

  Attributes:
    sampled: the rollouts.
    scores: N, as they were given; None of what has no place in the batch:
      carried over, or of a group that only fills its place.
    rewards: f32[N] of the scores; or of these made, what is trained on.
    metrics: of grading or of the choice, scalars by name.
  """

  sampled: sampling.Sampled
  scores: Sequence[types.Score | None]
  rewards: np.ndarray
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def lengths(self) -> np.ndarray:  # i32[N]
    """Of the responses in tokens."""
    return np.asarray(self.sampled.rollouts.lengths).reshape(-1)

  @property
  def is_finished(self) -> np.ndarray:  # bool[N]
    """Whether each ended with a stop token."""
    return np.asarray(self.sampled.rollouts.is_finished).reshape(-1)

  @property
  def tasks(self) -> np.ndarray:  # object[N]
    """Of each response's prompt."""
    num_samples = self.sampled.rollouts.lengths.shape[1]
    return np.repeat(np.asarray(
        [p.example.task for p in self.sampled.prompts], object), num_samples)


def to_train(
    graded: Graded, stage: rl_stage.RlStage, *, seed: int, step: int
) -> Graded:
  """Chooses, mixes and shapes.

  A batch is listed task by task. One that is cut into mini-batches is
  permuted, or each of them would be of one task or two.

  Args:
    graded: all that was sampled.
    stage: says how.
    seed: of the run.
    step: of the stage; with the seed all that chance depends on.
  """
  metrics: dict[str, float] = {}
  if stage.oversample > 1:
    choice = dynamic_sampling.choose_groups(
        graded.rewards.reshape(-1, stage.num_samples),
        graded.lengths.reshape(-1, stage.num_samples),
        [p.example.task for p in graded.sampled.prompts],
        num_prompts=stage.num_prompts, turn=step)
    graded = _take(graded, choice.groups, choice.is_varying)
    metrics |= choice.metrics()
  elif stage.num_minibatches > 1:
    rng = np.random.default_rng((seed, step, stage.num_minibatches))
    order = rng.permutation(stage.num_prompts)
    graded = _take(graded, order, np.ones(order.shape, bool))

  is_trained = graded.lengths > 0
  rewards = np.array(overlong.shaped_rewards(
      jnp.asarray(graded.rewards), jnp.asarray(graded.lengths),
      config=stage.overlong,
      max_response_len=stage.sampler.max_response_len))
  if stage.overlong.mode == 'soft':
    penalty = (graded.rewards - rewards)[is_trained]
    metrics['overlong/penalty'] = float(penalty.sum() / max(penalty.size, 1))
  if stage.shuffle_rewards:  # Penalties too: they would be a signal.
    rng = np.random.default_rng((seed, step))
    rewards[is_trained] = rng.permutation(rewards[is_trained])
  return dataclasses.replace(graded, rewards=rewards, metrics=metrics)


def _take(
    graded: Graded,
    groups: np.ndarray,  # i[P]
    is_trained: np.ndarray,  # bool[P]
) -> Graded:
  """Some of the groups, in a new order; empty where not trained on."""
  sampled = graded.sampled
  num_samples = sampled.rollouts.lengths.shape[1]
  chosen = groups.tolist()
  place = {old: new for new, old in enumerate(chosen)}
  # Of each response, [P * G].
  index = (groups[:, None] * num_samples + np.arange(num_samples)).reshape(-1)
  counts = np.repeat(is_trained, num_samples)

  def of_rollouts(values: Any) -> np.ndarray:
    taken = np.asarray(values)[groups]
    return np.where(
        is_trained.reshape(-1, *(1,) * (taken.ndim - 1)), taken,
        np.zeros_like(taken))

  return dataclasses.replace(
      graded,
      sampled=dataclasses.replace(
          sampled,
          prompts=[sampled.prompts[q] for q in chosen],
          example=sampled.example[groups],
          rollouts=jax.tree.map(of_rollouts, sampled.rollouts),
          texts=[sampled.texts[i] for i in index.tolist()],
          groups=[
              [_moved(group, (place[q] - q) * num_samples)
               for group in sampled.groups[q]] if is_used else []
              for q, is_used in zip(chosen, is_trained, strict=True)],
          turns=[
              dataclasses.replace(turn, prompt=dataclasses.replace(
                  turn.prompt, query=place[turn.prompt.query]))
              for turn in sampled.turns if turn.prompt.query in place]),
      scores=[graded.scores[i] if is_used else None
              for i, is_used in zip(index.tolist(), counts, strict=True)],
      rewards=np.where(counts, graded.rewards[index], np.float32(0.0)))


def _moved(group: rows.Group, distance: int) -> rows.Group:
  """A group whose responses have other numbers."""
  return dataclasses.replace(group, branches=[
      dataclasses.replace(branch, trajectory=branch.trajectory + distance)
      for branch in group.branches])


def sampled_metrics(graded: Graded) -> dict[str, float]:
  """Mean score by task, and how long responses are and how they ended."""
  is_graded = graded.lengths > 0
  rewards = np.asarray([s.reward for s in graded.scores if s])
  tasks = graded.tasks[is_graded]
  by_task = {
      f'reward/{t}': rewards[tasks == t].mean() for t in sorted(set(tasks))}
  return by_task | {
      'reward/mean': np.mean(list(by_task.values())),
      'length/mean': graded.lengths[is_graded].mean(),
      'length/truncated': 1.0 - graded.is_finished[is_graded].mean(),
  }


def entropy_metrics(
    graded: Graded,
    entropy: np.ndarray,  # f32[N, R]
) -> dict[str, float]:
  """Mean entropy by task, of what is trained on."""
  is_trained = graded.lengths > 0
  # Values past a response's end are 0.
  entropies = entropy.sum(axis=1)[is_trained] / graded.lengths[is_trained]
  tasks = graded.tasks[is_trained]
  return {
      f'entropy_by_task/{t}': entropies[tasks == t].mean()
      for t in sorted(set(tasks))}

"""Turns written by the engine of this process."""

from collections.abc import Sequence

import jax
import numpy as np

from longjax import types
from longjax.agents import rounds
from longjax.rollout import engine


def generate(
    session: engine.Session,
    key: jax.Array,  # key[]
    *,
    examples: Sequence[types.TaskExample],
    numbers: Sequence[int],
) -> rounds.Generate:
  """What writes the turns of readers.

  A response depends on the key, on its query's number, its reader and its turn,
  not on what is written beside it.

  Args:
    session: with the policy.
    key: of all turns.
    examples: that each query is about.
    numbers: identities (uint31) of the queries, see `types.Prompt`.
  """

  def written(asked: Sequence[rounds.Prompt]) -> list[rounds.Response]:
    prompts = [
        types.Prompt(example=examples[p.query], tokens=p.tokens,
                     number=numbers[p.query]) for p in asked]
    rollouts = session.sample(
        prompts, engine.prompt_keys(turn_keys(key, asked), prompts),
        num_samples=1)
    return [_response(rollouts, i) for i in range(len(asked))]

  return written


def turn_keys(
    key: jax.Array,  # key[]
    asked: Sequence[rounds.Prompt],
) -> jax.Array:  # key[P]
  """A key for each prompt, by its reader and its turn."""
  readers, turns = np.asarray(
      [(p.sample, p.turn) for p in asked], np.uint32).T
  return engine.fold_in(engine.fold_in(key, readers), turns)


def _response(rollouts: types.Rollouts, i: int) -> rounds.Response:
  """The only response to prompt `i`."""
  length = int(rollouts.lengths[i, 0])

  def of(values: jax.Array) -> np.ndarray:
    return np.asarray(values[i, 0, :length])

  return rounds.Response(
      tokens=of(rollouts.tokens).tolist(),
      is_finished=bool(rollouts.is_finished[i, 0]),
      logprobs=of(rollouts.logprobs), entropy=of(rollouts.entropy),
      entropy_t1=of(rollouts.entropy_t1))

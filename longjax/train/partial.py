"""Partial rollouts: what a step leaves unfinished, the next one goes on with.

A few long responses keep a whole batch waiting. A stage may therefore cut
sampling short (`rl.cut_tokens`, `rl.cut_seconds`): groups all of whose
responses have ended are trained on, the others are carried over and go on with
the policy of the next step, in place of as many new prompts. Tokens keep the
log-probabilities they were drawn with, so truncated importance weights
(`loss.tis_cap`) account for the mix of policies. Kimi k1.5 (arXiv:2501.12599),
Sec. 2.6.2.

P prompts, G rollouts per prompt, R response tokens.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import struct

from longjax import types


@struct.dataclass
class Carried:
  """Groups that wait for the next step, as NumPy arrays; part of a checkpoint.

  Attributes:
    num_drawn: i32[] prompts taken from the stream of examples so far.
    example: i32[P] index of each group's example; -1 where there is none.
    born: i32[P] the step that drew it, which its random numbers depend on.
    rollouts: [P, G, R] what is written so far.
  """

  num_drawn: np.ndarray
  example: np.ndarray
  born: np.ndarray
  rollouts: types.Rollouts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
  """The prompts of a step, those carried over first.

  Attributes:
    example: i32[P] indices of the examples.
    born: i32[P] the step that drew each.
    begun: [P, G, R] what is written already; None if nothing ever is.
    num_drawn: prompts taken from the stream so far.
  """

  example: np.ndarray
  born: np.ndarray
  begun: types.Rollouts | None = None
  num_drawn: int = 0

  @property
  def num_begun(self) -> int:
    """Tokens that are written already."""
    return 0 if self.begun is None else int(self.begun.lengths.sum())


def nothing(
    *, num_prompts: int, num_samples: int, max_response_len: int
) -> Carried:
  """Before the first step."""
  shape = (num_prompts, num_samples)

  def zeros(dtype):
    return np.zeros((*shape, max_response_len), dtype)

  return Carried(
      num_drawn=np.zeros((), np.int32),
      example=np.full(num_prompts, -1, np.int32),
      born=np.zeros(num_prompts, np.int32),
      rollouts=types.Rollouts(
          tokens=zeros(np.int32), lengths=np.zeros(shape, np.int32),
          logprobs=zeros(np.float32), entropy=zeros(np.float32),
          entropy_t1=zeros(np.float32), is_finished=np.zeros(shape, bool)))


def draw(
    carried: Carried, step: int, stream: Callable[[int], int]
) -> Drawn:
  """Fills a batch up with new prompts.

  Args:
    carried: from the step before.
    step: the number of this one.
    stream: the example at a place of the endless stream of prompts. One that
      is carried over is passed by: no prompt is twice in a batch.
  """
  held = np.flatnonzero(carried.example >= 0)
  example = carried.example[held].tolist()
  num_prompts, num_drawn = carried.example.size, int(carried.num_drawn)
  while len(example) < num_prompts:
    new = stream(num_drawn)
    num_drawn += 1
    if new not in example:
      example.append(new)
  num_new = num_prompts - held.size
  born = np.append(carried.born[held], np.full(num_new, step))

  def first(values):
    made = np.zeros_like(values)
    made[:held.size] = values[held]
    return made

  return Drawn(
      example=np.asarray(example, np.int32), born=born.astype(np.int32),
      begun=jax.tree.map(first, carried.rollouts), num_drawn=num_drawn)


def is_complete(rollouts: types.Rollouts) -> np.ndarray:  # bool[P]
  """Groups all of whose responses have ended."""
  ended = rollouts.is_finished | (
      rollouts.lengths == rollouts.tokens.shape[2])
  return np.asarray(ended.all(axis=1))


def split(
    drawn: Drawn, rollouts: types.Rollouts
) -> tuple[types.Rollouts, Carried]:
  """What is trained on, nothing written elsewhere; and what is carried over."""
  complete = is_complete(rollouts)

  def where(mask):
    def of(values):
      shape = (-1,) + (1,) * (values.ndim - 1)
      return np.where(mask.reshape(shape), values, np.zeros_like(values))

    return jax.tree.map(of, rollouts)

  return where(complete), Carried(
      num_drawn=np.asarray(drawn.num_drawn, np.int32),
      example=np.where(complete, -1, drawn.example).astype(np.int32),
      born=np.where(complete, 0, drawn.born).astype(np.int32),
      rollouts=where(~complete))


def metrics(drawn: Drawn, trained: types.Rollouts) -> dict[str, float]:
  """How much is left to the next step, and how old what is trained on is."""
  assert drawn.begun is not None
  is_trained = trained.lengths.any(axis=1)
  num_old = drawn.begun.lengths[is_trained].sum()
  return {
      'partial/carried_groups': 1.0 - float(is_trained.mean()),
      'partial/old_tokens': float(num_old / trained.lengths.sum()),
  }

"""Optimizer and learning-rate schedule from a config."""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
import optax

from longjax import types


class Schedule(enum.StrEnum):
  """Shape of the learning rate after warm-up."""

  CONSTANT = 'constant'
  COSINE = 'cosine'  # Down to a tenth of the peak when all steps are done.


class Moments(enum.StrEnum):
  """What is remembered of past gradients."""

  FULL = 'full'  # Mean and mean square in float32, 8 bytes a parameter.
  # Mean in bfloat16, mean square as one number a row and one a column of each
  # matrix (Adafactor, arXiv:1804.04235): 2 bytes a parameter.
  FACTORED = 'factored'


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with clipping; defaults are those of verl, which the paper built on.

  Attributes:
    learning_rate: peak.
    schedule: see `Schedule`.
    warmup_steps: linear warm-up from zero.
    b1: decay of the first moment.
    b2: decay of the second moment; factored, it is 1 - step^-0.8 instead.
    weight_decay: decoupled, times the learning rate; matrices only.
    clip_norm: gradients are scaled down to this global norm.
    moments: see `Moments`.
    reset: a stage forgets the moments of the one before; False goes on with
      them, under a schedule of its own.
  """

  learning_rate: float
  schedule: Schedule = Schedule.CONSTANT
  warmup_steps: int = 0
  b1: float = 0.9
  b2: float = 0.999
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  moments: Moments = Moments.FULL
  reset: bool = True

  def __post_init__(self):
    if self.learning_rate <= 0.0:
      raise types.UserError(
          f'optimizer.learning_rate={self.learning_rate} must be > 0.')
    if self.clip_norm <= 0.0:
      raise types.UserError(
          f'optimizer.clip_norm={self.clip_norm} must be > 0.')
    for name in ('b1', 'b2'):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise types.UserError(
            f'optimizer.{name}={getattr(self, name)} must lie in [0, 1).')
    for name in ('warmup_steps', 'weight_decay'):
      if getattr(self, name) < 0:
        raise types.UserError(
            f'optimizer.{name}={getattr(self, name)} must be >= 0.')


def make(
    config: OptimizerConfig, *, num_steps: int
) -> optax.GradientTransformation:
  """Builds the gradient transformation for a stage of `num_steps`."""
  if config.schedule is Schedule.COSINE:
    learning_rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(num_steps, config.warmup_steps + 1),
        end_value=0.1 * config.learning_rate)
  else:
    learning_rate = optax.linear_schedule(
        init_value=(
            0.0 if config.warmup_steps else config.learning_rate),
        end_value=config.learning_rate,
        transition_steps=max(config.warmup_steps, 1))
  if config.moments is Moments.FACTORED:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_factored_rms(),
        # Adafactor, Sec. 6: its mean squares lag behind growing gradients.
        optax.clip_by_block_rms(1.0),
        optax.ema(config.b1, accumulator_dtype=jnp.bfloat16),
        optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
        optax.scale_by_learning_rate(learning_rate))
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(
          learning_rate, b1=config.b1, b2=config.b2,
          weight_decay=config.weight_decay, mask=_is_matrix))


def resume(old: Any, fresh: Any) -> Any:
  """The moments of `old` under the schedule of `fresh`, from its start."""

  def is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)

  return jax.tree.map(
      lambda before, after: after if is_schedule(after) else before,
      old, fresh, is_leaf=is_schedule)


def _is_matrix(params):
  """True for the leaves that are decayed: all but norm gains and biases."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: not path[-1].key.endswith(('norm', 'bias')), params)

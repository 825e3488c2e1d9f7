"""Optimizer and learning-rate schedule from a config."""

import dataclasses
import enum

import jax
import optax

from longjax import types


class Schedule(enum.StrEnum):
  """Shape of the learning rate after warm-up."""

  CONSTANT = 'constant'
  COSINE = 'cosine'  # Down to a tenth of the peak when all steps are done.


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with clipping; defaults are those of verl, which the paper built on.

  Attributes:
    learning_rate: peak.
    schedule: see `Schedule`.
    warmup_steps: linear warm-up from zero.
    b1: decay of the first moment.
    b2: decay of the second moment.
    weight_decay: decoupled, times the learning rate; matrices only.
    clip_norm: gradients are scaled down to this global norm.
  """

  learning_rate: float
  schedule: Schedule = Schedule.CONSTANT
  warmup_steps: int = 0
  b1: float = 0.9
  b2: float = 0.999
  weight_decay: float = 0.0
  clip_norm: float = 1.0

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
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(
          learning_rate, b1=config.b1, b2=config.b2,
          weight_decay=config.weight_decay, mask=_is_matrix))


def _is_matrix(params):
  """True for the leaves that are decayed: everything but norm gains."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: not path[-1].key.endswith('norm'), params)

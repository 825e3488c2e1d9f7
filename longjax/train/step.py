"""The compiled programs of training: `update` and `score`.

SFT and RL share one `update`; they differ by the loss they hand it. A loss
returns a *sum* already divided by the batch's one denominator, so gradients of
micro-batches simply add.

Shapes: B rows, T positions, M micro-batches.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from longjax import rows, types
from longjax.model import architecture, attention, head, transformer
from longjax.parallel import rules as rules_lib
from longjax.train import state as state_lib


class Metrics(Protocol):
  """Undivided sums of some rows, a pytree; those of other rows add up."""

  def __add__(self, other: Any) -> Any:
    """Those of both."""

  def summary(self) -> dict[str, jax.Array]:  # f32[] each
    """Means by name."""


# (params, rows, extras) -> the loss's share of these rows, metrics.
Loss = Callable[[types.Params, rows.Rows, Any], tuple[jax.Array, Metrics]]


def token_scores(
    params: types.Params,
    batch: rows.Rows,  # [B, T]
    *,
    config: architecture.ModelConfig,
    temperature: float,
    rules: rules_lib.Rules,
    backend: attention.Backend,
    remat: transformer.Remat = transformer.Remat.NONE,
) -> head.HeadOutput:  # f32[B, T]
  """Log-probability and entropy of every trained token of the rows."""
  hidden = transformer.hidden_states(
      params, batch.tokens, batch.meta, config=config, rules=rules,
      backend=backend, remat=remat)
  return head.logprobs_and_entropy(
      hidden, transformer.head_weights(params), batch.targets,
      batch.loss_mask, temperature=temperature, rules=rules)


def put_rows(batch: Any, rules: rules_lib.Rules) -> Any:
  """Moves [B, T] host arrays to the devices that own their rows."""
  return jax.device_put(batch, rules.sharding('batch', 'seq'))


def make_update(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    num_microbatches: int = 1,
) -> Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]:
  """Compiles one optimizer step.

  Args:
    loss: see `Loss`.
    optimizer: what turns gradients into updates.
    config: sizes of the network.
    rules: logical axes to mesh axes.
    num_microbatches: M; rows are split into M parts run one after another.

  Returns:
    `update(state, rows, extras, is_applied)`; the state's buffers are donated.
    A step whose loss or gradient is not finite leaves parameters and moments
    as they were and is counted; so does one with `is_applied` False, which is
    not counted as bad. Metrics are f32[] means, with 'loss' and 'grad_norm'.
  """
  gradient = jax.value_and_grad(loss, has_aux=True)

  def accumulate(params, batch, extras):
    if num_microbatches == 1:
      return gradient(params, batch, extras)
    parts = jax.tree.map(
        lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradient, params, first, extras))

    def add(total, part):
      part = jax.tree.map(
          lambda x: rules.constrain(x, 'batch', 'seq'), part)
      (loss_sum, metrics), grads = total
      (part_loss, part_metrics), part_grads = gradient(params, part, extras)
      grads = jax.tree.map(jnp.add, grads, part_grads)
      return ((loss_sum + part_loss, metrics + part_metrics), grads), None

    return jax.lax.scan(add, zeros, parts)[0]

  def update(state, batch, extras, is_applied):
    (loss_value, metrics), grads = accumulate(state.params, batch, extras)
    grad_norm = optax.tree_utils.tree_norm(grads)
    is_finite = jnp.isfinite(loss_value) & jnp.isfinite(grad_norm)
    is_taken = is_finite & is_applied
    # NaN times zero is NaN: bad gradients must not reach the moments.
    grads = jax.tree.map(lambda g: jnp.where(is_taken, g, 0.0), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def taken(new, old):
      return jax.tree.map(lambda n, o: jnp.where(is_taken, n, o), new, old)

    is_bad = (~is_finite).astype(jnp.int32)
    state = state_lib.TrainState(
        params=taken(params, state.params),
        opt_state=taken(opt_state, state.opt_state),
        step=state.step + 1,
        num_skipped=state.num_skipped + is_bad,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * is_bad)
    return state, metrics.summary() | {
        'loss': loss_value, 'grad_norm': grad_norm,
        'skipped': state.num_skipped,
        'skipped_in_a_row': state.skipped_in_a_row}

  where = state_lib.shardings(config, optimizer, rules)
  return jax.jit(
      update, donate_argnums=0, out_shardings=(where, rules.sharding()))


def make_score(
    *,
    config: architecture.ModelConfig,
    temperature: float,
    rules: rules_lib.Rules,
    backend: attention.Backend,
) -> Callable[[types.Params, rows.Rows], head.HeadOutput]:
  """Compiles `score(params, rows)`: old log-probabilities and entropies."""
  return jax.jit(functools.partial(
      token_scores, config=config, temperature=temperature, rules=rules,
      backend=backend))

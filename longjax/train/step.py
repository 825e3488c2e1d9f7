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
from flax import struct

from longjax import rows, types
from longjax.model import (
    architecture,
    attention,
    head,
    moe,
    parameters,
    transformer,
)
from longjax.model import compute as compute_lib
from longjax.parallel import multihost, token_order
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


@struct.dataclass
class TokenScores:
  """What a forward pass says of rows.

  Attributes:
    head: f32[B, T] log-probability and entropy of every trained token.
    routing: where tokens went, leaves [L, ...]; None without experts.
  """

  head: head.HeadOutput
  routing: moe.Routing | None


def token_scores(
    params: types.Params,
    batch: rows.Rows,  # [B, T]
    *,
    config: architecture.ModelConfig,
    temperature: float,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> TokenScores:
  """Log-probability and entropy of every trained token of the rows.

  Inside, tokens stand in the order that balances the mesh axis `seq`.
  """
  order = attention.order(
      batch.meta, block_len=compute.block_len, rules=rules)

  def reorder(tree, order):
    if order is None:
      return tree
    return jax.tree.map(
        lambda x: rules.constrain(
            token_order.reorder(x, order), 'batch', 'seq',
            *(None,) * (x.ndim - 2)), tree)

  batch = reorder(jax.tree.map(jnp.asarray, batch), order)
  expert_ids = batch.expert_ids
  if expert_ids is not None:
    expert_ids = jnp.moveaxis(expert_ids.astype(jnp.int32), 2, 0)
  hidden = transformer.hidden_states(
      params, batch.tokens, batch.meta, config=config, rules=rules,
      compute=compute, expert_ids=expert_ids)
  scores = head.logprobs_and_entropy(
      hidden.states, parameters.head_weights(params), batch.targets,
      batch.loss_mask, temperature=temperature, rules=rules)
  if order is not None:
    scores = reorder(scores, token_order.inverse(order))
  return TokenScores(head=scores, routing=hidden.routing)


@struct.dataclass
class RoutedMetrics:
  """A loss's metrics, and how evenly experts were used.

  Attributes:
    metrics: of the loss.
    load: f32[L, E] tokens sent to each expert.
  """

  metrics: Any
  load: jax.Array

  def __add__(self, other: 'RoutedMetrics') -> 'RoutedMetrics':
    return RoutedMetrics(
        metrics=self.metrics + other.metrics, load=self.load + other.load)

  def summary(self) -> dict[str, jax.Array]:  # f32[] each
    """Means by name."""
    return self.metrics.summary() | moe.balance(self.load)


def with_routing(metrics: Any, routing: moe.Routing | None) -> Metrics:
  """The loss's metrics, with those of the experts if there are any."""
  if routing is None:
    return metrics
  return RoutedMetrics(metrics=metrics, load=routing.load)


def put_rows(batch: Any, rules: rules_lib.Rules) -> Any:
  """Moves [B, T] host arrays to the devices that own their rows."""
  return multihost.put(batch, rules.sharding('batch', 'seq'))


def make_update(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    rows_at_once: int = 0,
) -> Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]:
  """Compiles one optimizer step.

  Args:
    loss: see `Loss`.
    optimizer: what turns gradients into updates.
    config: sizes of the network.
    rules: logical axes to mesh axes.
    rows_at_once: rows run one after another in parts of so many, so that
      memory does not grow with their number; 0 means all.

  Returns:
    `update(state, rows, extras, is_applied)`; the state's buffers are donated.
    A step whose loss or gradient is not finite leaves parameters and moments
    as they were and is counted; so does one with `is_applied` False, which is
    not counted as bad. Metrics are f32[] means, with 'loss' and 'grad_norm'.
  """
  gradient = jax.value_and_grad(loss, has_aux=True)

  def accumulate(params, batch, extras):
    num_rows = batch.tokens.shape[0]
    if rows_at_once in (0, num_rows):
      return gradient(params, batch, extras)
    parts = _parts(batch, num_rows // rows_at_once)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradient, params, first, extras))

    def add(total, part):
      part = _placed(part, rules)
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
    compute: compute_lib.Compute,
    rows_at_once: int = 0,
) -> Callable[[types.Params, rows.Rows], head.HeadOutput]:
  """Compiles `score(params, rows)`: old log-probabilities and entropies.

  Args:
    config: sizes of the network.
    temperature: see `token_scores`.
    rules: logical axes to mesh axes.
    compute: backends, dtype.
    rows_at_once: rows run one after another in parts of so many; 0 means all.
  """

  def of_part(params, part):
    return token_scores(
        params, _placed(part, rules), config=config, temperature=temperature,
        rules=rules, compute=compute).head

  def score(params, batch):
    num_rows = batch.tokens.shape[0]
    if rows_at_once in (0, num_rows):
      return of_part(params, batch)
    parts = _parts(batch, num_rows // rows_at_once)
    scores = jax.lax.map(functools.partial(of_part, params), parts)
    scores = jax.tree.map(lambda x: x.reshape(num_rows, -1), scores)
    return _placed(scores, rules)

  return jax.jit(score)


def _parts(batch: Any, num_parts: int) -> Any:
  """[B, ...] -> [M, B / M, ...]."""
  return jax.tree.map(
      lambda x: jnp.asarray(x).reshape(num_parts, -1, *x.shape[1:]), batch)


def _placed(batch: Any, rules: rules_lib.Rules) -> Any:
  """Rows [B, T, ...] on the devices they belong to."""
  return jax.tree.map(
      lambda x: rules.constrain(
          jnp.asarray(x), 'batch', 'seq', *(None,) * (x.ndim - 2)), batch)

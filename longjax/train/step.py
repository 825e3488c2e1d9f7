"""The compiled programs of training: `Update` and `score`.

SFT and RL share one `Update`; they differ by the loss they hand it. A loss
returns a *sum* already divided by the batch's one denominator, so gradients of
micro-batches simply add. They may have different shapes: each shape of rows is
compiled once, however many micro-batches a step has.

Shapes: B rows, T positions, both of a micro-batch.
"""

import dataclasses
from collections.abc import Callable, Iterable
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


@struct.dataclass
class Total:
  """What the micro-batches of an optimizer step add up to.

  Attributes:
    gradients: of the parameters, placed as they are.
    loss: f32[].
    metrics: undivided sums.
  """

  gradients: types.Params
  loss: jax.Array
  metrics: Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
  """One optimizer step over any number of micro-batches; see `make_update`.

  The programs are dispatched one after another without waiting for results.

  Attributes:
    start: (params, rows, extras) -> a `Total` of zeros.
    accumulate: (params, total, rows, extras) -> the total with these rows in
      it; the old one is donated. Compiled once for each shape of rows.
    apply: (state, total, is_applied) -> the state after the step, metrics; the
      old state is donated.
    rules: logical axes to mesh axes.
  """

  start: Callable[..., Total]
  accumulate: Callable[..., Total]
  apply: Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]
  rules: rules_lib.Rules

  def __call__(
      self,
      state: state_lib.TrainState,
      micro_batches: Iterable[rows.Rows],  # [B, T], each its own
      extras: Any,
      is_applied: jax.Array | bool,
  ) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
    """Takes the step.

    Args:
      state: donated.
      micro_batches: rows on the host, at least one batch of them.
      extras: what else the loss reads, the same for all rows.
      is_applied: False leaves parameters and moments as they were.

    Returns:
      The state after the step. Metrics are f32[] means, with 'loss' and
      'grad_norm'.
    """
    extras = multihost.put(extras, self.rules.sharding())
    total = None
    for batch in micro_batches:
      batch = put_rows(batch, self.rules)
      if total is None:
        total = self.start(state.params, batch, extras)
      total = self.accumulate(state.params, total, batch, extras)
    if total is None:
      raise ValueError('an optimizer step needs at least one micro-batch.')
    return self.apply(state, total, is_applied)


def make_update(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
) -> Update:
  """The programs of an optimizer step.

  A step whose loss or gradient is not finite leaves parameters and moments as
  they were and is counted; so does one with `is_applied` False, which is not
  counted as bad.

  Args:
    loss: see `Loss`.
    optimizer: what turns gradients into updates.
    config: sizes of the network.
    rules: logical axes to mesh axes.
  """
  gradient = jax.value_and_grad(loss, has_aux=True)

  def start(params, batch, extras):
    loss_value, metrics = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(loss, params, batch, extras))
    return Total(
        gradients=jax.tree.map(jnp.zeros_like, params), loss=loss_value,
        metrics=metrics)

  def accumulate(params, total, batch, extras):
    (loss_value, metrics), gradients = gradient(params, batch, extras)
    return Total(
        gradients=jax.tree.map(jnp.add, total.gradients, gradients),
        loss=total.loss + loss_value, metrics=total.metrics + metrics)

  def apply(state, total, is_applied):
    grad_norm = optax.tree_utils.tree_norm(total.gradients)
    is_finite = jnp.isfinite(total.loss) & jnp.isfinite(grad_norm)
    is_taken = is_finite & is_applied
    # NaN times zero is NaN: bad gradients must not reach the moments.
    gradients = jax.tree.map(
        lambda g: jnp.where(is_taken, g, 0.0), total.gradients)
    updates, opt_state = optimizer.update(
        gradients, state.opt_state, state.params)
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
    return state, total.metrics.summary() | {
        'loss': total.loss, 'grad_norm': grad_norm,
        'skipped': state.num_skipped,
        'skipped_in_a_row': state.skipped_in_a_row}

  where = state_lib.shardings(config, optimizer, rules)
  replicated: Any = rules.sharding()
  total = Total(gradients=where.params, loss=replicated, metrics=replicated)
  return Update(
      start=jax.jit(start, out_shardings=total),
      accumulate=jax.jit(accumulate, donate_argnums=1, out_shardings=total),
      apply=jax.jit(
          apply, donate_argnums=0, out_shardings=(where, replicated)),
      rules=rules)


def make_score(
    *,
    config: architecture.ModelConfig,
    temperature: float,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> Callable[[types.Params, rows.Rows], head.HeadOutput]:
  """Compiles `score(params, rows)`: old log-probabilities and entropies.

  Args:
    config: sizes of the network.
    temperature: see `token_scores`.
    rules: logical axes to mesh axes.
    compute: backends, dtype.

  Returns:
    A function of one micro-batch; its results are f32[B, T].
  """

  def score(params, batch):
    return token_scores(
        params, batch, config=config, temperature=temperature, rules=rules,
        compute=compute).head

  return jax.jit(score, out_shardings=rules.sharding('batch', 'seq'))

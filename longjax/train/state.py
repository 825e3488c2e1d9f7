"""The part of a run that lives on devices, and where it lives."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from longjax import types
from longjax.model import architecture, parameters
from longjax.parallel import rules as rules_lib
from longjax.train import optimizer as optimizer_lib


@struct.dataclass
class TrainState:
  """What an optimizer step reads and writes.

  Attributes:
    params: the policy, float32.
    opt_state: optimizer moments.
    step: i32[] steps attempted in this stage, skipped ones included.
    num_skipped: i32[] steps skipped in this stage for a non-finite loss.
    skipped_in_a_row: i32[] the current run of them.
  """

  params: types.Params
  opt_state: Any
  step: jax.Array
  num_skipped: jax.Array
  skipped_in_a_row: jax.Array


def param_shardings(
    config: architecture.ModelConfig, rules: rules_lib.Rules
) -> types.Params:
  """Sharding of every parameter; raises UserError where one cannot split."""
  return rules.tree_shardings(
      parameters.axes(config), parameters.abstract(config))


def shardings(
    config: architecture.ModelConfig,
    optimizer: optax.GradientTransformation,
    rules: rules_lib.Rules,
) -> TrainState:
  """Shardings of a whole `TrainState`; moments lie with their parameters."""
  params = param_shardings(config, rules)
  shapes = parameters.abstract(config)
  replicated = rules.sharding()
  opt_state = optax.tree_utils.tree_map_params(
      optimizer,
      lambda moment, sharding, param: jax.NamedSharding(
          rules.mesh, _of_moment(moment.shape, sharding.spec, param.shape)),
      jax.eval_shape(optimizer.init, shapes), params, shapes,
      transform_non_params=lambda _: replicated)
  return TrainState(
      params=params, opt_state=opt_state, step=replicated,
      num_skipped=replicated, skipped_in_a_row=replicated)


def _of_moment(
    moment: tuple[int, ...],
    spec: jax.sharding.PartitionSpec,
    param: tuple[int, ...],
) -> jax.sharding.PartitionSpec:
  """Where a moment lies whose parameter of shape `param` lies by `spec`.

  A factored one lacks dimensions of its parameter; those it has are split as
  they are there.
  """
  entries, start = [], 0
  for size in moment:
    if size not in param[start:]:
      return jax.sharding.PartitionSpec()
    start = param.index(size, start) + 1
    entries.append(spec[start - 1])
  return jax.sharding.PartitionSpec(*entries)


def create(
    params: types.Params,
    config: architecture.ModelConfig,
    optimizer: optax.GradientTransformation,
    rules: rules_lib.Rules,
    *,
    moments: Any = None,
) -> TrainState:
  """The state at the start of a stage: fresh counters, and moments if none.

  Args:
    params: the policy, on any mesh of these devices.
    config: sizes of the network.
    optimizer: of the stage.
    rules: of the stage.
    moments: `TrainState.opt_state` of the stage before, to go on with.
  """
  where = shardings(config, optimizer, rules)

  def fresh(params):
    # Distinct buffers: the update donates every one of them.
    return TrainState(
        params=params, opt_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32), num_skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32))

  params = jax.device_put(params, where.params)
  state = jax.jit(fresh, out_shardings=where)(params)
  if moments is None:
    return state
  return state.replace(opt_state=optimizer_lib.resume(
      jax.device_put(moments, where.opt_state), state.opt_state))


def abstract(
    config: architecture.ModelConfig,
    optimizer: optax.GradientTransformation,
    rules: rules_lib.Rules,
) -> TrainState:
  """Shapes, dtypes and shardings: what a checkpoint is restored into."""
  params = parameters.abstract(config)
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  shapes = TrainState(
      params=params, opt_state=jax.eval_shape(optimizer.init, params),
      step=scalar, num_skipped=scalar, skipped_in_a_row=scalar)
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings(config, optimizer, rules))

"""Mixture of experts without dropped tokens.

Qwen3-MoE (arXiv:2505.09388): a router gives every token probabilities over E
experts, the A largest are kept and, if the model says so, divided by their
sum; the output is the sum of these experts' gated MLPs, weighted so.

Tokens are sorted by expert and multiplied group by group (`lax.ragged_dot`), so
no capacity is set and none is dropped. Experts are split over the mesh axis
`expert`. Each device's tokens travel around that axis once, together with
the sum of what the experts on their way made of them: memory is that of one
device's tokens whatever the routing, and shapes are static. The backward pass
keeps the tokens of every stop, x of one layer as often as `expert` has devices.

B rows, T positions, D model, F ffn, E experts, A active experts, n tokens of
one device, M = n * A.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from longjax.model import architecture, projection
from longjax.parallel import rules as rules_lib


@struct.dataclass
class Routing:
  """Which experts tokens went to.

  Attributes:
    expert_ids: i32[B, T, A] in order of falling probability.
    load: f32[E] tokens sent to each expert, padding left out.
  """

  expert_ids: jax.Array
  load: jax.Array


def mixture(
    layer: dict[str, jax.Array],
    x: jax.Array,  # f[B, T, D]
    *,
    config: architecture.MoeConfig,
    rules: rules_lib.Rules,
    is_token: jax.Array | None = None,  # bool[B, T]
    expert_ids: jax.Array | None = None,  # i32[B, T, A]
) -> tuple[jax.Array, Routing]:  # f[B, T, D]
  """The experts' weighted sum.

  Args:
    layer: 'router' f32[D, E], 'gate' and 'up' f32[E, D, F], 'down'
      f32[E, F, D].
    x: normalised residual stream; dimensions ('batch', 'seq', None).
    config: number of experts.
    rules: logical axes to mesh axes.
    is_token: False on padding, which is sent nowhere; None means all True.
    expert_ids: experts chosen before, e.g. by the sampler, to be used again;
      None chooses them. The weights are always this router's.

  Returns:
    The sum in x's dtype (0 on padding) and where tokens went.
  """
  if is_token is None:
    is_token = jnp.ones(x.shape[:2], bool)
  weights = ('gate', 'up', 'down')
  axes = {
      'gate': ('experts', 'expert_embed', 'ffn'),
      'up': ('experts', 'expert_embed', 'ffn'),
      'down': ('experts', 'ffn', 'expert_embed'),
  }
  for name in weights:
    rules.check(name, layer[name].shape, *axes[name])
  tokens = ('batch', 'seq')
  rules.check('the residual stream', x.shape, *tokens, None)
  router = rules.constrain(layer['router'], None, None)  # Small: whole.
  router_logits = jnp.einsum(
      'btd,de->bte', x.astype(jnp.float32), router,
      precision=jax.lax.Precision.HIGHEST)
  local = functools.partial(_local_mixture, config=config, rules=rules)
  args = [x, router_logits, is_token, *(layer[name] for name in weights)]
  specs = [
      rules.spec(*tokens, None), rules.spec(*tokens, None),
      rules.spec(*tokens), *(rules.spec(*axes[name]) for name in weights)]
  if expert_ids is not None:
    args.append(expert_ids)
    specs.append(rules.spec(*tokens, None))
  out, ids, load = jax.shard_map(
      local,
      mesh=rules.mesh,
      in_specs=tuple(specs),
      out_specs=(rules.spec(*tokens, None), rules.spec(*tokens, None),
                 rules.spec(None)),
      check_vma=False,
  )(*args)
  return out, Routing(expert_ids=ids, load=jax.lax.stop_gradient(load))


def route(
    logits: jax.Array,  # f32[..., E]
    *,
    config: architecture.MoeConfig,
    expert_ids: jax.Array | None = None,  # i32[..., A]
) -> tuple[jax.Array, jax.Array]:  # i32[..., A], f32[..., A]
  """The A experts of each token and their weights."""
  logits = logits.astype(jnp.float32)
  if expert_ids is None:
    expert_ids = jax.lax.top_k(logits, config.num_active)[1]
  if config.normalize_weights:
    # The chosen ones' probabilities over their sum. Experts replayed from the
    # sampler may have become so unlikely that this would be 0 / 0.
    chosen = jnp.take_along_axis(logits, expert_ids, axis=-1)
    return expert_ids, jax.nn.softmax(chosen, axis=-1)
  probabilities = jax.nn.softmax(logits, axis=-1)
  return expert_ids, jnp.take_along_axis(probabilities, expert_ids, axis=-1)


def balance(
    load: jax.Array,  # f32[L, E]
) -> dict[str, jax.Array]:  # f32[] each
  """How evenly tokens are spread, as means over layers.

  Returns:
    'moe/max_load', the busiest expert's tokens over the mean (1 is even, E
    the worst), and 'moe/idle', the share of experts without any.
  """
  mean = jnp.maximum(jnp.mean(load, axis=1), 1e-9)
  return {
      'moe/max_load': jnp.mean(jnp.max(load, axis=1) / mean),
      'moe/idle': jnp.mean(load == 0.0),
  }


def _local_mixture(
    x, logits, is_token, gate, up, down, expert_ids=None, *, config, rules
):
  """One device's tokens f[b, t, D]; see `mixture`."""
  ring = rules.split_axes('experts')
  tensor = rules.split_axes('ffn')
  pieces = rules.split_axes('expert_embed')
  flat = x.reshape(-1, x.shape[-1])
  if expert_ids is not None:
    expert_ids = expert_ids.reshape(len(flat), -1)
  expert_ids, weights = route(
      logits.reshape(len(flat), -1), config=config, expert_ids=expert_ids)
  # Padding asks for an expert that is nowhere.
  sent = jnp.where(
      is_token.reshape(-1, 1), expert_ids, config.num_experts)
  first = jax.lax.axis_index(ring) * gate.shape[0] if ring else 0

  def experts(flat, sent, weights):
    return _experts(
        flat, sent - first, weights, gate, up, down, pieces)

  if ring:
    out = _around(experts, (flat, sent, weights), ring)
  else:
    out = experts(flat, sent, weights)
  if tensor:
    out = jax.lax.psum(out, tensor)
  load = jnp.sum(
      sent[..., None] == jnp.arange(config.num_experts)[None, None],
      axis=(0, 1),
      dtype=jnp.float32)
  shards = rules.split_axes('batch', 'seq')
  if shards:
    load = jax.lax.psum(load, shards)
  return (
      out.astype(x.dtype).reshape(x.shape),
      expert_ids.reshape(*x.shape[:2], -1), load)


def _around(experts, tokens, ring):
  """Sums `experts(*tokens)` over the devices of a mesh axis.

  Tokens travel; what has been summed follows one step behind, so that it is
  on its way while the next device computes.
  """
  num_devices = jax.lax.axis_size(ring)
  neighbours = [(i, (i + 1) % num_devices) for i in range(num_devices)]
  pass_on = functools.partial(
      jax.lax.ppermute, axis_name=ring, perm=neighbours)

  def visit(carry, _):
    tokens, total = carry
    following = jax.tree.map(pass_on, tokens)
    return (following, pass_on(total) + experts(*tokens)), None

  total = jnp.zeros(tokens[0].shape, jnp.float32)
  # Recomputed in the backward pass: else every stop keeps its activations.
  (_, total), _ = jax.lax.scan(
      jax.checkpoint(visit), (tokens, total), None, length=num_devices)
  return pass_on(total)


def _experts(
    x,  # f[n, D]
    slots,  # i32[n, A]: which of the experts here; others are elsewhere
    weights,  # f32[n, A]
    gate,
    up,
    down,
    pieces,
):
  """What the experts of this device add to each token, f32[n, D]."""
  num_here = gate.shape[0]
  is_here = (slots >= 0) & (slots < num_here)
  slots = jnp.where(is_here, slots, num_here).reshape(-1)
  order = jnp.argsort(slots, stable=True)  # Those elsewhere come last.
  place = jnp.argsort(order)
  sizes = jnp.sum(
      slots[:, None] == jnp.arange(num_here)[None], axis=0, dtype=jnp.int32)
  sorted_x = _dispatch(x, order, place)  # f[M, D]
  hidden = jax.nn.silu(_grouped(sorted_x, gate, sizes, 1, pieces))
  hidden *= _grouped(sorted_x, up, sizes, 1, pieces)
  out = _collect(_grouped(hidden, down, sizes, 2, pieces), order, place)
  return jnp.einsum(
      'nad,na->nd', out.reshape(*is_here.shape, -1),
      jnp.where(is_here, weights, 0.0),
      preferred_element_type=jnp.float32)


@jax.custom_vjp
def _dispatch(x, order, place):
  """Copies tokens f[n, D] to where their experts are, f[M, D].

  Its gradient is written as a gather too: scatters compile and run slowly on
  TPUs.
  """
  num_active = order.shape[0] // x.shape[0]
  return x[order // num_active]


def _dispatch_forward(x, order, place):
  return _dispatch(x, order, place), (x.shape, place)


def _dispatch_backward(residuals, d_out):
  (num_tokens, width), place = residuals
  d_x = d_out[place].reshape(num_tokens, -1, width)
  return jnp.sum(d_x, axis=1, dtype=jnp.float32).astype(d_out.dtype), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _collect(x, order, place):
  """Brings f[M, D] back into the order of tokens; the inverse permutation."""
  return x[place]


_collect.defvjp(
    lambda x, order, place: (x[place], order),
    lambda order, d_out: (d_out[order], None, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(x, weight, sizes, axis, pieces):
  """x f[M, .] times the matrix of each row's expert; 0 past the last one.

  Args:
    x: rows sorted by expert.
    weight: f32[E, ., .], this device's piece.
    sizes: i32[E] rows of each expert.
    axis: the dimension of `weight` that lies in pieces.
    pieces: mesh axes that split it.
  """
  weight = projection.whole(weight, axis, pieces, x.dtype)
  return _only_rows(jax.lax.ragged_dot(x, weight, sizes), sizes)


def _grouped_forward(x, weight, sizes, axis, pieces):
  return _grouped(x, weight, sizes, axis, pieces), (x, weight, sizes)


def _grouped_backward(axis, pieces, residuals, d_out):
  x, piece, sizes = residuals
  weight = projection.whole(piece, axis, pieces, x.dtype)
  d_x = jax.lax.ragged_dot(d_out, jnp.swapaxes(weight, 1, 2), sizes)
  d_weight = jax.lax.ragged_dot_general(
      x, d_out, sizes,
      jax.lax.RaggedDotDimensionNumbers(
          dot_dimension_numbers=(((0,), (0,)), ((), ())),
          lhs_ragged_dimensions=(0,), rhs_group_dimensions=()),
      preferred_element_type=jnp.float32)
  d_weight = projection.summed_piece(d_weight, axis, pieces)
  return _only_rows(d_x, sizes), d_weight.astype(piece.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _only_rows(x, sizes):
  """0 in rows past the groups, where backends may leave anything."""
  is_row = jnp.arange(x.shape[0]) < jnp.sum(sizes)
  return jnp.where(is_row[:, None], x, jnp.zeros((), x.dtype))

"""Where weights meet activations on a mesh.

Weights are float32 and lie in pieces on the devices of a replica. A layer
casts its piece to the activations' dtype, gathers it, multiplies, and forgets
it; the backward pass gathers it again. Weight gradients are formed and summed
over devices in float32 and go back in pieces: what data-parallel training with
sharded parameters does (ZeRO, arXiv:1910.02054, stage 3).

B rows, T positions, V vocabulary, D model.
"""

import functools

import jax
import jax.numpy as jnp

from longjax.parallel import rules as rules_lib

# Logical names of the dimension along which weights lie in pieces.
IN_PIECES = ('embed', 'expert_embed')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def project(
    equation: str,
    x: jax.Array,  # f[...]
    weight: jax.Array,  # f32[...]
    axes: tuple[str | None, ...],
    rules: rules_lib.Rules,
) -> jax.Array:  # f[...]
  """einsum(equation, x, weight) in x's dtype.

  Args:
    equation: two operands; every letter stands in two of the three terms.
    x: activations.
    weight: a parameter.
    axes: its logical axes.
    rules: logical axes to mesh axes.
  """
  return jnp.einsum(equation, x, _gather(weight, x.dtype, axes, rules))


def _project_forward(equation, x, weight, axes, rules):
  return project(equation, x, weight, axes, rules), (x, weight)


def _project_backward(equation, axes, rules, residuals, d_out):
  x, weight = residuals
  inputs, out = equation.split('->')
  left, right = inputs.split(',')
  d_x = jnp.einsum(
      f'{out},{right}->{left}', d_out, _gather(weight, x.dtype, axes, rules))
  d_weight = jnp.einsum(
      f'{left},{out}->{right}', x, d_out, preferred_element_type=jnp.float32)
  return d_x, rules.constrain(d_weight, *axes).astype(weight.dtype)


project.defvjp(_project_forward, _project_backward)


def _gather(weight, dtype, axes, rules):
  """The weight in `dtype`, whole but for what tensor parallelism splits."""
  whole = [None if axis in IN_PIECES else axis for axis in axes]
  return rules.constrain(weight.astype(dtype), *whole)


def lookup(
    table: jax.Array,  # f32[V, D]
    tokens: jax.Array,  # i32[B, T]
    *,
    dtype: jax.typing.DTypeLike,
    rules: rules_lib.Rules,
) -> jax.Array:  # f[B, T, D]
  """Rows of the embedding table.

  The table is never gathered: each device looks up its piece of the width for
  the tokens of all devices it shares the table with, and sends each the piece
  of its own tokens.

  Args:
    table: one row a token id.
    tokens: ids; their dimensions are ('batch', 'seq').
    dtype: of the result.
    rules: logical axes to mesh axes.
  """
  pieces = rules.split_axes('embed')
  vocab = rules.split_axes('vocab')
  if not pieces and not vocab:
    return jnp.take(table, tokens, axis=0).astype(dtype)
  rules.check('the embedding table', table.shape, 'vocab', 'embed')
  rules.check('tokens', tokens.shape, 'batch', 'seq')

  def local(table, tokens):
    ids = tokens.reshape(-1)
    if pieces:
      ids = jax.lax.all_gather(ids, pieces, axis=0, tiled=True)
    if vocab:
      ids -= jax.lax.axis_index(vocab) * table.shape[0]
    is_here = (ids >= 0) & (ids < table.shape[0])
    x = jnp.take(table, jnp.where(is_here, ids, 0), axis=0)
    x = jnp.where(is_here[:, None], x, 0.0).astype(dtype)
    if pieces:
      x = jax.lax.all_to_all(x, pieces, 0, 1, tiled=True)
    if vocab:
      x = jax.lax.psum(x, vocab)
    return x.reshape(*tokens.shape, -1)

  return jax.shard_map(
      local,
      mesh=rules.mesh,
      in_specs=(rules.spec('vocab', 'embed'), rules.spec('batch', 'seq')),
      out_specs=rules.spec('batch', 'seq', None),
      check_vma=False,
  )(table, tokens)


def whole(
    piece: jax.Array,  # f32[...]
    axis: int,
    mesh_axes: tuple[str, ...],
    dtype: jax.typing.DTypeLike,
) -> jax.Array:  # f[...]
  """Inside `shard_map`: a weight put together from its pieces.

  Args:
    piece: this device's.
    axis: the dimension it is a piece of.
    mesh_axes: mesh axes that split it; () if it is whole.
    dtype: what it is cast to before it travels.
  """
  piece = piece.astype(dtype)
  if not mesh_axes:
    return piece
  return jax.lax.all_gather(piece, mesh_axes, axis=axis, tiled=True)


def summed_piece(
    gradient: jax.Array,  # f32[...]
    axis: int,
    mesh_axes: tuple[str, ...],
) -> jax.Array:  # f32[...]
  """Inside `shard_map`: this device's piece of a sum over devices."""
  if not mesh_axes:
    return gradient
  return jax.lax.psum_scatter(
      gradient, mesh_axes, scatter_dimension=axis, tiled=True)

"""How many floating-point operations a stage needs, and how many it executes.

XLA's own counts do not serve: they see a loop's body once and a kernel's work
not at all. Ours follow from shapes and from who sees whom.

Needed, the *ideal*, is what the mathematics asks for once: matrix products of
tokens with weights, attention between the pairs of tokens that `rows.visible`
lets see each other, the head on trained tokens only, a shared prompt once, a
backward pass of twice the forward pass. *Executed* adds what we spend beyond
it: attention by whole blocks, forward passes and scores computed again in the
backward pass. A multiply and an add are two operations; what is not a matrix
product is left out.

A group has p prefix tokens and branches of n tokens each.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longjax import rows
from longjax.model import architecture, flash_attention
from longjax.model import compute as compute_lib
from longjax.parallel import token_order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
  """Operations by what they are for."""

  layers: float = 0.0  # Products with the layers' weights.
  attention: float = 0.0  # Scores and weighted sums of values.
  head: float = 0.0  # Logits.

  @property
  def total(self) -> float:
    """All of them."""
    return self.layers + self.attention + self.head

  def times(
      self, layers: float, attention: float, head: float
  ) -> 'Flops':
    """Each part as often as given."""
    return Flops(
        layers=self.layers * layers, attention=self.attention * attention,
        head=self.head * head)


def visible_pairs(num_prefix: int, branches: Sequence[int]) -> int:
  """Pairs (query, key) that see each other in one group.

  Args:
    num_prefix: p.
    branches: n of each branch.
  """
  return num_prefix * (num_prefix + 1) // 2 + sum(
      n * num_prefix + n * (n + 1) // 2 for n in branches)


def row_meta(
    groups: Sequence[tuple[int, Sequence[int]]], *, row_len: int
) -> rows.TokenMeta:  # i32[1, T]
  """One row of groups, each given by its p and n, then padding."""
  meta = rows.empty(1, row_len).meta
  start = 0
  for number, (num_prefix, branches) in enumerate(groups):
    end = start + num_prefix + sum(branches)
    meta.group[0, start:end] = number
    meta.branch[0, start:end] = np.repeat(
        np.arange(len(branches) + 1), [num_prefix, *branches])
    meta.position[0, start:end] = np.concatenate([
        np.arange(num_prefix), *(num_prefix + np.arange(n) for n in branches)])
    start = end
  return meta


def executed_pairs(
    meta: rows.TokenMeta,  # i32[1, T]
    *,
    block_len: int,
    num_shards: int,
) -> tuple[int, float]:
  """Pairs of one row that attention computes, by whole blocks.

  Args:
    meta: of the row, in natural order.
    block_len: tokens of an attention block, which also are dealt out.
    num_shards: devices along `seq`.

  Returns:
    Pairs on all devices together, and the busiest device's share over the
    mean share.
  """
  row = jax.tree.map(lambda x: jnp.asarray(x)[0], meta)
  meets = flash_attention.meeting_blocks(row, row, block_len=block_len)
  work = jnp.sum(meets, axis=1)
  if num_shards > 1:
    work = work[token_order.deal(work[None], num_shards)[0]]
  of_device = np.asarray(work, np.int64).reshape(num_shards, -1).sum(axis=1)
  pairs = int(of_device.sum()) * block_len**2
  return pairs, float(of_device.max() / of_device.mean())


def forward(
    model: architecture.ModelConfig,
    *,
    num_tokens: float,
    num_pairs: float,
    num_scored: float,
) -> Flops:
  """One forward pass.

  Args:
    model: sizes.
    num_tokens: tokens that pass through the layers.
    num_pairs: pairs of tokens that attention connects, in one layer.
    num_scored: tokens whose logits are computed.
  """
  return Flops(
      layers=2.0 * num_tokens * model.num_layers * layer_weights(model),
      attention=(
          4.0 * num_pairs * model.num_layers * model.num_heads
          * model.head_dim),
      head=2.0 * num_scored * model.embed_dim * model.vocab_size)


def attention_weights(model: architecture.ModelConfig) -> int:
  """Weights of a layer's four attention matrices."""
  return 2 * model.embed_dim * model.head_dim * (
      model.num_heads + model.num_kv_heads)


def layer_weights(model: architecture.ModelConfig) -> int:
  """Weights of a layer that one token is multiplied with."""
  ffn = 3 * model.embed_dim * model.ffn_dim
  if model.moe is None:
    return attention_weights(model) + ffn
  return (attention_weights(model) + model.moe.num_active * ffn
          + model.embed_dim * model.moe.num_experts)


def num_parameters(model: architecture.ModelConfig) -> int:
  """Of the matrices; norms are left out."""
  ffn = 3 * model.embed_dim * model.ffn_dim
  if model.moe is not None:
    ffn = model.moe.num_experts * (ffn + model.embed_dim)
  table = model.vocab_size * model.embed_dim
  return (model.num_layers * (attention_weights(model) + ffn)
          + table * (1 if model.tied_embeddings else 2))


def num_active(model: architecture.ModelConfig) -> int:
  """Parameters one token is multiplied with, the head included."""
  return (model.num_layers * layer_weights(model)
          + model.embed_dim * model.vocab_size)


def needed_update(forward_pass: Flops) -> Flops:
  """Forward and backward."""
  return forward_pass.times(3, 3, 3)


def executed_update(
    forward_pass: Flops,
    model: architecture.ModelConfig,
    *,
    remat: compute_lib.Remat,
    backward_matmuls: int,
    is_ring: bool,
) -> Flops:
  """Forward, backward and what the backward pass computes again.

  Args:
    forward_pass: with the pairs that are executed.
    model: sizes.
    remat: what is computed again.
    backward_matmuls: of attention's backward pass for each pair, 4 needed.
    is_ring: experts stand on several devices; their forward pass is then
      computed again whatever `remat` says, see `moe`.
  """
  layers, attention = 3.0, 1 + backward_matmuls / 2
  ffn = model.embed_dim * model.ffn_dim / layer_weights(model)
  if remat is not compute_lib.Remat.NONE:
    # What a block returns need not be known again: of an MLP that is its last
    # product, of experts their weighted sum.
    layers += 1 if model.moe else 1 - ffn
    attention += remat is not compute_lib.Remat.ATTENTION
  elif model.moe and is_ring:
    layers += 3 * model.moe.num_active * ffn
  # The head's logits are computed again whatever the policy.
  return forward_pass.times(layers, attention, 4)

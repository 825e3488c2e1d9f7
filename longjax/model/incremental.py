"""Incremental decoding: one more token of samples that share their prompts.

The block is that of `transformer`; the keys and values it attends to were
computed before.

Shapes: P prompts, G rollouts per prompt, S prefix positions, R response slots,
D model, N query heads, K KV heads, H head size, L layers.
"""

import chex
import jax
import jax.numpy as jnp

from longjax import rows, types
from longjax.model import (
    architecture,
    attention,
    flash_attention,
    moe,
    projection,
    transformer,
)
from longjax.parallel import rules as rules_lib


def decode_step(
    params: types.Params,
    tokens: jax.Array,  # i32[P, G]
    prefix: transformer.KeyValues,  # f[L, P, S, K, H]
    prefix_meta: rows.TokenMeta,  # i32[P, S]
    suffix: transformer.KeyValues,  # f[L, P, G, R, K, H]
    slot: jax.Array,  # i32[]
    first_position: jax.Array,  # i32[P]
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, transformer.KeyValues, moe.Routing | None]:
  """Reads one token of each of P * G samples.

  The G samples of a prompt attend to one copy of its keys and values: they
  are G queries of the same row. Attention to the sample's own tokens is
  computed apart and merged by log-sum-exp.

  Args:
    params: the parameter tree.
    tokens: the token each sample reads.
    prefix: shared keys and values of the prompts.
    prefix_meta: who the prefix tokens are; branch 0.
    suffix: the samples' own keys and values; slots below `slot` are filled.
    slot: how many tokens each sample has read before this one.
    first_position: position of the samples' first token (slot 0).
    config: sizes.
    rules: logical axes to mesh axes, by the table `rules.DECODE`.
    dtype: of activations.

  Returns:
    Normalised hidden states f[P, G, D], `suffix` with `slot` written, and
    where the tokens were sent (leaves [L, ...]; None without experts).
  """
  dims = chex.Dimensions()
  dims['PG'] = tokens.shape
  dims['LPGRKH'] = suffix.key.shape
  chex.assert_shape(first_position, dims['P'])
  own = _suffix_meta(first_position, dims)
  position = jnp.broadcast_to(first_position[:, None] + slot, dims['PG'])
  query_meta = rows.TokenMeta(
      group=jnp.zeros_like(position),
      branch=jnp.ones_like(position),
      position=position)
  angle = transformer.angles(position, config)

  # The samples' own cache is carried from layer to layer, not sliced and
  # stacked by the scan: that would copy all slots to write one.
  def step(carry, scanned):
    x, suffix = carry
    layer, prefix_kv, index = scanned

    def attend(q, k, v):
      written = transformer.KeyValues(
          key=_write_slot(suffix.key, k, index, slot),
          value=_write_slot(suffix.value, v, index, slot))
      own_kv = jax.tree.map(
          lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False),
          written)
      shared_out, shared_lse = attention.attention(
          q, prefix_kv.key, prefix_kv.value, query_meta, prefix_meta,
          backend='reference', rules=rules)
      own_out, own_lse = attention.attention(
          _one_row_a_sample(q[:, :, None]),
          _one_row_a_sample(own_kv.key), _one_row_a_sample(own_kv.value),
          jax.tree.map(lambda m: m.reshape(-1, 1), query_meta), own,
          backend='reference', rules=rules)
      out, _ = flash_attention.merge(
          shared_out, shared_lse,
          own_out.reshape(q.shape), own_lse.reshape(q.shape[:-1]))
      return out, written

    x, suffix, routing = transformer.block(
        layer, x, angle, attend, config=config, rules=rules)
    return (x, suffix), routing

  x = projection.lookup(
      params['embedding'], tokens, dtype=dtype, rules=rules)
  (x, suffix), routing = jax.lax.scan(
      step, (x, suffix), (params['layers'], prefix, jnp.arange(dims.L)))
  hidden = transformer.rms_norm(
      x, params['final_norm'], epsilon=config.norm_epsilon)
  return hidden, suffix, routing


def _suffix_meta(
    first_position: jax.Array,  # i32[P]
    dims: chex.Dimensions,
) -> rows.TokenMeta:  # i32[P * G, R]
  """Metadata of the samples' own slots, one row a sample.

  Slots not yet written lie at later positions than the query, so the one
  visibility rule hides them.
  """
  position = first_position[:, None, None] + jnp.arange(dims.R)[None, None]
  position = jnp.broadcast_to(position, dims['PGR']).reshape(-1, dims.R)
  return rows.TokenMeta(
      group=jnp.zeros_like(position),
      branch=jnp.ones_like(position),
      position=position)


def _write_slot(
    cache: jax.Array,  # f[L, P, G, R, K, H]
    new: jax.Array,  # f[P, G, K, H]
    layer: jax.Array,  # i32[]
    slot: jax.Array,  # i32[]
) -> jax.Array:
  return jax.lax.dynamic_update_slice(
      cache, new[None, :, :, None], (layer, 0, 0, slot, 0, 0))


def _one_row_a_sample(x: jax.Array) -> jax.Array:
  """[P, G, ...] -> [P * G, ...]."""
  return x.reshape(-1, *x.shape[2:])

"""Reading on: a chunk of a prompt or of a sample, one token of many samples.

The block is that of `transformer`; what it attends to was computed before and
lies in lanes and slots, see `cache`.

L layers, P lanes, S places of a lane, M slots, R places of a slot, G seats of
a lane, A chunks read at once, C tokens of a chunk, D model, N query heads, K
key heads, H head size.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import struct

from longjax import rows, types
from longjax.model import (
    architecture,
    attention,
    cache,
    flash_attention,
    moe,
    projection,
    transformer,
)
from longjax.model import compute as compute_lib
from longjax.parallel import rules as rules_lib


@struct.dataclass
class Seats:
  """Which samples read which lane; numbers count within a shard.

  Attributes:
    slot: i32[P, G] the slot in each seat of a lane, any where it is free.
    seat: i32[M] lane * G + place of each slot; any of a slot that is free.
  """

  slot: jax.Array
  seat: jax.Array


@struct.dataclass
class Chunk:
  """What a forward pass over chunks returns.

  Attributes:
    new: f[A, K, C, H] keys and values of its tokens, by layer.
    routing: where they were sent, leaves [L, A, C, ...]; None without experts.
  """

  new: cache.Cache
  routing: moe.Routing | None


def read_chunk(
    params: types.Params,
    tokens: jax.Array,  # i32[A, C]
    meta: rows.TokenMeta,  # i32[A, C]
    lanes: cache.Cache,  # f[P, K, S, H] by layer
    lane: jax.Array,  # i32[A]
    lane_meta: rows.TokenMeta,  # i32[A, S]
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> Chunk:
  """Runs all layers over chunks that continue what stands in lanes.

  Args:
    params: the parameter tree.
    tokens: ids.
    meta: who they are; padding has group -1.
    lanes: prompts.
    lane: which of them each chunk continues.
    lane_meta: who the tokens of these lanes are.
    config: of the network.
    rules: logical axes to mesh axes; 'prefix' and 'seq' on the same.
    compute: backends and dtype.
  """
  dims = chex.Dimensions()
  dims['AC'] = tokens.shape
  dims['PKSH'] = lanes[0].key.shape
  chex.assert_shape(jax.tree.leaves(meta), dims['AC'])
  chex.assert_shape(jax.tree.leaves(lane_meta), dims['AS'])
  angle = transformer.angles(meta.position, config)

  take = [
      functools.partial(cache.take_lanes, layer, lane, rules=rules)
      for layer in lanes]

  def step(x, scanned):
    layer, index = scanned

    def attend(q, k, v):
      earlier = jax.tree.map(_swap, jax.lax.switch(index, take))
      # Queries are few: they travel to the keys.
      seen = attention.attention(
          q, earlier.key, earlier.value, meta, lane_meta,
          backend=compute.attention, block_len=compute.block_len,
          context_parallel='merge', is_dealt=False, rules=rules)
      own = attention.attention(
          q, k, v, meta, meta, backend=compute.attention,
          block_len=compute.block_len,
          context_parallel=compute.context_parallel, is_dealt=False,
          rules=rules)
      out, _ = flash_attention.merge(*seen, *own)
      return out, cache.KeyValues(key=_swap(k), value=_swap(v))

    x, new, routing = transformer.block(
        layer, x, angle, attend, config=config, rules=rules,
        is_token=meta.group >= 0)
    return rules.constrain(x, 'batch', 'seq', None), (new, routing)

  x = projection.lookup(
      params['embedding'], tokens, dtype=compute.activation_dtype, rules=rules)
  x = rules.constrain(x, 'batch', 'seq', None)
  _, (new, routing) = jax.lax.scan(
      step, x, (params['layers'], jnp.arange(config.num_layers)))
  return Chunk(
      new=tuple(jax.tree.map(lambda x, i=i: x[i], new)
                for i in range(config.num_layers)),
      routing=routing)


def decode_step(
    params: types.Params,
    tokens: jax.Array,  # i32[M]
    num_read: jax.Array,  # i32[M]
    clock: jax.Array,  # i32[]
    seats: Seats,
    lanes: cache.Cache,  # f[P, K, S, H] by layer
    lane_meta: rows.TokenMeta,  # i32[P, S]
    lane_lengths: jax.Array,  # i32[P]
    slots: cache.Cache,  # f[M, K, R, H] by layer
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, cache.Cache, moe.Routing | None]:
  """Reads one token of each of M samples.

  The samples of a prompt attend to one copy of its keys and values: they are
  the queries of its lane. Attention to a sample's own tokens is computed apart
  and merged by log-sum-exp.

  Args:
    params: the parameter tree.
    tokens: the token each sample reads.
    num_read: how many it has read before this one; fewer than R.
    clock: ticks before this one, see `cache`.
    seats: which samples read which lane.
    lanes: keys and values of the prompts.
    lane_meta: who their tokens are; branch 0.
    lane_lengths: how many they are: the position of a sample's first token.
    slots: the samples' own keys and values.
    config: sizes.
    rules: logical axes to mesh axes.
    dtype: of activations.

  Returns:
    Normalised hidden states f[M, D], `slots` with this token in it, and where
    tokens were sent (leaves [L, M, 1, ...]; None without experts).
  """
  dims = chex.Dimensions()
  dims['PKSH'] = lanes[0].key.shape
  dims['MKRH'] = slots[0].key.shape
  dims['PG'] = seats.slot.shape
  chex.assert_shape([tokens, num_read, seats.seat], dims['M'])
  by_seat = jnp.broadcast_to(lane_lengths[:, None], dims['PG'])
  first_position = cache.gather(
      by_seat.reshape(-1), seats.seat, ('batch',), rules=rules)
  angle = transformer.angles((first_position + num_read)[:, None], config)
  # Whatever their position, samples see all of their prompt.
  sees_lane = rows.visible(_samples(by_seat), lane_meta)
  sees_own = rows.visible(
      _samples((first_position + num_read)[:, None]),
      cache.slot_meta(num_read, first_position, clock, dims.R))
  by_sample = ('batch', 'heads', None)

  def attend(q, k, v, *, lane, own):  # f[M, 1, N, H], f[M, 1, K, H]
    own = cache.write_token(
        own, cache.KeyValues(key=_swap(k), value=_swap(v)), clock)
    by_lane = attention.to_cache(
        cache.gather(q[:, 0], seats.slot, by_sample, rules=rules),
        lane.key, lane.value, sees_lane)
    shared_out, shared_lse = (
        cache.gather(
            x.reshape(-1, *x.shape[2:]), seats.seat, by_sample[:x.ndim - 1],
            rules=rules)[:, None] for x in by_lane)
    own_out, own_lse = attention.to_cache(q, own.key, own.value, sees_own)
    out, _ = flash_attention.merge(shared_out, shared_lse, own_out, own_lse)
    return out, own

  x = projection.lookup(
      params['embedding'], tokens[:, None], dtype=dtype, rules=rules)
  written, routings = [], []
  # One after another in the program: a scan would copy the cache of a layer
  # out of that of all before it reads it.
  for i, (lane, own) in enumerate(zip(lanes, slots)):
    x, own, routing = transformer.block(
        jax.tree.map(lambda x, i=i: x[i], params['layers']), x, angle,
        functools.partial(attend, lane=lane, own=own), config=config,
        rules=rules)
    written.append(own)
    routings.append(routing)
  hidden = transformer.rms_norm(
      x[:, 0], params['final_norm'], epsilon=config.norm_epsilon)
  routing = jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)
  return hidden, tuple(written), routing


def _swap(x: jax.Array) -> jax.Array:
  """Tokens before heads into heads before tokens, and back."""
  return jnp.swapaxes(x, 1, 2)


def _samples(position: jax.Array) -> rows.TokenMeta:
  """Metadata of samples' tokens at these positions: branch 1."""
  return rows.TokenMeta(
      group=jnp.zeros_like(position),
      branch=jnp.ones_like(position),
      position=position)

"""The sampler's compiled programs: fill lanes with prompts, write samples.

A prompt is read once, chunk by chunk, into a lane; its samples decode against
that one copy, each in a slot (`model.cache`). Which sample sits where is
decided on the host (`scheduler`) between calls; `write` runs many tokens a
call, without a host round trip for each.

L layers, P lanes, S places of a lane, M slots, R places of a slot, A chunks
read at once, C tokens of a chunk, T tokens a call writes for each sample at
most, X shards of lanes and slots, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longjax import rows, types
from longjax.model import (
    architecture,
    cache,
    head,
    incremental,
    moe,
    parameters,
)
from longjax.model import compute as compute_lib
from longjax.parallel import rules as rules_lib
from longjax.rollout import token_sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
  """How responses are drawn.

  Attributes:
    temperature: divides the logits; 0 is greedy.
    top_p: nucleus mass; 1 keeps every token.
    top_k: so many of the likeliest tokens are kept; 0 keeps every token.
    min_response_len: tokens a response has at least, stop token included.
    max_response_len: tokens a response may have, stop token included.
  """

  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  min_response_len: int = 0
  max_response_len: int = 64

  def __post_init__(self):
    if self.temperature < 0.0:
      raise types.UserError(
          f'sampler.temperature={self.temperature} must be >= 0.')
    if not 0.0 < self.top_p <= 1.0:
      raise types.UserError(
          f'sampler.top_p={self.top_p} must lie in (0, 1].')
    if self.top_k < 0:
      raise types.UserError(f'sampler.top_k={self.top_k} must be >= 0.')
    if self.max_response_len < 1:
      raise types.UserError(
          f'sampler.max_response_len={self.max_response_len} must be >= 1.')
    if not 0 <= self.min_response_len <= self.max_response_len:
      raise types.UserError(
          f'sampler.min_response_len={self.min_response_len} must lie in [0, '
          f'max_response_len={self.max_response_len}].')


# Prompt tokens that a shard reads in one call, if so many wait.
_TOKENS_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
  """What is static in the sampler's programs; its methods are to be jitted.

  Attributes:
    config: sizes of the network.
    rules: logical axes to mesh axes.
    compute: backends and dtype.
    sampler: how tokens are drawn.
    stop_ids: ids that end a response.
    lane_len: S, a multiple of `chunk_len`.
    chunk_len: C.
    max_steps: T.
    record_experts: also return which experts tokens went to.
  """

  config: architecture.ModelConfig
  rules: rules_lib.SamplerRules
  compute: compute_lib.Compute
  sampler: SamplerConfig
  stop_ids: tuple[int, ...]
  lane_len: int
  chunk_len: int
  max_steps: int
  record_experts: bool = False

  @property
  def num_places(self) -> int:
    """R."""
    num_devices = self.rules.prefill.size('seq')
    return -(-self.sampler.max_response_len // num_devices) * num_devices

  def chunks_at_once(self, num_lanes: int) -> int:
    """A of a call when many prompts wait."""
    num_shards = self.rules.decode.size('batch')
    return num_shards * max(
        1, min(num_lanes // num_shards, _TOKENS_AT_ONCE // self.chunk_len))

  @functools.cached_property
  def positions(self) -> np.ndarray:  # i32[S]
    """Positions of the tokens at a lane's places."""
    return cache.lane_positions(
        self.lane_len, chunk_len=self.chunk_len,
        num_devices=self.rules.prefill.size('prefix'))

  def prepare(self, params: types.Params) -> types.Params:
    """Weights cast and gathered once, not once a token."""
    rules = self.rules.decode
    axes = parameters.axes(self.config)

    def cast(path, leaf):
      # Whatever `projection.project` would cast; norms, biases and the router
      # are used in float32.
      name = path[-1].key
      if name.endswith(('norm', 'bias')) or name == 'router':
        return leaf
      return leaf.astype(self.compute.activation_dtype)

    return jax.lax.with_sharding_constraint(
        jax.tree_util.tree_map_with_path(cast, params),
        rules.tree_shardings(axes, params))

  def allocate(
      self, num_lanes: int, num_slots: int
  ) -> tuple[cache.Cache, cache.Cache]:
    """Empty lanes f[P, K, S, H] and slots f[M, K, R, H], by layer."""
    config = self.config

    def empty(number, length, names):
      return cache.empty(
          config.num_layers,
          (number, config.num_kv_heads, length, config.head_dim),
          self.compute.activation_dtype, names, self.rules.decode)

    return (empty(num_lanes, self.lane_len, cache.LANES),
            empty(num_slots, self.num_places, cache.SLOTS))

  def fill(
      self, params: types.Params, lanes: cache.Cache, job: 'Fill'
  ) -> tuple[cache.Cache, jax.Array | None]:  # [A, C, L, experts]
    """Reads a chunk of each of A prompts into its lane."""
    rules = self.rules.prefill
    position = job.start[:, None] + jnp.arange(self.chunk_len)[None]
    meta = rows.TokenMeta(
        group=jnp.where(position < job.length[:, None], 0, -1),
        branch=jnp.zeros_like(position), position=position)
    chunk = incremental.read_chunk(
        params, job.tokens, meta, lanes, job.lane,
        cache.lane_meta(job.start, self.positions), config=self.config,
        rules=rules, compute=self.compute)
    lanes = tuple(
        cache.write_chunks(
            old, new, job.lane, job.start, job.is_used, rules=rules)
        for old, new in zip(lanes, chunk.new))
    return lanes, self._expert_ids(chunk.routing)

  def copy(
      self,
      lanes: cache.Cache,
      source: jax.Array,  # i32[X]
      target: jax.Array,  # i32[X]
      is_used: jax.Array,  # bool[X]
  ) -> cache.Cache:
    """Copies one lane to another within each shard."""
    return tuple(
        cache.copy_lanes(
            layer, source, target, is_used, rules=self.rules.decode)
        for layer in lanes)

  def resume(
      self,
      params: types.Params,
      lanes: cache.Cache,
      slots: cache.Cache,
      clock: jax.Array,  # i32[]
      job: 'Resume',
  ) -> cache.Cache:
    """Reads what X samples had written before into their slots."""
    index = jnp.broadcast_to(
        jnp.arange(self.num_places)[None], job.tokens.shape)
    meta = rows.TokenMeta(
        group=jnp.where(index < job.num_read[:, None], 0, -1),
        branch=jnp.ones_like(index),
        position=job.lane_length[:, None] + index)
    chunk = incremental.read_chunk(
        params, job.tokens, meta, lanes, job.lane,
        cache.lane_meta(job.lane_length, self.positions), config=self.config,
        rules=self.rules.prefill, compute=self.compute)
    first_place = (clock - job.num_read) % self.num_places
    return tuple(
        cache.write_slots(
            old, new, job.slot, first_place, job.is_used,
            rules=self.rules.decode)
        for old, new in zip(slots, chunk.new))

  def write(
      self,
      params: types.Params,
      lanes: cache.Cache,
      slots: cache.Cache,
      clock: jax.Array,  # i32[]
      samples: 'Samples',
      max_steps: jax.Array,  # i32[]
      enough_live: jax.Array,  # i32[]
  ) -> tuple[cache.Cache, 'Written']:
    """Writes up to T tokens of every sample.

    Args:
      params: as `prepare` returns them.
      lanes: the prompts.
      slots: what the samples have read of their own.
      clock: ticks so far.
      samples: who sits where.
      max_steps: at most T.
      enough_live: ends as soon as no more samples than this are being written.

    Returns:
      The slots and what was written.
    """
    rules = self.rules.decode
    lane_meta = jax.tree.map(
        lambda x: rules.constrain(x, 'batch', 'prefix'),
        cache.lane_meta(samples.lane_length, self.positions))
    weights = parameters.head_weights(params)
    keys = jax.vmap(jax.random.fold_in)(
        jax.random.wrap_key_data(samples.key), samples.number)

    def body(carry: _Carry) -> _Carry:
      hidden, slots, routing = incremental.decode_step(
          params, carry.token, carry.num_read, clock + carry.step,
          samples.seats, lanes, lane_meta, samples.lane_length, carry.slots,
          config=self.config, rules=rules,
          dtype=self.compute.activation_dtype)
      drawn = token_sampling.sample(
          head.logits(hidden, weights),
          jax.vmap(jax.random.fold_in)(keys, carry.num_read),
          temperature=self.sampler.temperature, top_p=self.sampler.top_p,
          top_k=self.sampler.top_k, banned=self._banned(carry.num_read))
      is_live = carry.is_live
      is_stop = jnp.isin(drawn.token, jnp.asarray(self.stop_ids, jnp.int32))
      num_read = carry.num_read + is_live

      def put(buffer, value):
        mask = is_live.reshape(-1, *(1,) * (value.ndim - 1))
        value = jnp.where(mask, value, 0).astype(buffer.dtype)
        return jax.lax.dynamic_update_index_in_dim(
            buffer, value, carry.step, axis=0)

      old = carry.written
      expert_ids = self._expert_ids(routing)
      return _Carry(
          step=carry.step + 1, token=drawn.token, num_read=num_read,
          is_live=is_live & ~is_stop & (num_read < samples.max_len),
          slots=slots,
          written=Written(
              num_steps=old.num_steps + 1,
              num_new=old.num_new + is_live,
              is_stopped=old.is_stopped | (is_live & is_stop),
              tokens=put(old.tokens, drawn.token),
              logprobs=put(old.logprobs, drawn.logprob),
              entropy=put(old.entropy, drawn.entropy),
              entropy_t1=put(old.entropy_t1, drawn.entropy_t1),
              expert_ids=(
                  None if expert_ids is None
                  else put(old.expert_ids, expert_ids[:, 0]))))

    def should_continue(carry: _Carry) -> jax.Array:
      return (carry.step < max_steps) & (
          jnp.sum(carry.is_live) > enough_live)

    start = _Carry(
        step=jnp.int32(0), token=samples.token, num_read=samples.num_read,
        is_live=samples.is_live, slots=slots,
        written=self._nothing(samples.token.shape[0]))
    end = jax.lax.while_loop(should_continue, body, start)
    return end.slots, end.written

  def _banned(self, num_read: jax.Array) -> jax.Array | None:  # bool[M, V]
    """Stop tokens of samples that are too short to end."""
    if not self.sampler.min_response_len:
      return None
    ids = jnp.arange(self.config.vocab_size)
    is_stop = jnp.isin(ids, jnp.asarray(self.stop_ids, jnp.int32))
    is_short = num_read + 1 < self.sampler.min_response_len
    return is_short[:, None] & is_stop[None]

  def _nothing(self, num_slots: int) -> 'Written':
    """No token written yet."""
    shape = (self.max_steps, num_slots)
    scores = jnp.zeros(shape, jnp.float32)
    moe_config = self.config.moe
    expert_ids = None
    if self.record_experts:
      assert moe_config is not None
      expert_ids = jnp.zeros(
          (*shape, self.config.num_layers, moe_config.num_active),
          moe_config.id_dtype)
    return Written(
        num_steps=jnp.int32(0), num_new=jnp.zeros(num_slots, jnp.int32),
        is_stopped=jnp.zeros(num_slots, bool),
        tokens=jnp.zeros(shape, jnp.int32), logprobs=scores, entropy=scores,
        entropy_t1=scores, expert_ids=expert_ids)

  def _expert_ids(self, routing: moe.Routing | None) -> jax.Array | None:
    """Expert ids i32[L, ..., A] of a scan over layers as [..., L, A]."""
    if not self.record_experts:
      return None
    assert routing is not None and self.config.moe is not None
    return jnp.moveaxis(routing.expert_ids, 0, -2).astype(
        self.config.moe.id_dtype)


@struct.dataclass
class Fill:
  """A chunk of each of A prompts; lanes are counted within their shard.

  Attributes:
    tokens: i32[A, C].
    lane: i32[A] where it goes.
    start: i32[A] position of its first token, a multiple of C.
    length: i32[A] tokens the lane will hold; those of the chunk past it are
      padding.
    is_used: bool[A] False if there is nothing to read.
  """

  tokens: jax.Array
  lane: jax.Array
  start: jax.Array
  length: jax.Array
  is_used: jax.Array


@struct.dataclass
class Resume:
  """One sample a shard that was begun before; counted within the shard.

  Attributes:
    tokens: i32[X, R] what it has read of its own: the last prompt token and
      all it wrote but the last.
    num_read: i32[X] how many these are.
    lane: i32[X] of its prompt.
    lane_length: i32[X] tokens in there.
    slot: i32[X] where it continues.
    is_used: bool[X] False if there is no such sample.
  """

  tokens: jax.Array
  num_read: jax.Array
  lane: jax.Array
  lane_length: jax.Array
  slot: jax.Array
  is_used: jax.Array


@struct.dataclass
class Samples:
  """Who sits where.

  Attributes:
    token: i32[M] the next token each sample reads.
    num_read: i32[M] how many it has read, which is how many it has written.
    max_len: i32[M] how many it may write.
    is_live: bool[M] False if the slot is free.
    key: u32[M, ...] raw PRNG key of the prompt.
    number: i32[M] of the sample among those of its prompt.
    seats: who reads which lane.
    lane_length: i32[P] tokens in each lane.
  """

  token: jax.Array
  num_read: jax.Array
  max_len: jax.Array
  is_live: jax.Array
  key: jax.Array
  number: jax.Array
  seats: incremental.Seats
  lane_length: jax.Array


@struct.dataclass
class Written:
  """What one call of `write` wrote.

  Attributes:
    num_steps: i32[] tokens of the sample that wrote most.
    num_new: i32[M] tokens of each.
    is_stopped: bool[M] True if the last of them is a stop token.
    tokens: i32[T, M], 0 past the end.
    logprobs: f32[T, M] see `types.Rollouts`.
    entropy: f32[T, M].
    entropy_t1: f32[T, M].
    expert_ids: [T, M, L, experts]; None if not asked.
  """

  num_steps: jax.Array
  num_new: jax.Array
  is_stopped: jax.Array
  tokens: jax.Array
  logprobs: jax.Array
  entropy: jax.Array
  entropy_t1: jax.Array
  expert_ids: jax.Array | None


@struct.dataclass
class _Carry:
  """State of the decoding loop."""

  step: jax.Array  # i32[]
  token: jax.Array  # i32[M]
  num_read: jax.Array  # i32[M]
  is_live: jax.Array  # bool[M]
  slots: cache.Cache
  written: Written

"""Prefill once per prompt, then G samples decode against the shared prefix.

The whole of it is one compiled program: no host round trip per token, and the
loop ends as soon as every sample has stopped.

Shapes: P prompts, G samples per prompt, S prefix positions, R response slots,
D model, V vocabulary.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from flax import struct

from longjax import rows, types
from longjax.model import (
    architecture,
    attention,
    head,
    incremental,
    transformer,
)
from longjax.parallel import rules as rules_lib
from longjax.rollout import token_sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
  """How responses are drawn.

  Attributes:
    temperature: divides the logits; 0 is greedy.
    top_p: nucleus mass; 1 keeps every token.
    max_response_len: R, tokens a response may have, stop token included.
  """

  temperature: float = 1.0
  top_p: float = 1.0
  max_response_len: int = 64

  def __post_init__(self):
    if self.temperature < 0.0:
      raise types.UserError(
          f'sampler.temperature={self.temperature} must be >= 0.')
    if not 0.0 < self.top_p <= 1.0:
      raise types.UserError(
          f'sampler.top_p={self.top_p} must lie in (0, 1].')
    if self.max_response_len < 1:
      raise types.UserError(
          f'sampler.max_response_len={self.max_response_len} must be >= 1.')


@struct.dataclass
class PromptBatch:
  """Prompts of one bucket, padded.

  Attributes:
    tokens: i32[P, S] prompt ids without the last one, then padding.
    last_token: i32[P] the last prompt id; samples begin by reading it.
    lengths: i32[P] prompt lengths including the last id; 0 marks padding.
    numbers: u32[P] identity of the prompts, for their randomness.
  """

  tokens: jax.Array
  last_token: jax.Array
  lengths: jax.Array
  numbers: jax.Array


@struct.dataclass
class _Carry:
  """State of the decoding loop."""

  step: jax.Array  # i32[]
  token: jax.Array  # i32[P, G]
  is_finished: jax.Array  # bool[P, G]
  suffix: transformer.KeyValues  # f[L, P, G, R, K, H]
  rollouts: types.Rollouts


def prefix_meta(batch: PromptBatch) -> rows.TokenMeta:  # i32[P, S]
  """Metadata of the prompts' tokens: branch 0, padding has group -1."""
  position = jnp.broadcast_to(
      jnp.arange(batch.tokens.shape[1])[None], batch.tokens.shape)
  is_token = position < batch.lengths[:, None] - 1
  return rows.TokenMeta(
      group=jnp.where(is_token, 0, -1),
      branch=jnp.zeros_like(position),
      position=position)


def sample_keys(
    key: jax.Array,  # key[]
    numbers: jax.Array,  # u32[P]
    *,
    num_samples: int,
) -> jax.Array:  # key[P, G]
  """One key for each (prompt, sample number), whatever else is in the batch."""

  def one(number, sample):
    return jax.random.fold_in(jax.random.fold_in(key, number), sample)

  by_sample = jax.vmap(one, in_axes=(None, 0))
  return jax.vmap(by_sample, in_axes=(0, None))(
      numbers, jnp.arange(num_samples))


def _start(
    batch: PromptBatch,
    prefix: transformer.KeyValues,  # f[L, P, S, K, H]
    *,
    num_samples: int,
    max_len: int,
) -> _Carry:
  """The loop's state before the first token; padding prompts are finished."""
  shape = (batch.lengths.shape[0], num_samples)
  num_layers, *_, num_kv_heads, head_dim = prefix.key.shape
  cache_shape = (num_layers, *shape, max_len, num_kv_heads, head_dim)
  empty_cache = jnp.zeros(cache_shape, prefix.key.dtype)
  return _Carry(
      step=jnp.int32(0),
      token=jnp.broadcast_to(batch.last_token[:, None], shape),
      is_finished=jnp.broadcast_to((batch.lengths == 0)[:, None], shape),
      suffix=transformer.KeyValues(key=empty_cache, value=empty_cache),
      rollouts=types.Rollouts(
          tokens=jnp.zeros((*shape, max_len), jnp.int32),
          lengths=jnp.zeros(shape, jnp.int32),
          logprobs=jnp.zeros((*shape, max_len), jnp.float32),
          entropy=jnp.zeros((*shape, max_len), jnp.float32),
          entropy_t1=jnp.zeros((*shape, max_len), jnp.float32),
          is_finished=jnp.zeros(shape, bool)))


def generate(
    params: types.Params,
    batch: PromptBatch,
    key: jax.Array,
    *,
    num_samples: int,
    stop_ids: tuple[int, ...],
    sampler: SamplerConfig,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    backend: attention.Backend,
) -> types.Rollouts:
  """Samples `num_samples` responses to every prompt.

  Args:
    params: the policy.
    batch: P padded prompts.
    key: typed PRNG key; a sample depends on it, its prompt and its number.
    num_samples: G.
    stop_ids: ids that end a response.
    sampler: temperature, nucleus, length cap.
    config: sizes of the network.
    rules: logical axes to mesh axes.
    backend: attention backend of the prefill.

  Returns:
    The responses; those of padding prompts have length 0.
  """
  dims = chex.Dimensions()
  dims['PS'] = batch.tokens.shape
  chex.assert_shape([batch.last_token, batch.lengths, batch.numbers], dims['P'])
  max_len = sampler.max_response_len

  # Gathered over fsdp once, not once a token.
  gathered = dataclasses.replace(rules, table=rules_lib.DECODE)
  params = jax.lax.with_sharding_constraint(
      params,
      gathered.tree_shardings(transformer.parameter_axes(config), params))
  meta = prefix_meta(batch)
  prefix = transformer.prefill(
      params, batch.tokens, meta, config=config, rules=rules, backend=backend)
  keys = sample_keys(key, batch.numbers, num_samples=num_samples)
  head_weights = transformer.head_weights(params)
  fold_in = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)),
                     in_axes=(0, None))

  def body(carry: _Carry) -> _Carry:
    hidden, suffix = incremental.decode_step(
        params, carry.token, prefix, meta, carry.suffix, carry.step,
        jnp.maximum(batch.lengths - 1, 0), config=config, rules=rules)
    drawn = token_sampling.sample(
        head.logits(hidden, head_weights), fold_in(keys, carry.step),
        temperature=sampler.temperature, top_p=sampler.top_p)
    is_live = ~carry.is_finished
    is_stop = jnp.isin(drawn.token, jnp.asarray(stop_ids, jnp.int32))
    old = carry.rollouts

    def put(buffer, value):
      value = jnp.where(is_live, value, jnp.zeros_like(value))
      return jax.lax.dynamic_update_index_in_dim(
          buffer, value, carry.step, axis=2)

    rollouts = types.Rollouts(
        tokens=put(old.tokens, drawn.token),
        lengths=old.lengths + is_live,
        logprobs=put(old.logprobs, drawn.logprob),
        entropy=put(old.entropy, drawn.entropy),
        entropy_t1=put(old.entropy_t1, drawn.entropy_t1),
        is_finished=old.is_finished | (is_live & is_stop))
    return _Carry(
        step=carry.step + 1, token=drawn.token,
        is_finished=carry.is_finished | is_stop, suffix=suffix,
        rollouts=rollouts)

  def should_continue(carry: _Carry) -> jax.Array:
    return (carry.step < max_len) & ~jnp.all(carry.is_finished)

  start = _start(batch, prefix, num_samples=num_samples, max_len=max_len)
  return jax.lax.while_loop(should_continue, body, start).rollouts

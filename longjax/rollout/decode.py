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
    moe,
    parameters,
    transformer,
)
from longjax.model import compute as compute_lib
from longjax.parallel import rules as rules_lib
from longjax.parallel import token_order
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
    rules: rules_lib.Rules,
    moe_config: architecture.MoeConfig | None,
) -> _Carry:
  """The loop's state before the first token; padding prompts are finished.

  Experts are recorded if `moe_config` is given.
  """
  shape = (batch.lengths.shape[0], num_samples)
  num_layers, *_, num_kv_heads, head_dim = prefix.key.shape
  cache_shape = (num_layers, *shape, max_len, num_kv_heads, head_dim)
  empty_cache = rules.constrain(
      jnp.zeros(cache_shape, prefix.key.dtype),
      'layers', 'batch', None, None, 'kv_heads', None)
  expert_ids = None
  if moe_config:
    expert_ids = jnp.zeros(
        (*shape, max_len, num_layers, moe_config.num_active),
        moe_config.id_dtype)
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
          is_finished=jnp.zeros(shape, bool),
          expert_ids=expert_ids))


@struct.dataclass
class Prefilled:
  """What all samples share.

  Attributes:
    params: as the sampler keeps them, see `_for_sampling`.
    cache: keys and values of the prompts, f[L, P, S, K, H].
    meta: whose they are, i32[P, S], in the same order.
    order: that order, see `attention.order`.
    routing: where the prompts' tokens went; None without experts.
  """

  params: types.Params
  cache: transformer.KeyValues
  meta: rows.TokenMeta
  order: jax.Array | None
  routing: moe.Routing | None


def prefill(
    params: types.Params,
    batch: PromptBatch,
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> Prefilled:
  """Reads the prompts but for their last tokens.

  Keys and values stand in the order that balances the mesh axis `seq`.
  """
  prefill_rules = dataclasses.replace(rules, table=rules_lib.PREFILL)
  params = _for_sampling(params, config, prefill_rules, compute)
  meta = prefix_meta(batch)
  order = attention.order(meta, block_len=compute.block_len, rules=rules)
  tokens, meta = jax.tree.map(
      lambda x: rules.constrain(
          x if order is None else token_order.reorder(x, order),
          'batch', 'seq'),
      (batch.tokens, meta))
  cache, routing = transformer.prefill(
      params, tokens, meta, config=config, rules=prefill_rules,
      compute=compute)
  cache = jax.tree.map(
      lambda x: rules.constrain(
          x, 'layers', 'batch', 'seq', 'kv_heads', None), cache)
  return Prefilled(
      params=params, cache=cache, meta=meta, order=order, routing=routing)


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
    compute: compute_lib.Compute,
    record_experts: bool = False,
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
    compute: backends and dtype.
    record_experts: also return which experts tokens went to.

  Returns:
    The responses; those of padding prompts have length 0.
  """
  dims = chex.Dimensions()
  dims['PS'] = batch.tokens.shape
  chex.assert_shape([batch.last_token, batch.lengths, batch.numbers], dims['P'])
  max_len = sampler.max_response_len

  decode_rules = dataclasses.replace(rules, table=rules_lib.decode_table(
      rules.mesh, batch.tokens.shape[0]))
  prefilled = prefill(
      params, batch, config=config, rules=rules, compute=compute)
  params = prefilled.params
  prefix, meta = (
      jax.tree.map(lambda x, names=names: decode_rules.constrain(x, *names), x)
      for x, names in (
          (prefilled.cache, ('layers', 'batch', 'prefix', 'kv_heads', None)),
          (prefilled.meta, ('batch', 'prefix'))))
  keys = sample_keys(key, batch.numbers, num_samples=num_samples)
  head_weights = parameters.head_weights(params)
  fold_in = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)),
                     in_axes=(0, None))

  def body(carry: _Carry) -> _Carry:
    hidden, suffix, routing = incremental.decode_step(
        params, carry.token, prefix, meta, carry.suffix, carry.step,
        jnp.maximum(batch.lengths - 1, 0), config=config, rules=decode_rules,
        dtype=compute.activation_dtype)
    drawn = token_sampling.sample(
        head.logits(hidden, head_weights), fold_in(keys, carry.step),
        temperature=sampler.temperature, top_p=sampler.top_p)
    is_live = ~carry.is_finished
    is_stop = jnp.isin(drawn.token, jnp.asarray(stop_ids, jnp.int32))
    old = carry.rollouts

    def put(buffer, value):
      mask = is_live.reshape(is_live.shape + (1,) * (value.ndim - 2))
      value = jnp.where(mask, value, 0).astype(buffer.dtype)
      return jax.lax.dynamic_update_index_in_dim(
          buffer, value, carry.step, axis=2)

    rollouts = types.Rollouts(
        tokens=put(old.tokens, drawn.token),
        lengths=old.lengths + is_live,
        logprobs=put(old.logprobs, drawn.logprob),
        entropy=put(old.entropy, drawn.entropy),
        entropy_t1=put(old.entropy_t1, drawn.entropy_t1),
        expert_ids=(
            put(old.expert_ids, _by_token(routing)) if record_experts
            else None),
        is_finished=old.is_finished | (is_live & is_stop))
    return _Carry(
        step=carry.step + 1, token=drawn.token,
        is_finished=carry.is_finished | is_stop, suffix=suffix,
        rollouts=rollouts)

  def should_continue(carry: _Carry) -> jax.Array:
    return (carry.step < max_len) & ~jnp.all(carry.is_finished)

  start = _start(
      batch, prefix, num_samples=num_samples, max_len=max_len,
      rules=decode_rules, moe_config=config.moe if record_experts else None)
  rollouts = jax.lax.while_loop(should_continue, body, start).rollouts
  if not record_experts:
    return rollouts
  in_prefix = _by_token(prefilled.routing)
  if prefilled.order is not None:
    in_prefix = token_order.reorder(
        in_prefix, token_order.inverse(prefilled.order))
  assert config.moe is not None
  return dataclasses.replace(
      rollouts, prompt_expert_ids=in_prefix.astype(config.moe.id_dtype))


def _by_token(routing: moe.Routing | None) -> jax.Array:
  """Expert ids i32[L, ..., A] of a scan over layers as [..., L, A]."""
  assert routing is not None, 'the network has no experts'
  return jnp.moveaxis(routing.expert_ids, 0, -2)


def _for_sampling(
    params: types.Params,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> types.Params:
  """Weights cast and gathered once, not once a token."""
  axes = parameters.axes(config)

  def cast(path, leaf):
    # Whatever `projection.project` would cast; norms, biases and the router
    # are used in float32.
    name = path[-1].key
    if name.endswith(('norm', 'bias')) or name == 'router':
      return leaf
    return leaf.astype(compute.activation_dtype)

  return jax.lax.with_sharding_constraint(
      jax.tree_util.tree_map_with_path(cast, params),
      rules.tree_shardings(axes, params))

"""Prompts read in chunks and samples token by token, step by step.

What the sampler does, without its plan of who sits where: prompt p stands in
lane p, its samples sit in slots anywhere.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from longjax import rows, types
from longjax.model import architecture, cache, compute, incremental
from longjax.parallel import rules as rules_lib

COMPUTE = compute.Compute()


@functools.cache
def _compiled(config: architecture.ModelConfig, rules: rules_lib.Rules):
  def of_layers(write):
    return jax.jit(lambda old, new, *where: tuple(
        write(*layer, *where, rules=rules) for layer in zip(old, new)))

  return (
      jax.jit(functools.partial(
          incremental.read_chunk, config=config, rules=rules,
          compute=COMPUTE)),
      of_layers(cache.write_chunks), of_layers(cache.write_slots),
      jax.jit(functools.partial(
          incremental.decode_step, config=config, rules=rules)))


def hidden_states(
    params: types.Params,
    prompts: list[np.ndarray],  # i32[.] each
    samples: np.ndarray,  # i32[P, G, T]
    *,
    config: architecture.ModelConfig,
    rules: rules_lib.Rules,
    chunk_len: int,
    first_tick: np.ndarray | None = None,  # i32[P, G]
    num_begun: np.ndarray | None = None,  # i32[P, G]
    num_places: int = 0,
    seed: int = 0,
) -> np.ndarray:  # f32[P, G, T, D]
  """Hidden states of the samples' tokens.

  Args:
    params: the parameter tree.
    prompts: what stands before all samples of each.
    samples: T tokens each.
    config: of the network.
    rules: of the sampler, one device.
    chunk_len: tokens of a prompt read at once.
    first_tick: of the clock, at which each sample reads its first token; None
      means 0.
    num_begun: tokens of each that are read in one chunk, their states left 0;
      the first of those after them is read at `first_tick`. None means 0.
    num_places: of a ring; 0 means T.
    seed: who sits where.
  """
  read_chunk, write_chunks, write_slots, decode_step = _compiled(config, rules)
  num_prompts, num_samples, num_tokens = samples.shape
  num_places = num_places or num_tokens
  zeros = np.zeros((num_prompts, num_samples), int)
  first_tick = zeros if first_tick is None else first_tick
  num_begun = zeros if num_begun is None else num_begun
  lengths = np.int32([len(prompt) for prompt in prompts])
  lane_len = -(-int(lengths.max()) // chunk_len) * chunk_len
  positions = cache.lane_positions(
      lane_len, chunk_len=chunk_len, num_devices=1)

  def empty(number, length, names):
    # Whatever stands in places that are not written must not be seen.
    shape = number, config.num_kv_heads, length, config.head_dim
    made = cache.empty(config.num_layers, shape, jnp.float32, names, rules)
    return jax.tree.map(lambda x: x + 1e3, made)

  lanes = empty(num_prompts, lane_len, cache.LANES)
  slots = empty(num_prompts * num_samples, num_places, cache.SLOTS)
  for start in range(0, lane_len, chunk_len):
    tokens = np.zeros((num_prompts, chunk_len), np.int32)
    for p, prompt in enumerate(prompts):
      chunk = prompt[start:start + chunk_len]
      tokens[p, :len(chunk)] = chunk
    position = np.tile(start + np.arange(chunk_len), (num_prompts, 1))
    meta = rows.TokenMeta(
        group=np.where(position < lengths[:, None], 0, -1),
        branch=np.zeros_like(position), position=position)
    starts = np.full(num_prompts, start, np.int32)
    made = read_chunk(
        params, tokens, meta, lanes, np.arange(num_prompts),
        cache.lane_meta(np.minimum(starts, lengths), positions))
    lanes = write_chunks(
        lanes, made.new, np.arange(num_prompts), starts, starts < lengths)

  slot_of = np.random.default_rng(seed).permutation(
      num_prompts * num_samples).reshape(num_prompts, num_samples)
  seats = incremental.Seats(
      slot=np.int32(slot_of),
      seat=np.int32(np.argsort(slot_of, axis=None)))
  by_slot = seats.seat
  texts = samples.reshape(-1, num_tokens)[by_slot]
  first_tick, begun = (
      x.reshape(-1)[by_slot] for x in (first_tick, num_begun))
  lane_meta = cache.lane_meta(lengths, positions)
  out = np.zeros((len(texts), num_tokens, config.embed_dim), np.float32)
  for tick in range(int((first_tick + num_tokens - begun).max())):
    for slot in np.flatnonzero((first_tick == tick) & (begun > 0)):
      index = np.arange(num_places)[None]
      lane = np.int32([by_slot[slot] // num_samples])
      tokens = np.zeros((1, num_places), np.int32)
      tokens[0, :begun[slot]] = texts[slot, :begun[slot]]
      made = read_chunk(
          params, tokens, rows.TokenMeta(
              group=np.where(index < begun[slot], 0, -1),
              branch=np.ones_like(index), position=lengths[lane] + index),
          lanes, lane, cache.lane_meta(lengths[lane], positions))
      slots = write_slots(
          slots, made.new, np.int32([slot]),
          np.int32([(tick - begun[slot]) % num_places]), np.ones(1, bool))
    num_read = begun + tick - first_tick
    is_live = (tick >= first_tick) & (num_read < num_tokens)
    # The others read something too.
    num_read = np.where(is_live, num_read, 0)
    states, slots, _ = decode_step(
        params, texts[np.arange(len(texts)), num_read], np.int32(num_read),
        np.int32(tick), seats, lanes, lane_meta, lengths, slots)
    out[is_live, num_read[is_live]] = np.asarray(states)[is_live]
  in_order = np.empty_like(out)
  in_order[by_slot] = out
  return in_order.reshape(num_prompts, num_samples, num_tokens, -1)

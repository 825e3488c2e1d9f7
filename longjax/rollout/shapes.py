"""Arguments of the sampler's programs as shapes, each where it will lie.

From them a program is lowered for a mesh of devices that need not exist, and
the compiler says what memory it takes.

P lanes, M slots, A chunks read at once, C tokens of a chunk, R places of a
slot, X shards of lanes and slots.
"""

from typing import Any

import jax
import jax.numpy as jnp

from longjax import types
from longjax.model import cache, incremental, parameters
from longjax.rollout import decode, engine

# A jitted function and the shapes of its arguments.
Program = tuple[Any, tuple[Any, ...]]


def fill(programs: decode.Programs, config: engine.EngineConfig) -> Program:
  """A chunk of as many prompts as are read at once."""
  num_chunks = programs.chunks_at_once(config.prompts_at_once)
  number = _whole(programs, jnp.int32, num_chunks)
  job = decode.Fill(
      tokens=_whole(programs, jnp.int32, num_chunks, programs.chunk_len),
      lane=number, start=number, length=number,
      is_used=_whole(programs, jnp.bool_, num_chunks))
  lanes, _ = caches(programs, config)
  return jax.jit(programs.fill, donate_argnums=1), (
      params(programs), lanes, job)


def resume(programs: decode.Programs, config: engine.EngineConfig) -> Program:
  """What one sample of each shard had written before."""
  num_shards = programs.rules.decode.size('batch')
  number = _whole(programs, jnp.int32, num_shards)
  job = decode.Resume(
      tokens=_whole(programs, jnp.int32, num_shards, programs.num_places),
      num_read=number, lane=number, lane_length=number, slot=number,
      is_used=_whole(programs, jnp.bool_, num_shards))
  clock = _whole(programs, jnp.int32)
  return jax.jit(programs.resume, donate_argnums=2), (
      params(programs), *caches(programs, config), clock, job)


def write(programs: decode.Programs, config: engine.EngineConfig) -> Program:
  """Many tokens of every sample that is written at once."""
  num_slots, num_lanes = config.num_slots, config.prompts_at_once
  key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
  number = _whole(programs, jnp.int32, num_slots)
  count = _whole(programs, jnp.int32)
  samples = decode.Samples(
      token=number, num_read=number, max_len=number,
      is_live=_whole(programs, jnp.bool_, num_slots),
      key=_whole(programs, key.dtype, num_slots, *key.shape), number=number,
      seats=incremental.Seats(
          slot=_whole(
              programs, jnp.int32, num_lanes, config.samples_per_prompt),
          seat=number),
      lane_length=_whole(programs, jnp.int32, num_lanes))
  return jax.jit(programs.write, donate_argnums=2), (
      params(programs), *caches(programs, config), count, samples, count,
      count)


def params(programs: decode.Programs) -> types.Params:
  """Weights as the sampler keeps them."""
  made = jax.eval_shape(
      programs.prepare, parameters.abstract(programs.config))
  return _placed(made, programs.rules.decode.tree_shardings(
      parameters.axes(programs.config), made))


def caches(
    programs: decode.Programs, config: engine.EngineConfig
) -> tuple[cache.Cache, cache.Cache]:
  """Lanes f[P, K, S, H] and slots f[M, K, R, H], by layer."""
  rules = programs.rules.decode
  lanes, slots = jax.eval_shape(lambda: programs.allocate(
      config.prompts_at_once, config.num_slots))

  def where(tree, names):
    return jax.tree.map(
        lambda x: rules.sharding(*rules.fit(x.shape, *names)), tree)

  return (_placed(lanes, where(lanes, cache.LANES)),
          _placed(slots, where(slots, cache.SLOTS)))


def _whole(programs, dtype, *shape) -> Any:
  """Of what the host hands over: whole on every device."""
  return jax.ShapeDtypeStruct(
      shape, dtype, sharding=programs.rules.decode.sharding())


def _placed(tree, shardings):
  return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=sharding), tree, shardings)

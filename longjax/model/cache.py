"""Keys and values that outlive a program: prompts in lanes, samples in slots.

A lane holds one copy of a prompt, whatever number of samples read it. Prompts
are written chunk by chunk; where lanes are split over devices, every chunk is,
so that a chunk is written without moving what is there and every device holds
its share of prompts of any length:

  2 devices, chunks of 4:   tokens  0 1 4 5 8 9 .. | 2 3 6 7 10 11 ..

A slot holds what one sample has read of its own, in a ring: at tick t of the
clock all samples write to place t mod R, wherever each of them is in its text.
One place for all is one cheap write, and a sample that ends gives its slot to
the next without any being moved.

Heads stand before tokens: decoding multiplies matrices of tokens head by head.
Every layer has arrays of its own. In one array of all layers, each token would
first copy a layer out of it and then read the copy: 7 GiB of temporaries for
0.6B on v5p, and a fifth of the time on a CPU.

L layers, P lanes, S places of a lane, M slots, R places of a slot, A chunks
written at once, C tokens of a chunk, N query heads, K key heads, H head size,
X shards of lanes and slots; numbers of lanes and slots count within a shard.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longjax import rows
from longjax.parallel import rules as rules_lib

LANES = ('batch', 'kv_heads', 'prefix', None)
SLOTS = ('batch', 'kv_heads', None, None)
CHUNKS = ('batch', 'kv_heads', 'seq', None)


@struct.dataclass
class KeyValues:
  """Rotated keys and values of a layer, f[..., K, S, H] each."""

  key: jax.Array
  value: jax.Array


# Of all layers.
Cache = tuple[KeyValues, ...]


def empty(
    num_layers: int,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    logical: tuple[str | None, ...],
    rules: rules_lib.Rules,
) -> Cache:
  """Zeros in their place, for `LANES` or `SLOTS`."""

  def zeros():
    return rules.constrain(jnp.zeros(shape, dtype), *logical)

  return tuple(
      KeyValues(key=zeros(), value=zeros()) for _ in range(num_layers))


def lane_positions(
    lane_len: int, *, chunk_len: int, num_devices: int
) -> np.ndarray:  # i32[S]
  """Positions of the tokens at a lane's places, see the module's docstring."""
  chunks = np.arange(lane_len, dtype=np.int32).reshape(
      -1, num_devices, chunk_len // num_devices)
  return chunks.swapaxes(0, 1).reshape(-1)


def lane_meta(
    lengths: jax.Array,  # i32[P]
    positions: np.ndarray,  # i32[S]
) -> rows.TokenMeta:  # i32[P, S]
  """Metadata of lanes of which `lengths` tokens are written: branch 0."""
  position = jnp.broadcast_to(
      jnp.asarray(positions)[None], (lengths.shape[0], positions.size))
  return rows.TokenMeta(
      group=jnp.where(position < lengths[:, None], 0, -1),
      branch=jnp.zeros_like(position),
      position=position)


def slot_meta(
    num_read: jax.Array,  # i32[M]
    first_position: jax.Array,  # i32[M]
    clock: jax.Array,  # i32[]
    num_places: int,
) -> rows.TokenMeta:  # i32[M, R]
  """Metadata of the slots' rings after the write at tick `clock`.

  Args:
    num_read: tokens each sample had read before this tick.
    first_position: position of the first of them.
    clock: ticks so far.
    num_places: R.
  """
  ticks_ago = (clock - jnp.arange(num_places)) % num_places
  index = num_read[:, None] - ticks_ago[None]
  return rows.TokenMeta(
      # What stood there before the sample began is another's.
      group=jnp.where(index >= 0, 0, -1),
      branch=jnp.ones_like(index),
      position=first_position[:, None] + index)


def take_lanes(
    lanes: KeyValues,  # f[P, K, S, H]
    lane: jax.Array,  # i32[A]
    *,
    rules: rules_lib.Rules,
) -> KeyValues:  # f[A, K, S, H]
  """Some lanes of a layer."""

  def local(x, lane):
    return jax.lax.map(
        lambda i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), lane)

  def of(x):
    return _on_shards(local, (x, lane), (LANES, ('batch',)), LANES, rules)

  return jax.tree.map(of, lanes)


def write_chunks(
    lanes: KeyValues,  # f[P, K, S, H]
    new: KeyValues,  # f[A, K, C, H]
    lane: jax.Array,  # i32[A]
    start: jax.Array,  # i32[A]
    is_used: jax.Array,  # bool[A]
    *,
    rules: rules_lib.Rules,
) -> KeyValues:
  """Writes chunks into lanes, from position `start`, a multiple of C, on."""
  num_devices = rules.size('prefix')

  def local(x, new, lane, start, is_used):
    def write(a, x):
      at = (lane[a], 0, start[a] // num_devices, 0)
      return _put(x, new[a][None], at, is_used[a])

    return jax.lax.fori_loop(0, lane.shape[0], write, x)

  def of(x, new):
    return _on_shards(
        local, (x, new, lane, start, is_used),
        (LANES, CHUNKS, ('batch',), ('batch',), ('batch',)), LANES, rules)

  return jax.tree.map(of, lanes, new)


def copy_lanes(
    lanes: KeyValues,  # f[P, K, S, H]
    source: jax.Array,  # i32[X]
    target: jax.Array,  # i32[X]
    is_used: jax.Array,  # bool[X]
    *,
    rules: rules_lib.Rules,
) -> KeyValues:
  """Copies one lane within each shard."""

  def local(x, source, target, is_used):
    lane = jax.lax.dynamic_index_in_dim(x, source[0])
    return _put(x, lane, (target[0], 0, 0, 0), is_used[0])

  def of(x):
    return _on_shards(
        local, (x, source, target, is_used),
        (LANES, ('batch',), ('batch',), ('batch',)), LANES, rules)

  return jax.tree.map(of, lanes)


def write_slots(
    slots: KeyValues,  # f[M, K, R, H]
    new: KeyValues,  # f[A, K, R, H]
    slot: jax.Array,  # i32[A]
    first_place: jax.Array,  # i32[A]
    is_used: jax.Array,  # bool[A]
    *,
    rules: rules_lib.Rules,
) -> KeyValues:
  """Fills whole rings; token i of each goes to place (first + i) mod R."""

  def local(x, new, slot, first_place, is_used):
    def write(a, x):
      ring = jnp.roll(new[a], first_place[a], axis=1)
      return _put(x, ring[None], (slot[a], 0, 0, 0), is_used[a])

    return jax.lax.fori_loop(0, slot.shape[0], write, x)

  def of(x, new):
    return _on_shards(
        local, (x, new, slot, first_place, is_used),
        (SLOTS, SLOTS, ('batch',), ('batch',), ('batch',)), SLOTS, rules)

  return jax.tree.map(of, slots, new)


def write_token(
    slots: KeyValues,  # f[M, K, R, H]
    new: KeyValues,  # f[M, K, 1, H]
    clock: jax.Array,  # i32[]
) -> KeyValues:
  """Writes what all samples read at a tick."""
  place = clock % slots.key.shape[2]
  return jax.tree.map(
      lambda x, new: jax.lax.dynamic_update_slice_in_dim(
          x, new, place, axis=2), slots, new)


def gather(
    x: jax.Array,  # [M, ...]
    index: jax.Array,  # i32[Q, ...]
    logical: tuple[str | None, ...],
    *,
    rules: rules_lib.Rules,
) -> jax.Array:  # [Q, ..., ...]
  """x[index] within each shard of the leading dimensions.

  Args:
    x: dimensions `logical`.
    index: what to take; split as 'batch', whatever it may have besides.
    logical: names of x's dimensions, 'batch' first.
    rules: logical axes to mesh axes.
  """
  others = (None,) * (index.ndim - 1)
  return _on_shards(
      lambda x, index: x[index], (x, index), (logical, ('batch', *others)),
      ('batch', *others, *logical[1:]), rules)


def _put(x, new, at, is_used):
  """`new` written into `x` at a place, or nothing."""
  old = jax.lax.dynamic_slice(x, at, new.shape)
  return jax.lax.dynamic_update_slice(
      x, jnp.where(is_used, new.astype(x.dtype), old), at)


def _on_shards(
    local: Callable[..., Any],
    args: tuple[Any, ...],
    inputs: tuple[tuple[str | None, ...], ...],
    output: tuple[str | None, ...],
    rules: rules_lib.Rules,
) -> Any:
  """Calls `local` with each device's parts of arrays of these dimensions.

  Left to the compiler, indexing along a split dimension may collect all of it.
  """
  # Key heads stay whole where they do not divide, in all arrays alike.
  heads = next((args[0].shape[i] for i, name in enumerate(inputs[0])
                if name == 'kv_heads'), 0)
  (kv_heads,) = rules.fit((heads,), 'kv_heads')

  def spec(logical):
    return rules.spec(*(
        kv_heads if name == 'kv_heads' else name for name in logical))

  return jax.shard_map(
      local, mesh=rules.mesh, in_specs=tuple(spec(x) for x in inputs),
      out_specs=spec(output), check_vma=False)(*args)

"""Tests for longjax.model.cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax.model import cache
from longjax.parallel import rules as rules_lib
from tests import tiny_model

S, C, M, R, K, H = 32, 8, 16, 8, 2, 4

# Mesh, lanes: as many as all devices share, or fewer, whose length is split.
MESHES = {
    'one': ({}, 8), 'data=8': (dict(data=8), 8),
    'fsdp=2,seq=4': (dict(fsdp=2, seq=4), 8),
    'fsdp=2,seq=4, split': (dict(fsdp=2, seq=4), 2),
    'seq=4,tensor=2': (dict(seq=4, tensor=2), 4),
    'seq=4,tensor=2, split': (dict(seq=4, tensor=2), 6)}

on_meshes = pytest.mark.parametrize('mesh', MESHES)


def setting(mesh):
  """Rules of prefill and of decoding, lanes, and shards of lanes."""
  sizes, num_lanes = MESHES[mesh]
  made = rules_lib.for_sampler(tiny_model.rules(**sizes), num_lanes)
  shards = made.decode.size('batch')
  is_split = made.decode.size('prefix') > 1
  assert is_split == mesh.endswith('split')
  return made, num_lanes, shards


def random_layer(shape, rules, names, seed=0, num_heads=K):
  """Keys and values of a layer in their place, and as NumPy arrays."""
  rng = np.random.default_rng(seed)
  shape = shape[0], num_heads, shape[1], H
  given = {name: np.float32(rng.normal(size=shape))
           for name in ('key', 'value')}
  layers = jax.jit(functools.partial(
      cache.empty, 2, shape, jnp.float32, names, rules))()
  assert len(layers) == 2
  for leaf in jax.tree.leaves(layers):
    assert leaf.shape == shape and not np.asarray(leaf).any()
  made = jax.tree.map(
      jax.device_put, cache.KeyValues(**given),
      jax.tree.map(lambda x: x.sharding, layers[1]))
  return made, given


def assert_equal(got, want):
  for name, value in want.items():
    np.testing.assert_array_equal(getattr(got, name), value, err_msg=name)


def of_shard(local, shards, num_each):
  """Numbers over all shards of those counted within each."""
  each = len(local) // shards
  return [local[a] + a // each * num_each for a in range(len(local))]


def place_of(position, *, chunk_len, lane_len, num_devices):
  """Where a token stands in a lane: devices share every chunk."""
  chunk, within = divmod(position, chunk_len)
  share = chunk_len // num_devices
  device, i = divmod(within, share)
  return device * (lane_len // num_devices) + chunk * share + i


@pytest.mark.parametrize('lane_len, chunk_len, num_devices', [
    (24, 4, 2), (12, 4, 4), (8, 8, 1), (8, 8, 8), (6, 3, 3), (7, 1, 1)])
def test_devices_share_every_chunk_of_a_lane(
    lane_len, chunk_len, num_devices):
  got = cache.lane_positions(
      lane_len, chunk_len=chunk_len, num_devices=num_devices)
  want = np.full(lane_len, -1)
  for position in range(lane_len):
    place = place_of(position, chunk_len=chunk_len, lane_len=lane_len,
                     num_devices=num_devices)
    want[place] = position
  np.testing.assert_array_equal(got, want)


def test_a_lane_of_two_devices_is_laid_out_as_its_docstring_says():
  got = cache.lane_positions(12, chunk_len=4, num_devices=2)
  assert got.tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


def test_lanes_hold_as_many_tokens_as_were_written():
  positions = np.int32([0, 1, 4, 5, 2, 3, 6, 7])
  meta = cache.lane_meta(jnp.int32([0, 3, 8]), positions)
  for lane, length in enumerate([0, 3, 8]):
    for place in range(8):
      is_token = positions[place] < length
      assert meta.group[lane, place] == (0 if is_token else -1)
      assert meta.position[lane, place] == positions[place]
  assert not meta.branch.any()


@pytest.mark.parametrize('num_places', [1, 5, 8])
def test_rings_hold_their_samples_tokens_whenever_they_began(num_places):
  num_slots, rng = 6, np.random.default_rng(num_places)
  meta_of = jax.jit(cache.slot_meta, static_argnums=3)
  # Who wrote to each place last, and the position of the token.
  rings = [[None] * num_places for _ in range(num_slots)]
  who = [None] * num_slots  # Sample, first position, tokens it will read.
  num_read = np.zeros(num_slots, np.int32)
  first = np.zeros(num_slots, np.int32)
  samples, num_seen = 0, 0
  for tick in range(6 * num_places + 10):
    place = tick % num_places
    for slot in range(num_slots):
      if who[slot] is None and rng.random() < 0.4:
        # Some were begun elsewhere: the tokens before this one are filled in.
        begun = int(rng.integers(num_places)) if rng.random() < 0.5 else 0
        samples += 1
        who[slot] = samples, int(rng.integers(begun + 1, num_places + 1))
        num_read[slot], first[slot] = begun, rng.integers(100)
        for i in range(begun):
          rings[slot][(tick - begun + i) % num_places] = (
              samples, first[slot] + i)
      # Those who have ended write too, nobody knows what.
      rings[slot][place] = who[slot] and (
          who[slot][0], first[slot] + num_read[slot])
    # The clock may be counted in full or within the ring.
    clock = tick if rng.random() < 0.5 else place
    meta = jax.device_get(meta_of(
        num_read, first, np.int32(clock), num_places))
    assert (meta.branch == 1).all()
    for slot in range(num_slots):
      if who[slot] is None:
        continue
      for i, content in enumerate(rings[slot]):
        is_own = content is not None and content[0] == who[slot][0]
        assert meta.group[slot, i] == (0 if is_own else -1)
        if is_own:
          assert meta.position[slot, i] == content[1]
          num_seen += 1
      num_read[slot] += 1
      if num_read[slot] == who[slot][1]:
        who[slot] = None
  assert samples > num_slots and num_seen >= samples


@on_meshes
def test_lanes_are_taken_within_their_shards(mesh):
  made, num_lanes, shards = setting(mesh)
  rules, rng = made.prefill, np.random.default_rng(1)
  lanes, given = random_layer((num_lanes, S), rules, cache.LANES)
  take = jax.jit(functools.partial(cache.take_lanes, rules=rules))
  lane = np.int32(rng.integers(0, num_lanes // shards, 3 * shards))
  where = of_shard(lane, shards, num_lanes // shards)
  assert_equal(
      take(lanes, lane), {name: x[where] for name, x in given.items()})


@on_meshes
def test_chunks_are_written_where_their_positions_stand(mesh):
  made, num_lanes, shards = setting(mesh)
  rules, rng = made.prefill, np.random.default_rng(2)
  lanes, want = random_layer((num_lanes, S), rules, cache.LANES)
  each = num_lanes // shards
  write = jax.jit(
      functools.partial(cache.write_chunks, rules=rules), donate_argnums=0)
  for seed in range(3):
    new, chunks = random_layer(
        (2 * shards, C), rules, cache.CHUNKS, seed=seed + 10)
    lane = np.int32(np.concatenate([  # Two of a shard may go to one lane.
        rng.integers(0, each, 2) for _ in range(shards)]))
    start = np.int32(np.concatenate([
        rng.choice(S // C, 2, replace=False) * C for _ in range(shards)]))
    is_used = rng.random(2 * shards) < 0.7
    is_used[0] = seed > 0
    lanes = write(lanes, new, lane, start, is_used)
    for a, number in enumerate(of_shard(lane, shards, each)):
      for i in range(C):
        place = place_of(
            int(start[a]) + i, chunk_len=C, lane_len=S,
            num_devices=rules.size('prefix'))
        for name in want:
          if is_used[a]:
            want[name][number, :, place] = chunks[name][a, :, i]
    assert_equal(lanes, want)


@on_meshes
def test_lanes_are_copied_within_their_shards(mesh):
  made, num_lanes, shards = setting(mesh)
  rules, rng = made.decode, np.random.default_rng(3)
  lanes, want = random_layer((num_lanes, S), rules, cache.LANES)
  each = num_lanes // shards
  copy = jax.jit(
      functools.partial(cache.copy_lanes, rules=rules), donate_argnums=0)
  for is_used in (np.zeros(shards, bool), np.ones(shards, bool),
                  np.arange(shards) == shards - 1):
    source, target = np.int32(rng.integers(0, each, (2, shards)))
    lanes = copy(lanes, source, target, is_used)
    for x in np.flatnonzero(is_used):
      for name in want:
        want[name][x * each + target[x]] = want[name][x * each + source[x]]
    assert_equal(lanes, want)


@on_meshes
def test_whole_rings_are_filled_from_a_place_on(mesh):
  made, _, shards = setting(mesh)
  rules, rng = made.decode, np.random.default_rng(4)
  num_slots = 2 * shards
  slots, want = random_layer((num_slots, R), rules, cache.SLOTS)
  write = jax.jit(
      functools.partial(cache.write_slots, rules=rules), donate_argnums=0)
  for seed in range(3):
    new, rings = random_layer(
        (shards, R), rules, cache.SLOTS, seed=seed + 10)
    slot, first_place = np.int32(rng.integers(0, [[2], [R]], (2, shards)))
    is_used = rng.random(shards) < 0.7
    is_used[0] = seed > 0
    slots = write(slots, new, slot, first_place, is_used)
    for x in np.flatnonzero(is_used):
      for i in range(R):
        for name in want:
          want[name][x * 2 + slot[x], :, (first_place[x] + i) % R] = (
              rings[name][x, :, i])
    assert_equal(slots, want)


@on_meshes
def test_at_a_tick_all_samples_write_to_one_place(mesh):
  made, _, shards = setting(mesh)
  slots, want = random_layer((2 * shards, R), made.decode, cache.SLOTS)
  write = jax.jit(cache.write_token, donate_argnums=0)
  for clock in (3, R - 1, 5 * R + 2):
    new, tokens = random_layer(
        (2 * shards, 1), made.decode, cache.SLOTS, seed=clock)
    slots = write(slots, new, np.int32(clock))
    for name in want:
      want[name][:, :, clock % R] = tokens[name][:, :, 0]
    assert_equal(slots, want)


@on_meshes
@pytest.mark.parametrize('by', [(), (3,)], ids=str)
def test_what_is_gathered_lies_in_the_same_shard(mesh, by):
  made, _, shards = setting(mesh)
  rules, rng = made.decode, np.random.default_rng(5)
  x = np.float32(rng.normal(size=(M, 4, H)))
  index = np.int32(rng.integers(0, M // shards, (2 * shards, *by)))
  names = ('batch', 'heads', None)
  got = jax.jit(functools.partial(cache.gather, logical=names, rules=rules))(
      jax.device_put(x, rules.sharding(*names)), index)
  want = np.zeros((*index.shape, 4, H), np.float32)
  for q in np.ndindex(*index.shape):
    want[q] = x[q[0] // 2 * (M // shards) + index[q]]
  np.testing.assert_array_equal(got, want)


def test_key_heads_fewer_than_their_devices_are_kept_whole():
  rules = setting('seq=4,tensor=2')[0].decode
  lanes, want = random_layer((4, S), rules, cache.LANES, num_heads=1)
  assert lanes.key.sharding.shard_shape(lanes.key.shape)[1] == 1
  copy = jax.jit(functools.partial(cache.copy_lanes, rules=rules))
  assert_equal(
      copy(lanes, np.zeros(4, np.int32), np.zeros(4, np.int32),
           np.ones(4, bool)), want)
  taken = jax.jit(functools.partial(cache.take_lanes, rules=rules))(
      lanes, np.zeros(4, np.int32))
  assert_equal(taken, want)

"""Devices that hold token ids where others hold keys and values.

`Jitted` takes the place of `continuous.Jitted`: the sampler's programs as loops
over NumPy arrays, for one that writes what was laid down beforehand. Before
every call of `write` it looks whether each sample finds what it is to read: its
prompt in the lane, its own tokens at their places of the ring.

P lanes, S places of a lane, M slots, R places of a slot, X shards.
"""

import types

import jax
import numpy as np

from longjax.rollout import continuous, decode


def response(prompt: int, sample: int, length: int) -> np.ndarray:
  """What is laid down for a sample."""
  return (100 + 37 * prompt + 11 * sample + 3 * np.arange(length)) % 997


def request(
    prompt: int, tokens: list[int], max_lens: list[int], num_begun: list[int]
) -> continuous.Request:
  """Samples of a prompt; of some, tokens are there already."""
  return continuous.Request(
      tokens=tokens, key=np.uint32([prompt, 0]), max_lens=max_lens,
      begun=[response(prompt, g, n).tolist()
             for g, n in enumerate(num_begun)])


class Jitted:
  """Programs; what they are given is checked."""

  def __init__(
      self,
      *,
      lengths: np.ndarray,  # i32[prompts, samples]
      prompts: list[list[int]] | None = None,
      num_places: int = 0,
      lane_len: int = 4,
      chunk_len: int = 4,
      num_shards: int = 1,
      max_steps: int = 128,
  ):
    """Programs of samples that stop after `lengths` tokens.

    Args:
      lengths: tokens with the stop token.
      prompts: tokens of each; None means they are not looked at.
      num_places: R; 0 means as many as the longest sample reads.
      lane_len: S.
      chunk_len: tokens of a prompt read at once.
      num_shards: X.
      max_steps: tokens a call writes for each sample at most.
    """
    rules = types.SimpleNamespace(
        size=lambda name: num_shards,
        sharding=lambda: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    self.programs = types.SimpleNamespace(
        rules=types.SimpleNamespace(decode=rules), lane_len=lane_len,
        chunk_len=chunk_len, max_steps=max_steps,
        num_places=num_places or int(lengths.max()),
        # Fewer than some shards have lanes.
        chunks_at_once=lambda num_lanes: num_shards * min(
            num_lanes // num_shards, 2))
    self.num_read = 0  # Prompt tokens.
    self._lengths = lengths
    self._prompts = prompts
    self._num_shards = num_shards

  def allocate(self, num_lanes, num_slots):
    return (np.full((num_lanes, self.programs.lane_len), -1),
            np.full((num_slots, self.programs.num_places), -1))

  def _numbers(self, local, num_each):
    """Numbers of lanes or slots over all shards; `num_each` in a shard."""
    local = np.asarray(local)
    assert (local >= 0).all() and (local < num_each).all()
    shards = np.arange(local.size) // (local.size // self._num_shards)
    return shards * num_each + local

  def fill(self, params, lanes, job):
    job = jax.device_get(job)
    chunk_len = self.programs.chunk_len
    lane = self._numbers(job.lane, len(lanes) // self._num_shards)
    lanes = lanes.copy()
    for a in np.flatnonzero(job.is_used):
      start = job.start[a]
      assert start % chunk_len == 0 and start < job.length[a]
      chunk = np.where(np.arange(start, start + chunk_len) < job.length[a],
                       job.tokens[a], -1)
      lanes[lane[a], start:start + chunk_len] = chunk
      self.num_read += (chunk >= 0).sum()
    assert len(set(lane[job.is_used])) == job.is_used.sum()
    # Each token goes to an expert of its name.
    return lanes, job.tokens[..., None, None]

  def copy(self, lanes, source, target, is_used):
    each = len(lanes) // self._num_shards
    source, target = (self._numbers(x, each) for x in (source, target))
    lanes = lanes.copy()
    for x in np.flatnonzero(is_used):
      lanes[target[x]] = lanes[source[x]]
    return lanes

  def resume(self, params, lanes, slots, clock, job):
    job = jax.device_get(job)
    slot = self._numbers(job.slot, len(slots) // self._num_shards)
    slots = slots.copy()
    for x in np.flatnonzero(job.is_used):
      num_read = job.num_read[x]
      slots[slot[x]] = -1
      places = (int(clock) - num_read + np.arange(num_read)) % slots.shape[1]
      slots[slot[x], places] = job.tokens[x, :num_read]
    return slots

  def write(
      self, params, lanes, slots, clock, samples, max_steps, enough_live
  ):
    samples = jax.device_get(samples)
    clock, slots = int(clock), slots.copy()
    live = np.flatnonzero(samples.is_live)
    prompt, number = samples.key[:, 0].astype(int), samples.number
    assert len(set(zip(prompt[live], number[live]))) == live.size
    if self._prompts is not None:
      for slot in live:
        self._look(lanes, slots, clock, samples, slot)
    length = np.zeros(len(slots), int)
    length[live] = self._lengths[prompt[live], number[live]]
    left = np.where(
        samples.is_live,
        np.minimum(length, samples.max_len) - samples.num_read, 0)
    assert (left[live] > 0).all()
    # One step after another until no more are live than that.
    longest = np.sort(left[live])[::-1]
    num_steps = min(int(max_steps), int(longest[int(enough_live)]))
    num_new = np.minimum(left, num_steps)
    shape = (self.programs.max_steps, len(slots))
    tokens, read = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for slot in live:
      first, n = samples.num_read[slot], num_new[slot]
      text = response(prompt[slot], number[slot], length[slot])
      tokens[:n, slot] = text[first:first + n]
      read[0, slot] = samples.token[slot]
      read[1:n, slot] = tokens[:n - 1, slot]
      slots[slot, (clock + np.arange(n)) % slots.shape[1]] = read[:n, slot]
    is_written = np.arange(shape[0])[:, None] < num_new
    return slots, decode.Written(
        num_steps=np.int32(num_steps), num_new=num_new,
        is_stopped=samples.is_live & (samples.num_read + num_new == length),
        tokens=tokens, logprobs=-0.5 * is_written * tokens,
        entropy=0.25 * is_written * tokens,
        entropy_t1=0.125 * is_written * tokens,
        expert_ids=read[..., None, None])

  def _look(self, lanes, slots, clock, samples, slot):
    """Whether a sample finds what it is to read."""
    prompt, number = int(samples.key[slot, 0]), samples.number[slot]
    text, num_read = self._prompts[prompt], samples.num_read[slot]
    num_seats = samples.seats.slot.shape[1]
    slots_each = len(slots) // self._num_shards
    shard = slot // slots_each
    lane, seat = divmod(int(samples.seats.seat[slot]), num_seats)
    lane += shard * (len(lanes) // self._num_shards)
    assert samples.seats.slot[lane, seat] + shard * slots_each == slot
    assert samples.lane_length[lane] == len(text) - 1
    assert lanes[lane, :len(text) - 1].tolist() == text[:-1]
    # The last token of a prompt is read by its samples.
    read = [text[-1], *response(prompt, number, num_read)]
    assert samples.token[slot] == read[-1]
    places = (clock - num_read + np.arange(num_read)) % slots.shape[1]
    assert slots[slot, places].tolist() == read[:-1]

"""Continuous batching: samples take each other's places while others go on.

`ContinuousBatch` holds the lanes and slots of one prompt length on the devices
and who sits there on the host. Between two calls of `decode.Programs.write` it
hands out what was written, frees the slots of samples that ended, seats those
that wait and reads their prompts.
"""

import dataclasses
import itertools
from collections.abc import Generator, Sequence
from typing import Any

import jax
import numpy as np

from longjax import types
from longjax.model import incremental
from longjax.parallel import multihost
from longjax.rollout import decode, scheduler

# With others waiting, a call ends when one in so many slots is free.
_SLOTS_A_REFILL = 16


@dataclasses.dataclass(kw_only=True)
class Stats:
  """What sampling took; counts since the session began.

  Attributes:
    prompt_tokens: of prompts put into lanes, but for their last.
    reused_tokens: those of them that had been read before.
    written_tokens: by all samples.
    slot_steps: slots times steps; `written_tokens` of them were of use.
  """

  prompt_tokens: int = 0
  reused_tokens: int = 0
  written_tokens: int = 0
  slot_steps: int = 0

  def metrics(self) -> dict[str, float]:
    """Shares in [0, 1], for the log."""
    return {
        'sampler/utilization': self.written_tokens / max(self.slot_steps, 1),
        'sampler/prefix_hits': self.reused_tokens / max(self.prompt_tokens, 1),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt and what is to be written for it.

  Attributes:
    tokens: of the prompt.
    key: u32[...] raw PRNG key; a sample depends on it and on its number.
    max_lens: tokens that each sample may write, those of `begun` included.
    begun: of each sample the tokens it has written already; none if it is new.
  """

  tokens: Sequence[int]
  key: np.ndarray
  max_lens: Sequence[int]
  begun: Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
  """Tokens just written for one sample.

  Attributes:
    prompt: index of the request.
    sample: number of the sample.
    first: how many tokens it had before.
    is_stopped: the last one is a stop token.
    is_last: nothing follows.
    tokens: i32[.].
    logprobs: f32[.].
    entropy: f32[.].
    entropy_t1: f32[.].
    expert_ids: [., L, A]; None if not asked.
    prompt_expert_ids: [S, L, A] of the prompt, as it stands in its lane, with
      the first piece of a sample.
  """

  prompt: int
  sample: int
  first: int
  is_stopped: bool
  is_last: bool
  tokens: np.ndarray
  logprobs: np.ndarray
  entropy: np.ndarray
  entropy_t1: np.ndarray
  expert_ids: np.ndarray | None
  prompt_expert_ids: np.ndarray | None


class Jitted:
  """The compiled programs of one bucket."""

  def __init__(self, programs: decode.Programs):
    self.programs = programs
    self.prepare = jax.jit(programs.prepare)
    self.allocate = jax.jit(programs.allocate, static_argnums=(0, 1))
    self.fill = jax.jit(programs.fill, donate_argnums=1)
    self.copy = jax.jit(programs.copy, donate_argnums=0)
    self.resume = jax.jit(programs.resume, donate_argnums=2)
    self.write = jax.jit(programs.write, donate_argnums=2)

  def num_programs(self) -> int:
    """Programs compiled so far."""
    jitted: tuple[Any, ...] = (
        self.prepare, self.allocate, self.fill, self.copy, self.resume,
        self.write)
    return sum(x._cache_size() for x in jitted)


class ContinuousBatch:
  """Lanes and slots, and what is written in them with one set of weights."""

  def __init__(
      self,
      jitted: Jitted,
      params: types.Params,
      *,
      num_lanes: int,
      num_slots: int,
      num_seats: int,
      stats: Stats,
  ):
    """Allocates the caches.

    Args:
      jitted: the programs.
      params: as `decode.Programs.prepare` returns them.
      num_lanes: P.
      num_slots: M.
      num_seats: samples that may read one lane at a time.
      stats: counted up.
    """
    self._jitted = jitted
    self._programs = jitted.programs
    self._params = params
    self._stats = stats
    rules = jitted.programs.rules.decode
    self._everywhere = rules.sharding()
    self._num_shards = rules.size('batch')
    self._lanes_a_shard = num_lanes // self._num_shards
    self._slots_a_shard = num_slots // self._num_shards
    self._lanes, self._slots = jitted.allocate(num_lanes, num_slots)
    self._clock = 0
    self._plan = scheduler.Scheduler(
        num_lanes=num_lanes, num_slots=num_slots, num_seats=num_seats,
        num_shards=self._num_shards,
        chunk_len=jitted.programs.chunk_len)
    self._samples = _nobody(num_lanes, num_slots, num_seats)
    self._who: dict[int, tuple[int, int]] = {}  # Slot -> request, sample.
    # Where the tokens of each lane went, [S, L, A].
    self._expert_ids: dict[int, np.ndarray] = {}

  def run(
      self, requests: Sequence[Request], *, max_steps: int
  ) -> Generator[list[Piece], None, None]:
    """Writes samples of requests until all have ended.

    To close the generator abandons those that are not finished.

    Args:
      requests: prompts.
      max_steps: tokens of a piece at most.

    Yields:
      What a call wrote.
    """
    try:
      for i, request in enumerate(requests):
        unfinished = [
            g for g, (longest, begun) in enumerate(
                zip(request.max_lens, request.begun)) if len(begun) < longest]
        if unfinished:
          self._plan.submit(i, request.tokens[:-1], unfinished)
      while True:
        try:
          self._seat(requests)
        except BaseException:
          # Interrupted: what a lane was to hold may not all stand in it.
          self._plan.forget()
          raise
        if not self._who:
          return
        yield self._write(max_steps)
    finally:
      self._plan.abandon()
      self._samples.is_live[:] = False
      self._who.clear()

  def _seat(self, requests: Sequence[Request]) -> None:
    """Seats those who wait, and reads what they need."""
    unread: dict[int, int] = {}  # Lane -> the position it is read from.
    resumed = []
    for seating in self._plan.seat():
      request = requests[seating.prompt]
      if seating.put:
        self._put(seating, unread)
      self._place(seating, request)
      if request.begun[seating.sample]:
        resumed.append(seating)
    self._read(unread)
    by_shard: list[list[scheduler.Seating]] = [
        [] for _ in range(self._num_shards)]
    for seating in resumed:
      by_shard[seating.slot // self._slots_a_shard].append(seating)
    # One of each shard at a time.
    for some in itertools.zip_longest(*by_shard):
      self._resume([s for s in some if s is not None], requests)

  def _put(
      self, seating: scheduler.Seating, unread: dict[int, int]
  ) -> None:
    """Prepares a lane for a prompt, what is reused of it copied."""
    put, lane = seating.put, seating.lane
    assert put is not None
    if put.source is not None:
      if put.source in unread:
        self._read(unread)
      self._copy(put.source, lane)
    unread[lane] = put.num_reused
    length = self._plan.lanes[lane].tokens.size
    self._samples.lane_length[lane] = length
    self._stats.prompt_tokens += length
    self._stats.reused_tokens += put.num_reused

  def _place(self, seating: scheduler.Seating, request: Request) -> None:
    """Writes a sample's facts where the programs look for them."""
    slot, samples = seating.slot, self._samples
    begun = request.begun[seating.sample]
    lane, seat = self._plan.seated[slot]
    samples.token[slot] = begun[-1] if len(begun) else request.tokens[-1]
    samples.num_read[slot] = len(begun)
    samples.max_len[slot] = request.max_lens[seating.sample]
    samples.is_live[slot] = True
    samples.key[slot] = request.key
    samples.number[slot] = seating.sample
    num_seats = samples.seats.slot.shape[1]
    samples.seats.slot[lane, seat] = slot % self._slots_a_shard
    samples.seats.seat[slot] = lane % self._lanes_a_shard * num_seats + seat
    self._who[slot] = seating.prompt, seating.sample

  def _put_on_devices(self, tree: Any) -> Any:
    return multihost.put(tree, self._everywhere)

  def _copy(self, source: int, target: int) -> None:
    """Copies one lane to another of its shard."""
    shard = source // self._lanes_a_shard

    def at(value, dtype=np.int32):
      array = np.zeros(self._num_shards, dtype)
      array[shard] = value
      return array

    self._lanes = self._jitted.copy(self._lanes, *self._put_on_devices((
        at(source % self._lanes_a_shard), at(target % self._lanes_a_shard),
        at(True, bool))))
    if source in self._expert_ids:
      self._expert_ids[target] = self._expert_ids[source].copy()

  def _read(self, unread: dict[int, int]) -> None:
    """Reads prompts into their lanes to the end; empties `unread`."""
    chunk_len = self._programs.chunk_len
    num_lanes = self._lanes_a_shard * self._num_shards
    most = self._programs.chunks_at_once(num_lanes) // self._num_shards
    while True:
      by_shard: list[list[int]] = [[] for _ in range(self._num_shards)]
      for lane, start in list(unread.items()):
        if start >= self._plan.lanes[lane].tokens.size:
          del unread[lane]
        else:
          by_shard[lane // self._lanes_a_shard].append(lane)
      if not unread:
        return
      # Two programs: one chunk a shard, or as many as it takes at once.
      at_once = 1 if max(map(len, by_shard)) == 1 else most
      job = _no_fill(self._num_shards * at_once, chunk_len)
      read = []
      for shard, lanes in enumerate(by_shard):
        for i, lane in enumerate(lanes[:at_once]):
          read.append((shard * at_once + i, lane))
      for a, lane in read:
        tokens, start = self._plan.lanes[lane].tokens, unread[lane]
        chunk = tokens[start:start + chunk_len]
        job.tokens[a, :chunk.size] = chunk
        job.lane[a] = lane % self._lanes_a_shard
        job.start[a], job.length[a], job.is_used[a] = start, tokens.size, True
        unread[lane] = start + chunk_len
      self._lanes, expert_ids = self._jitted.fill(
          self._params, self._lanes, self._put_on_devices(job))
      if expert_ids is not None:
        self._keep_expert_ids(multihost.to_host(expert_ids), read, job)

  def _keep_expert_ids(
      self,
      expert_ids: np.ndarray,  # [A, C, L, A]
      read: Sequence[tuple[int, int]],
      job: decode.Fill,
  ) -> None:
    for a, lane in read:
      of_lane = self._expert_ids.setdefault(lane, np.zeros(
          (self._programs.lane_len, *expert_ids.shape[2:]), expert_ids.dtype))
      start = job.start[a]
      of_lane[start:start + expert_ids.shape[1]] = expert_ids[a]

  def _resume(
      self, seatings: Sequence[scheduler.Seating],
      requests: Sequence[Request],
  ) -> None:
    """Reads what samples had written before, each in a shard of its own."""
    job = _no_resume(self._num_shards, self._programs.num_places)
    for seating in seatings:
      request = requests[seating.prompt]
      shard, slot = divmod(seating.slot, self._slots_a_shard)
      read = [request.tokens[-1], *request.begun[seating.sample][:-1]]
      job.tokens[shard, :len(read)] = read
      job.num_read[shard] = len(read)
      job.lane[shard] = seating.lane % self._lanes_a_shard
      job.lane_length[shard] = self._samples.lane_length[seating.lane]
      job.slot[shard], job.is_used[shard] = slot, True
    clock, job = self._put_on_devices((np.int32(self._clock), job))
    self._slots = self._jitted.resume(
        self._params, self._lanes, self._slots, clock, job)

  def _write(self, max_steps: int) -> list[Piece]:
    """One call of the program that writes; frees the slots of who ended."""
    samples, num_slots = self._samples, self._samples.token.size
    enough_live = 0
    if self._plan.num_waiting:
      enough_live = max(
          len(self._who) - max(num_slots // _SLOTS_A_REFILL, 1), 0)
    self._slots, written = self._jitted.write(
        self._params, self._lanes, self._slots, *self._put_on_devices((
            np.int32(self._clock), samples, np.int32(max_steps),
            np.int32(enough_live))))
    written = multihost.to_host(written)
    num_steps = int(written.num_steps)
    self._clock = (self._clock + num_steps) % self._programs.num_places
    self._stats.slot_steps += num_slots * num_steps
    self._stats.written_tokens += int(written.num_new.sum())
    return [self._take(slot, written) for slot in sorted(self._who)]

  def _take(self, slot: int, written: decode.Written) -> Piece:
    """What the sample in a slot wrote; it leaves if that was all."""
    samples, num_new = self._samples, int(written.num_new[slot])

    def new(values):
      return None if values is None else values[:num_new, slot]

    prompt, sample = self._who[slot]
    first = int(samples.num_read[slot])
    is_stopped = bool(written.is_stopped[slot])
    is_last = is_stopped or first + num_new >= int(samples.max_len[slot])
    piece = Piece(
        prompt=prompt, sample=sample, first=first, is_stopped=is_stopped,
        is_last=is_last, tokens=new(written.tokens),
        logprobs=new(written.logprobs), entropy=new(written.entropy),
        entropy_t1=new(written.entropy_t1),
        expert_ids=new(written.expert_ids),
        prompt_expert_ids=(
            None if first else
            self._expert_ids.get(self._plan.seated[slot][0])))
    samples.num_read[slot] += num_new
    samples.token[slot] = piece.tokens[-1]
    if is_last:
      samples.is_live[slot] = False
      del self._who[slot]
      self._plan.release(slot)
    return piece


def _nobody(num_lanes: int, num_slots: int, num_seats: int) -> decode.Samples:
  """Free slots and empty lanes, as NumPy arrays."""

  def zeros(*shape):
    return np.zeros(shape, np.int32)

  key_shape = jax.eval_shape(
      lambda: jax.random.key_data(jax.random.key(0))).shape
  return decode.Samples(
      token=zeros(num_slots), num_read=zeros(num_slots),
      max_len=zeros(num_slots), is_live=np.zeros(num_slots, bool),
      key=np.zeros((num_slots, *key_shape), np.uint32),
      number=zeros(num_slots),
      seats=incremental.Seats(
          slot=zeros(num_lanes, num_seats), seat=zeros(num_slots)),
      lane_length=zeros(num_lanes))


def _no_fill(num_chunks: int, chunk_len: int) -> decode.Fill:
  def zeros(*shape):
    return np.zeros(shape, np.int32)

  return decode.Fill(
      tokens=zeros(num_chunks, chunk_len), lane=zeros(num_chunks),
      start=zeros(num_chunks), length=zeros(num_chunks),
      is_used=np.zeros(num_chunks, bool))


def _no_resume(num_shards: int, num_places: int) -> decode.Resume:
  def zeros(*shape):
    return np.zeros(shape, np.int32)

  return decode.Resume(
      tokens=zeros(num_shards, num_places), num_read=zeros(num_shards),
      lane=zeros(num_shards), lane_length=zeros(num_shards),
      slot=zeros(num_shards), is_used=np.zeros(num_shards, bool))

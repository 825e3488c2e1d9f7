"""Tests for longjax.rollout.scheduler."""

import dataclasses

import hypothesis
import numpy as np
from hypothesis import strategies as st

from longjax.rollout import continuous, scheduler
from tests.rollout import pretended

settings = hypothesis.settings(
    max_examples=150, deadline=None, derandomize=True)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of a scheduler."""

  num_lanes: int
  num_slots: int
  num_seats: int
  num_shards: int
  chunk_len: int


sizes = st.builds(
    lambda shards, lanes, slots, seats, chunk_len: Sizes(
        lanes * shards, slots * shards, seats, shards, chunk_len),
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 5),
    st.integers(1, 4), st.integers(1, 4))


class Room:
  """A scheduler, and who sits where by a count of our own."""

  def __init__(self, sizes: Sizes):
    self.sizes = sizes
    self.plan = scheduler.Scheduler(**dataclasses.asdict(sizes))
    self.contents = [[] for _ in range(sizes.num_lanes)]
    self.waiting = {}  # Prompt -> samples, in the order of the queue.
    self.tokens, self.lane = {}, {}  # Of each prompt.
    self.sitting = {}  # Slot -> prompt, sample, lane, seat.
    self.reused = 0

  def shard_of_lane(self, lane):
    return lane * self.sizes.num_shards // self.sizes.num_lanes

  def shard_of_slot(self, slot):
    return slot * self.sizes.num_shards // self.sizes.num_slots

  def submit(self, prompt, tokens, samples):
    self.plan.submit(prompt, tokens, samples)
    self.waiting[prompt] = list(samples)
    self.tokens[prompt] = list(tokens)

  def free_slots(self, shard):
    """How many slots of a shard nobody sits in."""
    return sum(
        self.shard_of_slot(slot) == shard and slot not in self.sitting
        for slot in range(self.sizes.num_slots))

  def free_lanes(self):
    """Lanes of which no prompt has samples that wait or sit."""
    read = {prompt for prompt, *_ in self.sitting.values()}
    busy = {self.lane[p] for p in read | self.waiting.keys()
            if p in self.lane}
    return set(range(self.sizes.num_lanes)) - busy

  def shared(self, lane, tokens):
    """First tokens a lane and a prompt have in common, in whole chunks."""
    n = 0
    for a, b in zip(self.contents[lane], tokens):
      if a != b:
        break
      n += 1
    return n // self.sizes.chunk_len * self.sizes.chunk_len

  def put(self, seating):
    """A prompt gets a lane."""
    prompt, lane, put = seating.prompt, seating.lane, seating.put
    assert prompt not in self.lane
    assert lane in self.free_lanes()
    # Those who came first have theirs.
    earlier = list(self.waiting)[:list(self.waiting).index(prompt)]
    assert all(p in self.lane for p in earlier)
    shard = self.shard_of_lane(lane)
    tokens, source = self.tokens[prompt], put.source
    if source is None:
      source = lane
    assert self.shard_of_lane(source) == shard
    assert put.num_reused % self.sizes.chunk_len == 0
    stands = self.contents[source][:put.num_reused]
    assert stands == tokens[:put.num_reused]
    assert len(stands) == put.num_reused
    # Nothing more could be reused, wherever there is room.
    rooms = {self.shard_of_lane(free) for free in self.free_lanes()
             if self.free_slots(self.shard_of_lane(free))}
    assert put.num_reused == max(
        self.shared(other, tokens) for other in range(self.sizes.num_lanes)
        if self.shard_of_lane(other) in rooms)
    self.contents[lane] = tokens
    self.lane[prompt] = lane
    self.reused += put.num_reused

  def seat(self):
    """Those who wait sit down; returns who, in order."""
    seated = []
    for seating in self.plan.seat():
      prompt, slot = seating.prompt, seating.slot
      if seating.put:
        self.put(seating)
      assert seating.lane == self.lane[prompt]
      assert self.shard_of_slot(slot) == self.shard_of_lane(seating.lane)
      assert seating.sample == self.waiting[prompt].pop(0)
      if not self.waiting[prompt]:
        del self.waiting[prompt]
      lane, seat = self.plan.seated[slot]
      assert lane == seating.lane and 0 <= seat < self.sizes.num_seats
      assert slot not in self.sitting
      assert (lane, seat) not in {who[2:] for who in self.sitting.values()}
      self.sitting[slot] = prompt, seating.sample, lane, seat
      seated.append((prompt, seating.sample))
    assert [p for p, _ in seated] == sorted(p for p, _ in seated)
    assert self.plan.num_waiting == sum(map(len, self.waiting.values()))
    self.nobody_stands_who_could_sit()
    return seated

  def nobody_stands_who_could_sit(self):
    for prompt in self.waiting:
      if prompt in self.lane:
        lane = self.lane[prompt]
        readers = [who for who in self.sitting.values() if who[2] == lane]
        assert len(readers) == self.sizes.num_seats or not self.free_slots(
            self.shard_of_lane(lane))
      else:
        assert not any(self.free_slots(self.shard_of_lane(lane))
                       for lane in self.free_lanes())

  def release(self, slot):
    del self.sitting[slot]
    self.plan.release(slot)

  def abandon(self):
    self.plan.abandon()
    self.waiting, self.sitting, self.lane = {}, {}, {}
    assert self.plan.num_waiting == 0 and not self.plan.seated


def prompt_tokens(rng, chunk_len):
  """Prompts that often begin alike."""
  length = int(rng.integers(0, 4 * chunk_len + 1))
  tokens = [1] * length
  if length and rng.integers(3):
    tokens[rng.integers(length):] = [int(rng.integers(2, 4))]
  return tokens


def play(room, rng, num_prompts, first=0, ends_after=None):
  """Prompts come, samples end in any order; all samples that were seated."""
  seated, expected = [], []
  numbers = list(range(first, first + num_prompts))
  while numbers or room.waiting or room.sitting:
    if ends_after is not None and len(seated) >= ends_after:
      return seated
    for _ in range(int(rng.integers(0, 4))):
      if numbers:
        prompt = numbers.pop(0)
        samples = list(range(int(rng.integers(1, 6))))
        room.submit(
            prompt, prompt_tokens(rng, room.sizes.chunk_len), samples)
        expected += [(prompt, sample) for sample in samples]
    seated += room.seat()
    # Else those who wait would wait for ever.
    assert room.sitting or not room.waiting
    for slot in list(room.sitting):
      if not rng.integers(3):
        room.release(slot)
  # Every sample once.
  assert sorted(seated) == expected
  return seated


@settings
@hypothesis.given(sizes, st.integers(0, 2**32 - 1))
def test_everyone_is_seated_once_with_what_the_plan_promises(sizes, seed):
  room = Room(sizes)
  play(room, np.random.default_rng(seed), num_prompts=12)
  assert not room.plan.seated and not room.plan.num_waiting
  assert all(lane.prompt is None for lane in room.plan.lanes)


@settings
@hypothesis.given(sizes, st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_after_all_is_abandoned_there_is_room_for_as_many(
    sizes, seed, ends_after):
  room, rng = Room(sizes), np.random.default_rng(seed)
  play(room, rng, num_prompts=12, ends_after=ends_after)
  room.abandon()
  # As many at once as at the beginning.
  fresh = Room(sizes)
  for prompt in range(50, 50 + sizes.num_slots):
    for one in (room, fresh):
      one.submit(prompt, [prompt], range(3))
  assert len(room.seat()) == len(fresh.seat())
  room.abandon()
  play(room, rng, num_prompts=6, first=100)


def test_in_one_shard_no_sample_begins_before_one_that_came_first():
  room = Room(Sizes(2, 3, 2, 1, 4))
  for prompt in range(3):
    room.submit(prompt, [prompt] * 5, range(3))
  # Lane 0 has two seats, so the third of its samples waits; slots are full.
  assert room.seat() == [(0, 0), (0, 1), (1, 0)]
  room.release(next(iter(room.sitting)))
  assert room.seat() == [(0, 2)]
  for slot in list(room.sitting):
    room.release(slot)
  # Prompt 0 has ended; prompt 1 keeps its lane.
  assert room.seat() == [(1, 1), (1, 2), (2, 0)]


def seat_one(plan, prompt, tokens):
  """The seat of a prompt's only sample."""
  plan.submit(prompt, tokens, [0])
  [seating] = plan.seat()
  return seating


def test_a_prompt_that_stands_in_a_lane_is_not_copied():
  plan = scheduler.Scheduler(
      num_lanes=3, num_slots=3, num_seats=1, num_shards=1, chunk_len=2)
  first = seat_one(plan, 0, [1, 2, 3, 4, 5])
  assert (first.put.num_reused, first.put.source) == (0, None)
  # While it is read, it is copied for others.
  second = seat_one(plan, 1, [1, 2, 3, 9])
  assert (second.put.num_reused, second.put.source) == (2, first.lane)
  assert second.lane != first.lane
  # Then it is continued where it stands.
  plan.release(first.slot)
  third = seat_one(plan, 2, [1, 2, 3, 4, 5, 6, 7])
  assert third.lane == first.lane
  assert (third.put.num_reused, third.put.source) == (4, None)


def test_what_others_may_begin_with_is_kept_while_a_lane_is_empty():
  plan = scheduler.Scheduler(
      num_lanes=2, num_slots=4, num_seats=1, num_shards=1, chunk_len=2)

  def seat(prompt, tokens):
    seating = seat_one(plan, prompt, tokens)
    plan.release(seating.slot)
    return seating.lane, seating.put.num_reused, seating.put.source

  assert seat(0, [1, 2, 3, 4, 5]) == (0, 0, None)
  assert seat(1, [1, 2, 9]) == (1, 2, 0)
  # No lane is empty now: the one of which nothing is lost is taken.
  assert seat(2, [1, 2, 8, 8, 8]) == (1, 2, None)
  assert seat(3, [1, 2, 3, 4, 5, 6]) == (0, 4, None)
  # Else the one that saves a copy.
  assert seat(4, [1, 2, 8, 8, 7, 7]) == (1, 4, None)
  assert seat(5, [1, 2, 8, 8, 6, 6]) == (1, 4, None)


def test_the_lane_that_was_filled_longest_ago_is_overwritten():
  plan = scheduler.Scheduler(
      num_lanes=3, num_slots=3, num_seats=1, num_shards=1, chunk_len=1)
  lanes = []
  for prompt in range(7):
    seating = seat_one(plan, prompt, [prompt])
    lanes.append(seating.lane)
    plan.release(seating.slot)
  assert sorted(lanes[:3]) == [0, 1, 2]
  assert lanes[3:] == lanes[:4]


def test_shards_are_filled_evenly():
  plan = scheduler.Scheduler(
      num_lanes=8, num_slots=8, num_seats=2, num_shards=4, chunk_len=4)
  shards = [seat_one(plan, prompt, [prompt]).slot // 2 for prompt in range(8)]
  assert sorted(shards[:4]) == sorted(shards[4:]) == [0, 1, 2, 3]


def lognormal_lengths(seed, num_prompts=128, num_samples=8):
  """A heavy tail: the longest response is 20 times the median one."""
  rng = np.random.default_rng(seed)
  drawn = rng.lognormal(np.log(1000.0), 1.0, (num_prompts, num_samples))
  return np.ceil(np.minimum(drawn, 20_000.0)).astype(int)


def utilization(lengths, *, num_lanes, num_slots):
  """Share of slot steps that wrote a token, until the last sample ended."""
  devices, stats = pretended.Jitted(lengths=lengths), continuous.Stats()
  batch = continuous.ContinuousBatch(
      devices, {}, num_lanes=num_lanes, num_slots=num_slots,
      num_seats=lengths.shape[1], stats=stats)
  requests = [
      pretended.request(p, [p, 0], lengths[p], [0] * lengths.shape[1])
      for p in range(len(lengths))]
  for _ in batch.run(requests, max_steps=devices.programs.max_steps):
    pass
  assert stats.written_tokens == lengths.sum()
  return stats.metrics()['sampler/utilization']


def one_batch_after_another(lengths, prompts_at_once):
  """Utilization where a batch of prompts runs until its longest has ended."""
  batches = lengths.reshape(-1, prompts_at_once * lengths.shape[1])
  return lengths.sum() / (batches.max(axis=1) * batches.shape[1]).sum()


def test_slots_are_busy_though_some_responses_are_very_long():
  lengths = lognormal_lengths(0)
  assert lengths.max() > 10 * lengths.mean()
  # Half as many lanes as slots, for a prompt keeps its lane to its last sample.
  assert utilization(lengths, num_lanes=8, num_slots=16) >= 0.85
  assert one_batch_after_another(lengths, 2) < 0.35

"""Who is read into which lane and written in which slot, and when.

Host only, and the same in every process: it sees lengths and token ids, never
arrays of a device. Prompts wait in a queue; a sample that ends frees its slot
for the next, of the same prompt or another. A prompt keeps its lane until all
its samples have ended. What stands in a lane then remains until another prompt
is put there, and whoever begins with the same tokens, in whole chunks, takes
them from it: turns of an agent, several questions about one document.

Lanes and slots are numbered over all shards of the mesh, shard by shard; a
sample sits in the shard of its lane.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np


@dataclasses.dataclass(kw_only=True)
class Lane:
  """A place for a prompt.

  Attributes:
    tokens: i32[.] what stands in it or is about to.
    prompt: whose samples read it now; None if it may be overwritten.
    seats: slot of each sample that reads it, None where there is none.
    last_used: when a prompt was last put there.
  """

  tokens: np.ndarray
  prompt: int | None = None
  seats: list[int | None]
  last_used: int = 0


@dataclasses.dataclass(kw_only=True)
class Waiting:
  """A prompt some of whose samples have not begun."""

  tokens: np.ndarray  # i32[.] those that go into a lane.
  samples: collections.deque[int]
  lane: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seating:
  """A sample that begins.

  Attributes:
    prompt: number of the prompt.
    sample: number of the sample.
    slot: where it is written.
    lane: of its prompt.
    put: how the lane is filled; None if it is.
  """

  prompt: int
  sample: int
  slot: int
  lane: int
  put: 'Put | None'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Put:
  """How a prompt gets into a lane.

  Attributes:
    num_reused: its first tokens that need not be read, whole chunks.
    source: the lane they stand in; None if it is this one already.
  """

  num_reused: int
  source: int | None


class Scheduler:
  """The seating plan of one set of lanes and slots."""

  def __init__(
      self,
      *,
      num_lanes: int,
      num_slots: int,
      num_seats: int,
      num_shards: int,
      chunk_len: int,
  ):
    """Everything empty.

    Args:
      num_lanes: P.
      num_slots: M.
      num_seats: samples that may read one lane at a time.
      num_shards: parts of lanes and slots; divides both.
      chunk_len: tokens that are reused or not as a whole.
    """
    self._chunk_len = chunk_len
    self._lanes_a_shard = num_lanes // num_shards
    self._slots_a_shard = num_slots // num_shards
    self._num_seats = num_seats
    self.lanes = [
        Lane(tokens=np.zeros(0, np.int32), seats=[None] * num_seats)
        for _ in range(num_lanes)]
    # Popped from the end: low numbers first.
    self._free = [
        [s * self._slots_a_shard + i
         for i in reversed(range(self._slots_a_shard))]
        for s in range(num_shards)]
    self._seat_of: dict[int, tuple[int, int]] = {}  # Slot -> lane, seat.
    self._waiting: dict[int, Waiting] = {}
    self._clock = 0

  @property
  def num_waiting(self) -> int:
    """Samples that have not begun."""
    return sum(len(w.samples) for w in self._waiting.values())

  @property
  def seated(self) -> dict[int, tuple[int, int]]:
    """Lane and seat of every slot in use."""
    return self._seat_of

  def submit(
      self, prompt: int, tokens: Sequence[int], samples: Sequence[int]
  ) -> None:
    """Queues samples of a prompt.

    Args:
      prompt: its number, new to this scheduler's queue.
      tokens: those that go into the lane.
      samples: numbers of the samples, at least one.
    """
    self._waiting[prompt] = Waiting(
        tokens=np.asarray(tokens, np.int32),
        samples=collections.deque(samples))

  def seat(self) -> Iterator[Seating]:
    """Seats as many waiting samples as there is room for, in their order.

    A lane named by a `Put` is to be filled before the next one is asked for:
    it may be the source of what follows.
    """
    for prompt, waiting in list(self._waiting.items()):
      while waiting.samples:
        put = None
        if waiting.lane is None:
          put = self._put(prompt, waiting)
          if put is None:
            break
        lane = waiting.lane
        assert lane is not None
        slot = self._take_seat(lane)
        if slot is None:
          break
        yield Seating(
            prompt=prompt, sample=waiting.samples.popleft(), slot=slot,
            lane=lane, put=put)
      if not waiting.samples:
        del self._waiting[prompt]
      if not any(self._free):
        return

  def release(self, slot: int) -> None:
    """The sample in this slot has ended."""
    number, seat = self._seat_of.pop(slot)
    self._free[slot // self._slots_a_shard].append(slot)
    lane = self.lanes[number]
    lane.seats[seat] = None
    if lane.prompt not in self._waiting and not any(
        s is not None for s in lane.seats):
      lane.prompt = None

  def abandon(self) -> None:
    """Forgets all who wait and all who sit."""
    waiting, self._waiting = self._waiting, {}
    for slot in list(self._seat_of):
      self.release(slot)
    for w in waiting.values():
      if w.lane is not None:
        self.lanes[w.lane].prompt = None

  def forget(self) -> None:
    """Nothing that stands in a lane is to be reused."""
    for lane in self.lanes:
      lane.tokens = np.zeros(0, np.int32)

  def _take_seat(self, number: int) -> int | None:
    """A free slot for a sample that reads this lane."""
    lane = self.lanes[number]
    free = self._free[number // self._lanes_a_shard]
    if not free or None not in lane.seats:
      return None
    slot, seat = free.pop(), lane.seats.index(None)
    lane.seats[seat] = slot
    self._seat_of[slot] = number, seat
    return slot

  def _put(self, prompt: int, waiting: Waiting) -> Put | None:
    """Gives a prompt the lane where most of it stands; None if all are full."""
    best_rank: tuple[int, ...] = ()
    best_lane, best_source = -1, -1
    reusable = [self._num_shared(lane, waiting.tokens) for lane in self.lanes]
    for number, lane in enumerate(self.lanes):
      shard = number // self._lanes_a_shard
      if lane.prompt is not None or not self._free[shard]:
        continue
      start = shard * self._lanes_a_shard
      sources = range(start, start + self._lanes_a_shard)
      # Without a copy, if it stands there; else from any lane of the shard.
      source = max(sources, key=reusable.__getitem__)
      if reusable[number] == reusable[source]:
        source = number
      # Best if no whole chunk is lost: others may begin with it.
      keeps_all = lane.tokens.size - reusable[number] < self._chunk_len
      rank = (reusable[source], keeps_all, source == number,
              len(self._free[shard]), -lane.last_used)
      if rank > best_rank:
        best_rank, best_lane, best_source = rank, number, source
    if not best_rank:
      return None
    self._clock += 1
    waiting.lane = best_lane
    lane = self.lanes[best_lane]
    lane.tokens, lane.prompt, lane.last_used = (
        waiting.tokens, prompt, self._clock)
    return Put(
        num_reused=reusable[best_source],
        source=None if best_source == best_lane else best_source)

  def _num_shared(self, lane: Lane, tokens: np.ndarray) -> int:
    """First tokens a lane has in common with a prompt, in whole chunks."""
    length = min(lane.tokens.size, tokens.size)
    differs = np.flatnonzero(lane.tokens[:length] != tokens[:length])
    shared = int(differs[0]) if differs.size else length
    return shared - shared % self._chunk_len

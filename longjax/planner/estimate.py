"""Roofline: how long a program takes if its slowest part runs at full rate.

A device computes, reads its memory and sends over its links at the same time,
each at the vendor's peak rate, so the slowest of the three sets the time. It
is a lower bound: real programs reach perhaps half of it.
"""

import dataclasses

from longjax.planner import topologies, workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """Seconds of one run of a program, each part as if it ran alone.

  Attributes:
    compute: executed operations of the busiest device.
    memory: bytes in and out of HBM.
    network: bytes over links, one collective after another.
    mfu: needed operations over what the slice could do in `seconds`.
  """

  compute: float
  memory: float
  network: float
  mfu: float

  @property
  def seconds(self) -> float:
    """Of the slowest part."""
    return max(self.compute, self.memory, self.network)

  @property
  def bound(self) -> str:
    """The slowest part."""
    parts = {'compute': self.compute, 'HBM': self.memory, 'ICI': self.network}
    return max(parts, key=lambda name: parts[name])


def roofline(
    work: workload.Work, chip: topologies.Chip, num_devices: int
) -> Roofline:
  """Of one run of a program on so many devices."""
  executed = work.executed
  busiest = (
      executed.layers + executed.head + executed.attention * work.imbalance
  ) / num_devices
  compute = busiest / chip.flops
  memory = work.memory_bytes / chip.memory_bandwidth
  network = sum(t.seconds(chip) for t in work.transfers)
  seconds = max(compute, memory, network)
  return Roofline(
      compute=compute, memory=memory, network=network,
      mfu=work.needed.total / (seconds * num_devices * chip.flops))

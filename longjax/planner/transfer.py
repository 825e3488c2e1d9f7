"""What a device sends, and how long its links take for it."""

import dataclasses
import enum

from longjax.planner import topologies


class Kind(enum.Enum):
  """How a collective uses the links of a torus."""

  BOTH_WAYS = 'both ways'  # Gathers, reductions: round the axis both ways.
  ONE_WAY = 'one way'  # Ring steps, always to the same neighbour.
  SCATTERED = 'scattered'  # All to all: to devices up to n / 2 links away.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
  """What one device sends for one purpose.

  Attributes:
    purpose: in words.
    kind: see there.
    num_devices: n.
    num_bytes: sent by one device.
  """

  purpose: str
  kind: Kind
  num_devices: int
  num_bytes: float

  def seconds(self, chip: topologies.Chip) -> float:
    """At full bandwidth of the links of one dimension of the torus."""
    rate = chip.link_bandwidth
    match self.kind:
      case Kind.BOTH_WAYS:
        return self.num_bytes / (2 * rate)
      case Kind.ONE_WAY:
        return self.num_bytes / rate
      case Kind.SCATTERED:
        # n / 4 links on average, and the axis is used both ways.
        return self.num_bytes * max(self.num_devices / 4, 1) / (2 * rate)

"""What was measured of a case, and what follows from it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from longjax.bench import measure, rates, suite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """A variant of a case.

  Attributes:
    case: its name.
    program: see `suite.Case`.
    variant: see `suite.Case`; of attention the backend.
    readings: of each timed run; none if it did not fit into memory.
    compile_seconds: spent by jax before the first of them.
    num_tokens: computed, each prompt once, whatever the variant.
    needed_flops: operations the mathematics asks for, each prompt once.
    own_flops: the same for the variant's own prompts, repeated or not.
    needed_bytes: that must be read from memory; 0 if that is not the limit.
    own_bytes: the same for the variant's own prompts.
    num_devices: that worked.
    peak_bytes: see `programs.Prepared`; 0 if not known.
    facts: other scalars by name: padding, loss, errors.
  """

  case: str
  program: str
  variant: str
  readings: Sequence[measure.Reading] = ()
  compile_seconds: float = 0.0
  num_tokens: int = 0
  needed_flops: float = 0.0
  own_flops: float = 0.0
  needed_bytes: float = 0.0
  own_bytes: float = 0.0
  num_devices: int = 1
  peak_bytes: int = 0
  facts: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def is_timed(self) -> bool:
    """Whether there is a time to report."""
    return bool(self.readings)

  @property
  def time(self) -> measure.Reading:
    """Medians of the runs."""
    return measure.median(self.readings)

  def figures(self, limits: rates.Rates) -> dict[str, Any]:
    """Everything by name, ready for JSON; None where it means nothing."""
    made = {
        'case': self.case, 'program': self.program, 'variant': self.variant,
        'compile_seconds': self.compile_seconds,
        'peak_bytes': self.peak_bytes or None, **self.facts}
    if not self.is_timed:
      return made
    time = self.time
    flops = limits.flops * self.num_devices
    bandwidth = limits.memory_bandwidth * self.num_devices
    return made | {
        'seconds': time.seconds,
        'cpu_seconds': time.cpu_seconds,
        'runs': [[r.seconds, r.cpu_seconds] for r in self.readings],
        'tokens': self.num_tokens,
        'tokens_per_second': self.num_tokens / time.seconds,
        'needed_flops': self.needed_flops,
        'own_flops': self.own_flops,
        'tflops': self.needed_flops / time.seconds / 1e12,
        'share_of_peak': self.needed_flops / time.seconds / flops,
        'needed_bytes': self.needed_bytes or None,
        'own_bytes': self.own_bytes or None,
        'share_of_bandwidth': (
            self.needed_bytes / time.seconds / bandwidth
            if self.needed_bytes and bandwidth else None),
        **time.values}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratio:
  """What sharing prompts gains in a case: unshared over shared.

  Attributes:
    case: its name.
    program: see `suite.Case`.
    ideal: of the operations needed; of decoding, of the bytes to be read.
    seconds: of the clock.
    cpu_seconds: of this process, all threads.
    peak_bytes: of memory.
  """

  case: str
  program: str
  ideal: float
  seconds: float
  cpu_seconds: float
  peak_bytes: float

  def figures(self) -> dict[str, Any]:
    """Everything by name, ready for JSON."""
    return dataclasses.asdict(self) | {
        'share_of_ideal': self.seconds / self.ideal,
        'cpu_share_of_ideal': self.cpu_seconds / self.ideal}


def ratios(records: Sequence[Record]) -> list[Ratio]:
  """One for every case whose two variants were timed."""
  by_case: dict[str, dict[str, Record]] = {}
  for record in records:
    if record.is_timed:
      by_case.setdefault(record.case, {})[record.variant] = record
  found = []
  for case, variants in by_case.items():
    shared: suite.Variant = 'shared'
    unshared: suite.Variant = 'unshared'
    if not {shared, unshared} <= variants.keys():
      continue
    one, many = variants[shared], variants[unshared]
    ideal = many.own_flops / one.own_flops
    if one.own_bytes:
      ideal = many.own_bytes / one.own_bytes
    found.append(Ratio(
        case=case, program=one.program, ideal=ideal,
        seconds=many.time.seconds / one.time.seconds,
        cpu_seconds=many.time.cpu_seconds / one.time.cpu_seconds,
        peak_bytes=many.peak_bytes / one.peak_bytes))
  return found

"""TPU slices by name, what their chips can do, and devices to compile for.

Figures are the vendor's, from the pages v5e, v5p, v6e and tpu7x below
cloud.google.com/tpu/docs: bfloat16 peak, memory bandwidth, and ICI bandwidth
over all links in both directions. The memory a program may use is what
libtpu's compiler allows.
"""

import dataclasses
import math
import os
from importlib import metadata

import jax
from jax.experimental import topologies

from longjax import config, types

_GIB = 1024**3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """What one jax device of a generation can do: a chip, or half of one.

  Attributes:
    kind: what jax calls it.
    devices_per_chip: 2 where a chip shows as two devices.
    memory_bytes: HBM a program may use.
    flops: bf16 operations a second.
    memory_bandwidth: bytes a second of HBM.
    link_bandwidth: bytes a second over one link in one direction.
    links: of the torus, two a dimension.
  """

  kind: str
  devices_per_chip: int = 1
  memory_bytes: float
  flops: float
  memory_bandwidth: float
  link_bandwidth: float
  links: int


CHIPS = {
    'v5e': Chip(
        kind='TPU v5 lite', memory_bytes=15.75 * _GIB, flops=197e12,
        memory_bandwidth=819e9, link_bandwidth=400e9 / 8, links=4),
    'v6e': Chip(
        kind='TPU v6 lite', memory_bytes=31.25 * _GIB, flops=918e12,
        memory_bandwidth=1638e9, link_bandwidth=800e9 / 8, links=4),
    'v5p': Chip(
        kind='TPU v5', memory_bytes=95.74 * _GIB, flops=459e12,
        memory_bandwidth=2765e9, link_bandwidth=1200e9 / 12, links=6),
    # Two devices share a chip, its memory and its links.
    'tpu7x': Chip(
        kind='TPU7x', devices_per_chip=2, memory_bytes=94.75 * _GIB,
        flops=2307e12 / 2, memory_bandwidth=7380e9 / 2,
        link_bandwidth=1200e9 / 12 / 2, links=6),
}

# Slices one can ask for, smallest first.
_2D = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_3D = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8',
       '8x8x16')
TOPOLOGIES = tuple(
    f'{generation}:{shape}' for generation, chip in CHIPS.items()
    for shape in (_2D if chip.links == 4 else _3D))


def chip(topology: str) -> Chip:
  """What each device of a topology can do.

  Raises:
    UserError: there is no such topology.
  """
  if topology not in TOPOLOGIES:
    near = _of_type(topology) or config.nearest(topology, TOPOLOGIES)
    raise types.UserError(
        f'--plan={topology} is no topology; did you mean {near}? Known: '
        + '; '.join(
            f'{generation}:' + ', '.join(
                name.partition(':')[2] for name in like(generation))
            for generation in CHIPS) + '.')
  return CHIPS[topology.partition(':')[0]]


def _of_type(name: str) -> str:
  """The topology of an accelerator type such as 'v5p-256'; '' if unknown."""
  generation, _, number = name.partition('-')
  generation = generation.replace('v5litepod', 'v5e')
  if generation not in CHIPS or not number.isdigit():
    return ''
  # v5p counts cores, of which a chip has two.
  size = int(number) // 2 if generation == 'v5p' else int(number)
  return next((t for t in like(generation) if num_chips(t) == size), '')


def like(topology: str) -> tuple[str, ...]:
  """The topologies of the same generation, smallest first."""
  generation = topology.partition(':')[0]
  return tuple(t for t in TOPOLOGIES if t.startswith(f'{generation}:'))


def num_chips(topology: str) -> int:
  """Chips of a slice; UserError if there is no such."""
  chip(topology)
  return math.prod(map(int, topology.partition(':')[2].split('x')))


def num_devices(topology: str) -> int:
  """What jax sees of it."""
  return num_chips(topology) * chip(topology).devices_per_chip


def compile_only() -> None:
  """Lets this process compile for TPUs and compute on the CPU.

  Must precede the first use of a device.
  """
  # A process that only compiles needs no chip of this machine, nor its lock.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  # What libtpu would ask a cloud machine, and else complains about at length.
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5e-4')
  jax.config.update('jax_platforms', 'cpu')


def devices(topology: str) -> list[jax.Device]:
  """The devices of a slice, to compile for.

  Raises:
    UserError: unknown topology, or libtpu is not installed.
  """
  chip(topology)
  libtpu_version()
  # Some versions of libtpu take it that a host has four chips.
  options = {}
  if num_chips(topology) == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  return list(topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **options).devices)


def libtpu_version() -> str:
  """The version of the compiler.

  Raises:
    UserError: it is not installed.
  """
  try:
    return metadata.version('libtpu')
  except metadata.PackageNotFoundError as error:
    raise types.UserError(
        '--plan compiles with libtpu, which is not installed: '
        'LONGJAX_EXTRAS=tpu bash launch/local.sh installs it (Linux, no TPU '
        'needed).') from error

"""The only place that builds a device mesh.

Axes, outermost first; a logical axis reaches them through `parallel.rules`:

  data    rows, parameters replicated; outermost over several TPU slices
  fsdp    rows, parameters sharded
  seq     token positions
  tensor  heads, ffn channels, vocabulary
  expert  experts of a mixture
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from longjax import types


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; -1 (at most once) takes the rest."""

  data: int = -1
  fsdp: int = 1
  seq: int = 1
  tensor: int = 1
  expert: int = 1

  def __post_init__(self):
    sizes = dataclasses.asdict(self)
    for name, size in sizes.items():
      if size != -1 and size < 1:
        raise types.UserError(
            f'mesh.{name}={size} must be >= 1, or -1 for the rest.')
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
      raise types.UserError(
          f'mesh axes {" and ".join(rest)} are both -1; only one axis can '
          'take the rest of the devices.')


AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


def split_cpu(num_devices: int) -> None:
  """Makes jax see the host's CPU as `num_devices` devices.

  Must precede the first use of a device. Accelerators are unaffected.

  Args:
    num_devices: one a core lets every core work on rows of its own, where a
      single device leaves small operations to one core.

  Raises:
    UserError: the number is not positive.
  """
  if num_devices < 1:
    raise types.UserError(f'cpu_devices={num_devices} must be >= 1.')
  if jax.config.values['jax_num_cpu_devices'] != num_devices:
    jax.config.update('jax_num_cpu_devices', num_devices)


def make(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Builds the mesh.

  Args:
    config: devices along each axis.
    devices: what to lay out; None means all devices of all processes.

  Returns:
    A mesh over exactly these devices with all five axes, also those of size
    1. Axis types are Auto: the default of recent jax, Explicit, raises where a
    sharded dimension is contracted.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or TPU slices
      do not divide over `data`.
  """
  devices = jax.devices() if devices is None else devices
  shape = sizes(config, len(devices))
  slices = sorted({_slice_of(device) for device in devices})
  if shape['data'] % len(slices):
    raise types.UserError(
        f'mesh.data={shape["data"]} does not divide over {len(slices)} TPU '
        'slices. The network between slices is slow, so each holds whole '
        f'copies of the model; use a multiple of {len(slices)}.')
  shape['data'] //= len(slices)
  # Neighbours on an axis become neighbours in a TPU's torus, also where an axis
  # takes only part of one side of it, which `jax.make_mesh` refuses.
  grids = [
      mesh_utils.create_device_mesh(
          tuple(shape.values()),
          [device for device in devices if _slice_of(device) == number],
          allow_split_physical_axes=True)
      for number in slices]
  return Mesh(
      np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slice_of(device: jax.Device) -> int:
  """Which TPU slice a device belongs to; other devices are all in one."""
  return getattr(device, 'slice_index', 0) if device.platform == 'tpu' else 0


def sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
  """Devices along each axis, -1 filled in; UserError as for `make`."""
  given = dataclasses.asdict(config)
  wanted = ', '.join(f'{name}={size}' for name, size in given.items())
  known = math.prod(size for size in given.values() if size != -1)
  rest, remainder = divmod(num_devices, known)
  if remainder or rest == 0:
    raise types.UserError(
        f'mesh ({wanted}) needs a multiple of {known} devices but there are '
        f'{num_devices}; change the sizes or set one of them to -1.')
  if -1 not in given.values() and rest != 1:
    raise types.UserError(
        f'mesh ({wanted}) uses {known} of {num_devices} devices; the sizes '
        f'must multiply to {num_devices}, or set one of them to -1.')
  return {name: rest if size == -1 else size for name, size in given.items()}

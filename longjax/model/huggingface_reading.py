"""One parameter from files to devices, staged on the host in small blocks.

Every process reads what its own devices hold. A block of that, of at most
`STAGED_BYTES`, is read in the order and dtype in which it is stored; the
device turns it, casts it and writes it into its part of the parameter, which
is donated from block to block. A parameter of one block is turned on the host:
nothing has to be compiled for it.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longjax.model import huggingface_layout, tensor_file

# What waits on the host for all devices of this process.
STAGED_BYTES = 1 << 28

# First and last + 1 along each dimension, in stored order.
_Box = tuple[tuple[int, int], ...]


def parameter(
    layout: huggingface_layout.Layout,
    sharding: jax.sharding.Sharding,
    tensors: Mapping[str, tensor_file.Tensor],
    dtype: np.dtype,
) -> jax.Array:
  """One parameter, each device's part from its own place in the files."""
  stored = {tensors[name].dtype for name in layout.tensor_names()}
  staged_dtype = tensor_file.DTYPES[stored.pop() if len(stored) == 1 else 'F32']
  devices: dict[_Box, list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(
      layout.shape).items():
    assert index is not None
    devices.setdefault(_box(layout, index), []).append(device)
  to_ours = tuple(int(d) for d in np.argsort(layout.order))
  size = [last - first for first, last in next(iter(devices))]
  parts: dict[jax.Device, jax.Array] = {}
  for block in blocks(layout, size, len(devices) * staged_dtype.itemsize):
    block_size = tuple(last - first for first, last in block)
    staged = {box: np.empty(block_size, staged_dtype) for box in devices}
    _stage(staged, block, layout, tensors)
    start = tuple(block[d][0] for d in to_ours)
    for box, array in staged.items():
      if block_size == tuple(size):
        whole = np.ascontiguousarray(array.transpose(to_ours), dtype)
        parts |= {d: jax.device_put(whole, d) for d in devices[box]}
        continue
      for device in devices[box]:
        if device not in parts:
          parts[device] = _zeros(
              tuple(size[d] for d in to_ours), dtype, device)
        parts[device] = _put_block(
            parts[device], jax.device_put(array, device), start, order=to_ours)
    jax.block_until_ready(list(parts.values()))  # Else blocks pile up here.
  return jax.make_array_from_single_device_arrays(
      layout.shape, sharding, list(parts.values()), dtype=dtype)


def _box(
    layout: huggingface_layout.Layout, index: tuple[slice, ...]
) -> _Box:
  """A part of the parameter, its dimensions in stored order."""
  box = []
  for d in layout.order:
    first, last, _ = index[d].indices(layout.shape[d])
    box.append((first, last))
  return tuple(box)


def blocks(
    layout: huggingface_layout.Layout, size: Sequence[int], bytes_each: int
) -> Iterator[_Box]:
  """Cuts a device's part into what is staged at once.

  Args:
    layout: of the parameter.
    size: of the part, in stored order.
    bytes_each: of an element, of all parts that are staged together.

  Yields:
    Pieces of the part, counted from where it begins.
  """
  # Layers, experts and the outermost dimension of rows; the rest is small.
  outer = layout.num_stacked + 1
  limit = STAGED_BYTES // (math.prod(size[outer:]) * bytes_each)
  for block in huggingface_layout.blocks(tuple(size[:outer]), max(limit, 1)):
    yield (*block, *((0, n) for n in size[outer:]))


def _stage(
    staged: Mapping[_Box, np.ndarray],
    block: _Box,
    layout: huggingface_layout.Layout,
    tensors: Mapping[str, tensor_file.Tensor],
) -> None:
  """Reads a block of every part.

  Args:
    staged: part -> array to fill, its dimensions in stored order.
    block: which piece of a part, counted from where the part begins.
    layout: of the parameter.
    tensors: by name.
  """
  n, num_rows = layout.num_stacked, len(layout.rows)
  full = [layout.shape[d] for d in layout.order]
  first_index = [first for first, _ in block[:n]]
  for position in np.ndindex(*(last - first for first, last in block[:n])):
    # Parts that share rows take them from one reading.
    wanted: dict[tuple[tuple[int, ...], tuple[int, int]], list] = {}
    for box, array in staged.items():
      index = tuple(
          box[d][0] + first_index[d] + position[d] for d in range(n))
      rows = _flat_range(
          [(box[d][0] + block[d][0], box[d][0] + block[d][1])
           for d in range(n, n + num_rows)], full[n:n + num_rows])
      columns = _flat_range(box[n + num_rows:], full[n + num_rows:])
      out = array[position].reshape(rows[1] - rows[0], columns[1] - columns[0])
      wanted.setdefault((index, rows), []).append((columns, out))
    for (index, rows), pieces in wanted.items():
      tensors[layout.tensor_name(index)].read(rows, pieces)


def _flat_range(
    ranges: Sequence[tuple[int, int]], sizes: Sequence[int]
) -> tuple[int, int]:
  """The range of several dimensions made one, of which the first is cut."""
  if not sizes:
    return 0, 1
  inner = math.prod(sizes[1:])
  assert all(r == (0, n) for r, n in zip(ranges[1:], sizes[1:])), ranges
  return ranges[0][0] * inner, ranges[0][1] * inner


def _zeros(
    shape: tuple[int, ...], dtype: np.dtype, device: jax.Device
) -> jax.Array:
  """Made where it will be; jnp.zeros makes it on the first device."""
  return jax.jit(
      lambda: jnp.zeros(shape, dtype),
      out_shardings=jax.sharding.SingleDeviceSharding(device))()


@functools.partial(jax.jit, donate_argnums=0, static_argnames='order')
def _put_block(
    part: jax.Array,
    block: jax.Array,
    start: tuple[int, ...],
    *,
    order: tuple[int, ...],
) -> jax.Array:
  """The part with a stored block written where it belongs."""
  return jax.lax.dynamic_update_slice(
      part, block.transpose(order).astype(part.dtype), start)

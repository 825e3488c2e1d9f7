"""Safetensors files, read and written a piece at a time.

The library `safetensors` maps the files it reads, and mapped pages count as
the program's memory; it writes tensors that are all in memory at once. A
checkpoint is larger than a host: here only a piece of one tensor is held.

A file is the length of a JSON header in 8 bytes, the header (for each tensor
its dtype, shape, first and last byte), then the tensors without gaps.

Shapes: R rows of a tensor, C columns; a vector has one column.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from longjax import types

DTYPES: dict[str, np.dtype] = {
    'F32': np.dtype(np.float32),
    'BF16': np.dtype(jnp.bfloat16),
    'F16': np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Columns are picked out, and tensors compared, so much at a time.
_BATCH_BYTES = 1 << 24
# The library's own bound; more would be a damaged length.
_MAX_HEADER_BYTES = 100_000_000
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """A tensor of a file.

  Attributes:
    path: the file.
    name: in the file.
    shape: of the tensor.
    dtype: as the file spells it; may be none of `DTYPES`.
    offset: of its first byte in the file.
  """

  path: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: str
  offset: int

  def read(
      self,
      rows: tuple[int, int],
      pieces: Sequence[tuple[tuple[int, int], np.ndarray]],
  ) -> None:
    """Reads rows once and hands out their columns.

    Args:
      rows: first and last + 1.
      pieces: first column and last + 1, and the array f[R, C] they go to,
        which casts them.

    Raises:
      UserError: the file ends before, or cannot be read.
    """
    dtype = DTYPES[self.dtype]
    width = math.prod(self.shape[1:])
    try:
      with open(self.path, 'rb', buffering=0) as file:
        file.seek(self.offset + rows[0] * width * dtype.itemsize)
        if len(pieces) == 1:
          (columns, out), = pieces
          if (columns == (0, width) and out.dtype == dtype
              and out.flags.c_contiguous):
            self._fill(file, out)
            return
        batch_len = max(1, _BATCH_BYTES // (width * dtype.itemsize))
        for first in range(*rows, batch_len):
          last = min(first + batch_len, rows[1])
          batch = np.empty((last - first, width), dtype)
          self._fill(file, batch)
          for (begin, end), out in pieces:
            out[first - rows[0]:last - rows[0]] = batch[:, begin:end]
    except OSError as error:
      raise unreadable(self.path, error.strerror) from error

  def whole(self) -> np.ndarray:
    """The tensor as it is stored; UserError as `read`."""
    out = np.empty(self.shape, DTYPES[self.dtype])
    height, width = self.shape[0], math.prod(self.shape[1:])
    self.read((0, height), [((0, width), out.reshape(height, width))])
    return out

  def _fill(self, file: Any, array: np.ndarray) -> None:
    """Reads as many bytes as a contiguous array has."""
    todo = array.reshape(-1).view(np.uint8).data
    while todo:
      count = file.readinto(todo)
      if not count:
        raise unreadable(self.path, f'it ends within {self.name}')
      todo = todo[count:]


def equal(a: Tensor, b: Tensor) -> bool:
  """Whether two matrices hold the same values."""
  if a.shape != b.shape:
    return False
  height, width = a.shape
  step = max(1, _BATCH_BYTES // (4 * width))
  for first in range(0, height, step):
    rows = (first, min(first + step, height))
    values = np.empty((2, rows[1] - first, width), np.float32)
    for tensor, out in zip((a, b), values, strict=True):
      tensor.read(rows, [((0, width), out)])
    if not np.array_equal(*values):
      return False
  return True


def unreadable(path: pathlib.Path, reason: object) -> types.UserError:
  """The error that names a file that cannot be read."""
  return types.UserError(f'cannot read {path}: {reason}; copy it again.')


def read_header(path: pathlib.Path) -> list[Tensor]:
  """The tensors of a file.

  Raises:
    UserError: it is missing, damaged or truncated.
  """
  try:
    with open(path, 'rb') as file:
      size = os.fstat(file.fileno()).st_size
      length = int.from_bytes(file.read(8), 'little')
      if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
        raise unreadable(
            path, 'it is no whole safetensors file (its header is cut off)')
      header = json.loads(file.read(length))
  except OSError as error:
    raise unreadable(path, error.strerror) from error
  except ValueError as error:
    raise unreadable(path, f'its header is damaged ({error})') from error
  try:
    header.pop('__metadata__', None)
    found = [
        Tensor(path=path, name=name, shape=tuple(map(int, entry['shape'])),
               dtype=str(entry['dtype']),
               offset=8 + length + entry['data_offsets'][0])
        for name, entry in header.items()]
    ends = {name: 8 + length + entry['data_offsets'][1]
            for name, entry in header.items()}
  except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
    raise unreadable(path, 'its header is damaged') from error
  found.sort(key=lambda tensor: (tensor.offset, ends[tensor.name]))
  expected = 8 + length
  for tensor in found:
    end, dtype = ends[tensor.name], DTYPES.get(tensor.dtype)
    size_given = size_due = end - expected
    if dtype is not None:  # Another one is refused by those who read it.
      size_due = math.prod(tensor.shape) * dtype.itemsize
    if tensor.offset != expected or size_given != size_due or size_due < 0:
      raise unreadable(path, f'its header is damaged at {tensor.name}')
    expected = end
  if size != expected:
    raise unreadable(path, f'it has {size:,} bytes instead of {expected:,}')
  return found


class Writer:
  """Writes the tensors of one file, in any order.

  Attributes:
    missing: shapes of the tensors that are not written yet.
  """

  def __init__(
      self,
      path: pathlib.Path,
      shapes: Mapping[str, tuple[int, ...]],
      dtype: np.dtype,
  ):
    """Opens the file and writes the header.

    Args:
      path: of the file.
      shapes: of the tensors by name, in the order they will have.
      dtype: of all; one of `DTYPES`.
    """
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    offset = 0
    for name, shape in shapes.items():
      end = offset + math.prod(shape) * dtype.itemsize
      header[name] = {
          'dtype': _NAMES[dtype], 'shape': list(shape),
          'data_offsets': [offset, end]}
      offset = end
    content = json.dumps(header, separators=(',', ':')).encode()
    content += b' ' * (-len(content) % _ALIGNMENT)
    self.missing = dict(shapes)
    self._begins = {
        name: 8 + len(content) + header[name]['data_offsets'][0]
        for name in shapes}
    self._dtype = dtype
    self._file: BinaryIO = open(path, 'wb')
    self._file.write(len(content).to_bytes(8, 'little') + content)

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes a tensor where it belongs."""
    shape = self.missing.pop(name, None)
    assert (array.shape, array.dtype) == (shape, self._dtype), name
    self._file.seek(self._begins[name])
    # NumPy has no buffers of bfloat16.
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    self._file.write(data.data)

  def close(self) -> None:
    """Ends the file; all its bytes are on disk."""
    assert not self.missing, self.missing
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()

  def abandon(self) -> None:
    """Closes a file that will never be whole."""
    self._file.close()


def split(
    sizes: Iterable[tuple[str, int]], *, max_bytes: int
) -> list[list[str]]:
  """Names of tensors in the same order, cut into files.

  Args:
    sizes: name and bytes of each.
    max_bytes: of a file; a larger tensor has one to itself.
  """
  files: list[list[str]] = [[]]
  total = 0
  for name, size in sizes:
    if files[-1] and total + size > max_bytes:
      files.append([])
      total = 0
    files[-1].append(name)
    total += size
  return files

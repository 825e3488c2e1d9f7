"""Tests for longjax.model.tensor_file; the library is the reference."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from longjax import types
from longjax.model import tensor_file


@pytest.fixture
def tensors():
  rng = np.random.default_rng(0)
  return {
      'matrix': rng.normal(size=(7, 5)).astype(np.float32),
      'vector': rng.normal(size=3).astype(ml_dtypes.bfloat16),
      'half': rng.normal(size=(2, 3)).astype(np.float16)}


@pytest.fixture
def path(tmp_path, tensors):
  safetensors.numpy.save_file(tensors, tmp_path / 'a')
  return tmp_path / 'a'


@pytest.mark.parametrize('batch_bytes', [1, 50, 1 << 24])
def test_rows_and_columns_are_what_the_library_reads(
    path, tensors, monkeypatch, batch_bytes):
  monkeypatch.setattr(tensor_file, '_BATCH_BYTES', batch_bytes)
  found = {tensor.name: tensor for tensor in tensor_file.read_header(path)}
  assert {k: v.shape for k, v in found.items()} == {
      k: v.shape for k, v in tensors.items()}
  left, right = np.empty((4, 2), np.float32), np.empty((4, 3), np.float64)
  found['matrix'].read((2, 6), [((0, 2), left), ((2, 5), right)])
  np.testing.assert_array_equal(left, tensors['matrix'][2:6, :2])
  np.testing.assert_array_equal(right, tensors['matrix'][2:6, 2:])
  whole = np.empty((2, 5), np.float32)
  found['matrix'].read((0, 2), [((0, 5), whole)])
  np.testing.assert_array_equal(whole, tensors['matrix'][:2])
  for dtype in (np.float32, ml_dtypes.bfloat16):
    vector = np.empty((2, 1), dtype)
    found['vector'].read((1, 3), [((0, 1), vector)])
    np.testing.assert_array_equal(vector[:, 0], tensors['vector'][1:])


def test_the_library_reads_what_is_written(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {
      'b': rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
      'a': np.asfortranarray(
          rng.normal(size=(2, 4)).astype(ml_dtypes.bfloat16)),
      'naïve': rng.normal(size=7).astype(ml_dtypes.bfloat16)}
  writer = tensor_file.Writer(
      tmp_path / 'a', {k: v.shape for k, v in tensors.items()},
      np.dtype(ml_dtypes.bfloat16))
  for name, value in tensors.items():
    writer.write(name, value)
  writer.close()
  got = safetensors.numpy.load_file(tmp_path / 'a')
  assert got.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(got[name], value)
  with safetensors.safe_open(tmp_path / 'a', 'numpy') as file:
    assert file.metadata() == {'format': 'pt'}
  assert [t.name for t in tensor_file.read_header(tmp_path / 'a')] == [
      'b', 'a', 'naïve']


def test_tensors_may_come_in_any_order_but_each_once(tmp_path):
  tensors = {
      name: np.full(shape, i, np.float32)
      for i, (name, shape) in enumerate(
          {'x': (3,), 'y': (2, 5), 'z': (1,)}.items())}
  files = []
  for order in ('xyz', 'zxy', 'yzx'):
    files.append(tmp_path / order)
    writer = tensor_file.Writer(
        files[-1], {k: v.shape for k, v in tensors.items()},
        np.dtype(np.float32))
    for name in order:
      writer.write(name, tensors[name])
      assert name not in writer.missing
      for again in (name, 'other'):
        with pytest.raises(AssertionError):
          writer.write(again, tensors[name])
    writer.close()
  assert len({path.read_bytes() for path in files}) == 1
  for tensor in tensor_file.read_header(files[0]):
    np.testing.assert_array_equal(tensor.whole(), tensors[tensor.name])


def test_a_file_is_not_closed_before_it_is_whole(tmp_path):
  writer = tensor_file.Writer(
      tmp_path / 'a', {'x': (1,), 'y': (1,)}, np.dtype(np.float32))
  writer.write('y', np.zeros(1, np.float32))
  with pytest.raises(AssertionError):
    writer.close()
  writer.abandon()


@pytest.mark.parametrize('length', [0, 7, 8, 20, 100, 250, -1])
def test_a_truncated_file_is_refused(path, length):
  path.write_bytes(path.read_bytes()[:length])
  with pytest.raises(types.UserError, match='cannot read .*; copy it again'):
    tensor_file.read_header(path)


def test_a_file_that_is_too_long_is_refused(path):
  size = path.stat().st_size
  path.write_bytes(path.read_bytes() + b'0')
  with pytest.raises(
      types.UserError, match=f'has {size + 1} bytes instead of {size}'):
    tensor_file.read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(path):
  tensors = {tensor.name: tensor for tensor in tensor_file.read_header(path)}
  path.write_bytes(path.read_bytes()[:-1])
  last = max(tensors.values(), key=lambda tensor: tensor.offset)
  with pytest.raises(types.UserError, match=f'it ends within {last.name}'):
    last.read((0, last.shape[0]), [(
        (0, 1), np.empty((last.shape[0], 1), np.float32))])


@pytest.mark.parametrize('change', [
    {'matrix': {'data_offsets': [0, 8]}},
    {'matrix': {'shape': [7, 6]}},
    {'matrix': {'shape': None}},
    {'matrix': {'data_offsets': []}},
    {'vector': {'data_offsets': [0, 6]}},
    {'matrix': {'data_offsets': [-4, 136]}},
])
def test_a_header_that_does_not_fit_its_file_is_refused(path, change):
  data = path.read_bytes()
  length = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:8 + length])
  for name, fields in change.items():
    header[name] |= fields
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + length:])
  with pytest.raises(types.UserError, match='its header is damaged'):
    tensor_file.read_header(path)


def test_files_hold_no_more_than_asked_unless_a_tensor_does():
  sizes = [('a', 4), ('b', 4), ('c', 3), ('d', 9), ('e', 1)]
  assert tensor_file.split(sizes, max_bytes=8) == [
      ['a', 'b'], ['c'], ['d'], ['e']]
  assert tensor_file.split(sizes, max_bytes=100) == [list('abcde')]

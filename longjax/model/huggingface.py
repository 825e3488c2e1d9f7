"""Checkpoints in Hugging Face's layout, in and out, a piece at a time.

The host never holds more than pieces of a parameter: reading, see
`huggingface_reading`; writing, one layer of one parameter is brought together
at a time and goes to the file.

Values are copied, never computed with: saving what was loaded gives the same
bits.
"""

import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from longjax import types
from longjax.model import (
    architecture,
    huggingface_config,
    huggingface_directory,
    huggingface_layout,
    huggingface_reading,
    huggingface_writing,
    parameters,
    tensor_file,
)
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib


def load(
    directory: str | os.PathLike,
    *,
    rules: rules_lib.Rules | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[types.Params, architecture.ModelConfig]:
  """Reads a checkpoint.

  Args:
    directory: see `huggingface_directory`.
    rules: where parameters live. None means one device.
    dtype: of the parameters.

  Returns:
    The parameter tree and the configuration.

  Raises:
    UserError: a file, field or tensor is missing, unknown, of another shape
      or unreadable.
  """
  directory = pathlib.Path(directory)
  config = huggingface_config.load(directory)
  layouts = huggingface_layout.layouts(config)
  if rules is None:
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = jax.tree.map(lambda _: one_device, layouts)
  else:
    where = rules.tree_shardings(
        parameters.axes(config), parameters.abstract(config))
  tensors = stored_tensors(directory, config)
  return jax.tree.map(
      lambda layout, sharding: huggingface_reading.parameter(
          layout, sharding, tensors, np.dtype(dtype)),
      layouts, where), config


def save(
    directory: str | os.PathLike,
    params: types.Params,
    config: architecture.ModelConfig,
    *,
    source: str | os.PathLike | None = None,
    dtype: DTypeLike | None = None,
    stop_ids: Sequence[int] = (),
    pad_id: int | None = None,
    max_file_bytes: int = 4_000_000_000,
) -> None:
  """Writes a checkpoint under a temporary name and renames it when complete.

  All processes call this; the primary one writes.

  Args:
    directory: replaced if it exists.
    params: the parameter tree.
    config: its configuration.
    source: directory whose tokenizer and generation_config.json are carried
      along and, if it holds a model, those fields of its config.json that do
      not change the maths. None carries nothing.
    dtype: of the stored tensors; None keeps the parameters'.
    stop_ids: each ends a response; generation_config.json names them, beside
      those of the source, for other programs. config.json has the first,
      unless the source names another.
    pad_id: written as pad_token_id unless the source names its own.
    max_file_bytes: more are split over several files.

  Raises:
    UserError: the directory cannot be written, the source has no tokenizer,
      or no family of Hugging Face computes this network.
  """
  directory = pathlib.Path(directory).absolute()
  source = None if source is None else pathlib.Path(source)
  params = jax.tree.map(
      lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), params)
  stored = np.dtype(dtype or params['embedding'].dtype)
  small_files = multihost.on_primary(lambda: huggingface_writing.small_files(
      config, source=source, dtype=stored, stop_ids=stop_ids, pad_id=pad_id))
  layouts = huggingface_layout.layouts(config)
  tensors = _to_tensors(params, layouts, stored)
  failure = ''
  if multihost.is_primary():
    try:
      huggingface_writing.write(
          directory, tensors, config, small_files=small_files, source=source,
          dtype=stored, max_file_bytes=max_file_bytes)
    except types.UserError as error:
      failure = str(error)
  for _ in tensors:
    pass  # All processes gather, whatever became of the files.
  multihost.on_primary(lambda: _raise_if(failure))


def stored_tensors(
    directory: str | os.PathLike, config: architecture.ModelConfig
) -> dict[str, tensor_file.Tensor]:
  """The tensors of a checkpoint by name, not read yet.

  Args:
    directory: of the checkpoint.
    config: of the model that is expected.

  Raises:
    UserError: one is missing, unknown, of another shape or unreadable.
  """
  directory = pathlib.Path(directory)
  tensors = huggingface_directory.tensors(directory)
  _check_tensors(tensors, huggingface_layout.layouts(config), directory)
  return tensors


def stored_dtype(directory: str | os.PathLike) -> np.dtype:
  """Of a checkpoint's tensors; float32, which holds all, if they differ.

  Raises:
    UserError: it cannot be read.
  """
  tensors = huggingface_directory.tensors(pathlib.Path(directory))
  _check_known(tensors.values())
  names = {tensor.dtype for tensor in tensors.values()}
  return tensor_file.DTYPES[names.pop() if len(names) == 1 else 'F32']


def _raise_if(message: str) -> None:
  if message:
    raise types.UserError(message)


def _check_tensors(
    tensors: Mapping[str, tensor_file.Tensor],
    layouts: Any,
    directory: pathlib.Path,
) -> None:
  """Raises UserError unless exactly the expected tensors are there."""
  expected = {
      name: layout.tensor_shape for layout in jax.tree.leaves(layouts)
      for name in layout.tensor_names()}
  missing = sorted(expected.keys() - tensors.keys())
  if missing:
    raise types.UserError(
        f'{directory} lacks {len(missing)} tensors, first {missing[0]}; '
        'config.json and the weights do not belong together.')
  _check_known(tensors.values())
  for name, shape in expected.items():
    if tensors[name].shape != shape:
      raise types.UserError(
          f'{directory}: {name} has shape {tensors[name].shape}, '
          f'config.json asks for {shape}.')
  extra = sorted(tensors.keys() - expected.keys())
  head, embedding = huggingface_layout.HEAD, huggingface_layout.EMBEDDING
  # Some tied checkpoints store the head as well.
  if extra == [head] and tensor_file.equal(
      tensors[head], tensors[embedding]):
    extra = []
  if extra:
    raise types.UserError(
        f'{directory} has {len(extra)} tensors that config.json does not '
        f'account for, first {extra[0]}.')


def _check_known(tensors) -> None:
  for tensor in tensors:
    if tensor.dtype not in tensor_file.DTYPES:
      raise types.UserError(
          f'{tensor.path}: {tensor.name} is {tensor.dtype}, not one of '
          f'{tuple(tensor_file.DTYPES)}.')


def _to_tensors(
    params: types.Params, layouts: Any, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
  """Names and whole tensors, in the order of the files.

  All processes draw from this together.
  """
  for path, layout, layer in huggingface_layout.in_file_order(layouts):
    leaf = params
    for key in path:
      leaf = leaf[key]
    assert leaf.shape == layout.shape, (path, leaf.shape, layout.shape)
    host = multihost.to_host(
        _stored(leaf, 0 if layer is None else layer, layout=layout,
                dtype=dtype))
    yield from zip(
        layout.tensor_names(layer),
        host.reshape(-1, *layout.tensor_shape), strict=True)


@functools.partial(jax.jit, static_argnames=('layout', 'dtype'))
def _stored(
    leaf: jax.Array,
    layer: int,
    *,
    layout: huggingface_layout.Layout,
    dtype: np.dtype,
) -> jax.Array:
  """A parameter, or one layer of it, turned and cast as it is stored."""
  order = layout.order
  if layout.num_stacked:
    leaf = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    order = tuple(d - 1 for d in order[1:])
  return leaf.astype(dtype).transpose(order)

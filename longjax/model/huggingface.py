"""Qwen3 checkpoints in Hugging Face's layout, in and out.

A directory holds config.json, model.safetensors (or several files behind
model.safetensors.index.json) and the tokenizer's files. Linear layers are
stored there as [outputs, inputs] for each layer; ours are [inputs, outputs]
with heads apart and layers stacked:

  q_proj [N*H, D] -> query [L, D, N, H]
  o_proj [D, N*H] -> output [L, N, H, D]

Values are copied, never computed with: saving what was loaded gives the same
bits.
"""

import contextlib
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from longjax import types
from longjax.model import architecture, huggingface_config, transformer
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib

# Path in the parameter tree -> tensor name.
_LAYER = 'model.layers.{layer}.'
_TENSORS: dict[tuple[str, ...], str] = {
    ('embedding',): 'model.embed_tokens.weight',
    ('layers', 'attention_norm'): _LAYER + 'input_layernorm.weight',
    ('layers', 'query'): _LAYER + 'self_attn.q_proj.weight',
    ('layers', 'key'): _LAYER + 'self_attn.k_proj.weight',
    ('layers', 'value'): _LAYER + 'self_attn.v_proj.weight',
    ('layers', 'query_norm'): _LAYER + 'self_attn.q_norm.weight',
    ('layers', 'key_norm'): _LAYER + 'self_attn.k_norm.weight',
    ('layers', 'output'): _LAYER + 'self_attn.o_proj.weight',
    ('layers', 'ffn_norm'): _LAYER + 'post_attention_layernorm.weight',
    ('layers', 'gate'): _LAYER + 'mlp.gate_proj.weight',
    ('layers', 'up'): _LAYER + 'mlp.up_proj.weight',
    ('layers', 'down'): _LAYER + 'mlp.down_proj.weight',
    ('final_norm',): 'model.norm.weight',
    ('head',): 'lm_head.weight',
}
_HEAD = _TENSORS['head',]
_EMBEDDING = _TENSORS['embedding',]

_DTYPES = ('F32', 'BF16', 'F16')


def load(
    directory: str | os.PathLike,
    *,
    rules: rules_lib.Rules | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[types.Params, architecture.ModelConfig]:
  """Reads a checkpoint, one tensor at a time.

  Args:
    directory: holds config.json and the tensors.
    rules: where parameters live; each device's part is read for itself. None
      means the default device.
    dtype: of the parameters.

  Returns:
    The parameter tree and the configuration.

  Raises:
    UserError: a file, field or tensor is missing, unknown, of another shape
      or unreadable.
  """
  directory = pathlib.Path(directory)
  config = huggingface_config.load(directory)
  shapes = transformer.abstract(config)
  trees = [shapes]
  if rules is not None:
    axes = transformer.parameter_axes(config)
    trees.append(rules.tree_shardings(axes, shapes))
  with contextlib.ExitStack() as stack:
    tensors = _open_tensors(directory, stack)
    _check_tensors(tensors, shapes, directory)

    def read(path, leaf, sharding=None):
      def part(index):
        return _read_part(_keys(path), leaf.shape, index, tensors, dtype)
      if sharding is None:
        return jnp.asarray(part((slice(None),) * len(leaf.shape)))
      return jax.make_array_from_callback(leaf.shape, sharding, part)

    return jax.tree_util.tree_map_with_path(read, *trees), config


def save(
    directory: str | os.PathLike,
    params: types.Params,
    config: architecture.ModelConfig,
    *,
    tokenizer_directory: str | os.PathLike | None = None,
    dtype: DTypeLike | None = None,
    stop_id: int | None = None,
    pad_id: int | None = None,
) -> None:
  """Writes a checkpoint under a temporary name and renames it when complete.

  All processes call this; the primary one writes. The whole model passes
  through its memory.

  Args:
    directory: replaced if it exists.
    params: the parameter tree.
    config: its configuration.
    tokenizer_directory: holds tokenizer files to copy; None copies none.
    dtype: of the stored tensors; None keeps the parameters'.
    stop_id: written as eos_token_id, for other programs.
    pad_id: written as pad_token_id.

  Raises:
    UserError: the directory cannot be written, or there is no tokenizer.
  """
  tensors = _to_tensors(params, dtype)
  if not multihost.is_primary():
    return
  directory = pathlib.Path(directory).absolute()
  stored = next(iter(tensors.values())).dtype.name
  ids = {'eos_token_id': stop_id, 'pad_token_id': pad_id}
  ids = {name: value for name, value in ids.items() if value is not None}

  def write(temporary: pathlib.Path) -> None:
    huggingface_config.write_json(
        temporary / 'config.json',
        huggingface_config.fields(config) | {'torch_dtype': stored} | ids)
    huggingface_config.write_json(temporary / 'generation_config.json', ids)
    safetensors.numpy.save_file(
        tensors, temporary / 'model.safetensors', metadata={'format': 'pt'})
    if tokenizer_directory is not None:
      huggingface_config.copy_tokenizer(
          pathlib.Path(tokenizer_directory), temporary)

  try:
    _replace_directory(directory, write)
  except (OSError, safetensors.SafetensorError) as error:
    raise types.UserError(
        f'cannot write checkpoint {directory}: {error}.') from error


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(key.key for key in path)


def _tensor_names(path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
  """Names of the tensors that make up one leaf; one a layer if stacked."""
  name = _TENSORS[path]
  if path[0] != 'layers':
    return [name]
  return [name.format(layer=i) for i in range(shape[0])]


def _tensor_shape(
    path: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[int, ...]:
  """Shape of a leaf's tensors in the file."""
  if path == ('embedding',):
    return shape
  shape = shape[1:] if path[0] == 'layers' else shape
  if len(shape) == 1:
    return shape
  num_inputs = 2 if path[-1] == 'output' else 1
  return math.prod(shape[num_inputs:]), math.prod(shape[:num_inputs])


def _open_tensors(
    directory: pathlib.Path, stack: contextlib.ExitStack
) -> dict[str, Any]:
  """Tensor name -> the open file that holds it."""
  index = directory / 'model.safetensors.index.json'
  files = ['model.safetensors']
  wanted: dict[str, str] | None = None
  if index.exists():
    wanted = huggingface_config.read_json(index).get('weight_map')
    if not isinstance(wanted, dict):
      raise types.UserError(f'{index} holds no weight_map.')
    files = sorted(set(wanted.values()))
  tensors = {}
  for name in files:
    path = directory / name
    try:
      file = stack.enter_context(safetensors.safe_open(path, 'numpy'))
    except (OSError, safetensors.SafetensorError) as error:
      raise types.UserError(
          f'cannot read {path}: {error}; copy it again.') from error
    for tensor in file.keys():
      if wanted is None or wanted.get(tensor) == name:
        tensors[tensor] = file
  return tensors


def _check_tensors(
    tensors: dict[str, Any], shapes: types.Params, directory: pathlib.Path
) -> None:
  """Raises UserError unless exactly the expected tensors are there."""
  expected = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    for name in _tensor_names(_keys(path), leaf.shape):
      expected[name] = _tensor_shape(_keys(path), leaf.shape)
  missing = sorted(expected.keys() - tensors.keys())
  if missing:
    raise types.UserError(
        f'{directory} lacks {len(missing)} tensors, first {missing[0]}; '
        'config.json and the weights do not belong together.')
  extra = sorted(tensors.keys() - expected.keys())
  if extra == [_HEAD]:
    # Some tied checkpoints store the head as well.
    head, embedding = (
        tensors[name].get_tensor(name) for name in (_HEAD, _EMBEDDING))
    if np.array_equal(head, embedding):
      extra = []
  if extra:
    raise types.UserError(
        f'{directory} has {len(extra)} tensors that config.json does not '
        f'account for, first {extra[0]}.')
  for name, shape in expected.items():
    entry = tensors[name].get_slice(name)
    if tuple(entry.get_shape()) != shape:
      raise types.UserError(
          f'{directory}: {name} has shape {tuple(entry.get_shape())}, '
          f'config.json asks for {shape}.')
    if entry.get_dtype() not in _DTYPES:
      raise types.UserError(
          f'{directory}: {name} is {entry.get_dtype()}, not one of {_DTYPES}.')


def _read_part(
    path: tuple[str, ...],
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    tensors: dict[str, Any],
    dtype: DTypeLike,
) -> np.ndarray:
  """`leaf[index]` of the leaf of this path and shape."""

  def read(name):
    tensor = tensors[name].get_tensor(name)
    return tensor if path == ('embedding',) else tensor.T

  names = _tensor_names(path, shape)
  if path[0] != 'layers':
    return read(*names)[index].astype(dtype)
  return np.stack([
      read(name).reshape(shape[1:])[index[1:]].astype(dtype)
      for name in names[index[0]]
  ])


def _to_tensors(
    params: types.Params, dtype: DTypeLike | None
) -> dict[str, np.ndarray]:
  """Tensor name -> host array, gathered from all processes."""
  tensors = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    keys = _keys(path)
    shape = _tensor_shape(keys, leaf.shape)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      leaf = multihost_utils.process_allgather(leaf, tiled=True)
    host = np.asarray(leaf)
    layers = host if keys[0] == 'layers' else host[None]
    for name, value in zip(
        _tensor_names(keys, leaf.shape), layers, strict=True):
      if keys != ('embedding',):
        value = value.reshape(shape[::-1]).T
      # safetensors writes the buffer and ignores strides.
      tensors[name] = np.ascontiguousarray(value, dtype=dtype)
  return tensors


def _replace_directory(
    directory: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> None:
  """Calls `write` on a temporary directory, then puts it in place."""
  temporary = directory.with_name(directory.name + '.tmp')
  old = directory.with_name(directory.name + '.old')
  shutil.rmtree(temporary, ignore_errors=True)  # Of a process that was killed.
  try:
    temporary.mkdir(parents=True)
    write(temporary)
    if directory.exists():
      shutil.rmtree(old, ignore_errors=True)
      directory.rename(old)
    temporary.rename(directory)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  shutil.rmtree(old, ignore_errors=True)

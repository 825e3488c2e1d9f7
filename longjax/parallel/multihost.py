"""Manners of a program that runs as several processes.

Every process runs the same collectives in the same order; only the primary
one writes files and logs. Arrays of the host (rows, prompts, rollouts,
results) are whole and equal in every process; arrays on devices lie where
their sharding says, a part of them in each process. What depends on files,
the clock or a signal is decided by one and told to all.

With one process every function here is the plain thing.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # The key-value store has no public name.
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from longjax import types

_MAX_SECONDS_BETWEEN_LOOKS = 0.25

_messages = itertools.count()


def is_primary() -> bool:
  """True in the one process that writes files and logs."""
  return jax.process_index() == 0


def on_primary(
    function: Callable[[], Any],
    *,
    errors: tuple[type[Exception], ...] = (types.UserError,),
) -> Any:
  """Calls a function in the primary process; returns its result in all.

  The others wait, however long it takes: when they go on, what the function
  wrote is there to be read.

  Args:
    function: of no arguments, its result ready for JSON.
    errors: exceptions, made of a message, that are raised in all processes if
      the function raises them. After another one the primary process ends, and
      the others with it.

  Returns:
    What the function returned.
  """
  if jax.process_count() == 1:
    return function()
  key = f'longjax/on_primary/{next(_messages)}'
  if is_primary():
    try:
      result = function()
    except errors as error:
      _send(key, {'error': type(error).__name__, 'message': str(error)})
      raise
    _send(key, {'result': result})
    return result
  answer = _receive(key)
  for kind in errors:
    if kind.__name__ == answer.get('error'):
      raise kind(answer['message'])
  return answer['result']


def put(tree: Any, sharding: Any) -> Any:
  """Moves arrays of the host to the devices.

  Args:
    tree: arrays, equal in all processes; each takes what its devices hold.
    sharding: of all of them, or a tree of one for each.

  Returns:
    The tree of global arrays.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)

  def one(x, where):
    x = np.asarray(x)
    x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
    return jax.make_array_from_callback(x.shape, where, lambda i: x[i])

  if isinstance(sharding, Sharding):
    return jax.tree.map(lambda x: one(x, sharding), tree)
  return jax.tree.map(one, tree, sharding)


def to_host(tree: Any) -> Any:
  """Whole NumPy copies of a tree of arrays, in every process; a collective."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def one(x):
    if isinstance(x, jax.Array) and not (
        x.is_fully_addressable or x.is_fully_replicated):
      return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(one, tree)


def maximum(value: int) -> jax.Array:  # i32[]
  """The greatest of the processes' values; a collective.

  The result may still be on its way: `int` waits for it.
  """
  if jax.process_count() == 1:
    return jnp.int32(value)
  by_device, replicated = _on_all_devices()
  values = jax.make_array_from_callback(
      (jax.device_count(),), by_device,
      lambda _: np.asarray([value], np.int32))
  return _max(replicated)(values)


@functools.cache
def _on_all_devices() -> tuple[NamedSharding, NamedSharding]:
  """Over all devices: split, replicated.

  All, for a program on some of them does not wait for its turn on CPUs: it
  would mix its messages with those of training, differently in each process.
  """
  mesh = Mesh(np.asarray(jax.devices()), ('device',))
  return (NamedSharding(mesh, PartitionSpec('device')),
          NamedSharding(mesh, PartitionSpec()))


@functools.cache
def _max(where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(jnp.max, out_shardings=where)


def _send(key: str, value: Any) -> None:
  _client().key_value_set(f'{key}/value', json.dumps(value))


def _receive(key: str) -> Any:
  """Waits for a message; a lost process ends the wait, see `processes`."""
  # Waiting inside the store would keep signals from being noted.
  seconds = 1e-3
  while not (found := _client().key_value_dir_get(key)):
    time.sleep(seconds)
    seconds = min(2 * seconds, _MAX_SECONDS_BETWEEN_LOOKS)
  return json.loads(found[0][1])


def _client() -> Any:
  client = distributed.global_state.client
  if client is None:
    raise types.UserError(
        f'jax sees {jax.process_count()} processes, but they do not know each '
        'other; start each of them with --distributed.')
  return client

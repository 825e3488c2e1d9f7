"""Tests for longjax.parallel.multihost; `multiprocess_test` has two processes.

Here the second process is this one, told that it is the second.
"""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from longjax import types
from longjax.parallel import mesh, multihost


class Store:
  """The key-value store of two processes."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value):
    assert key not in self.values
    self.values[key] = value

  def key_value_dir_get(self, prefix):
    return [(k, v) for k, v in self.values.items()
            if k.startswith(f'{prefix}/')]


class Refusal(Exception):
  pass


@pytest.fixture
def as_process(monkeypatch):
  """Calls a function as one of two processes."""
  store = Store()
  monkeypatch.setattr(multihost, '_client', lambda: store)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)

  def call(index, function):
    monkeypatch.setattr(jax, 'process_index', lambda: index)
    monkeypatch.setattr(multihost, '_messages', iter([7]))
    return function()

  return call


def test_only_process_zero_is_primary(monkeypatch):
  assert multihost.is_primary()
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  assert not multihost.is_primary()


def test_one_process_simply_calls():
  assert multihost.on_primary(lambda: (1, 2)) == (1, 2)
  with pytest.raises(KeyError):
    multihost.on_primary(lambda: {}['x'])


def test_all_processes_have_what_the_primary_one_found(as_process):
  calls = []

  def ask():
    return multihost.on_primary(lambda: calls.append(1) or ['a', None, 3])

  assert as_process(0, ask) == ['a', None, 3]
  assert as_process(1, ask) == ['a', None, 3]
  assert calls == [1]


@pytest.mark.parametrize('error', [types.UserError, Refusal])
def test_an_expected_error_is_raised_in_all_processes(as_process, error):
  def fail():
    raise error('no room')

  def ask():
    multihost.on_primary(fail, errors=(types.UserError, Refusal))

  for index in (0, 1):
    with pytest.raises(error, match='no room'):
      as_process(index, ask)


def test_the_others_wait_for_the_primary_one(as_process, monkeypatch):
  store = multihost._client()

  def later():
    time.sleep(0.1)
    store.key_value_set('longjax/on_primary/7/value', '{"result": 5}')

  threading.Thread(target=later).start()
  assert as_process(1, lambda: multihost.on_primary(None)) == 5


def test_processes_that_were_not_connected_are_told(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(types.UserError, match='with --distributed'):
    multihost.on_primary(lambda: None)


@pytest.mark.parametrize('num_processes', [1, 2])
def test_arrays_go_to_the_devices_and_come_back(monkeypatch, num_processes):
  # All devices are ours, whatever the number of processes.
  monkeypatch.setattr(jax, 'process_count', lambda: num_processes)
  made = mesh.make(mesh.MeshConfig(data=4, fsdp=2))
  split = NamedSharding(made, PartitionSpec('data'))
  whole = NamedSharding(made, PartitionSpec())
  host = {'a': np.arange(24).reshape(8, 3), 'b': np.float64(2.5)}
  devices = multihost.put(host, {'a': split, 'b': whole})
  assert devices['a'].sharding == split and devices['a'].dtype == jnp.int32
  assert devices['b'].sharding == whole and devices['b'].dtype == jnp.float32
  both = multihost.put([host['a'], host['a']], split)
  assert [x.sharding for x in both] == [split, split]
  back = multihost.to_host(devices)
  assert isinstance(back['a'], np.ndarray)
  jax.tree.map(np.testing.assert_array_equal, back, host)


def test_the_greatest_value_of_one_process_is_its_own():
  assert int(multihost.maximum(15)) == 15

"""Tests for longjax.train.checkpoint."""

import errno
import json
import logging
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from longjax import types
from longjax.train import checkpoint, manifest

INFO = {'stage': 'rl', 'cursor': [1, 2], 'baseline': 0.1 + 0.2}


def tree_of(seed: int):
  """What a run keeps: parameters, optimizer state, counters, a key."""
  rng = np.random.default_rng(seed)
  params = {
      'head': jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
      'layers': {'query': jnp.asarray(rng.normal(size=(2, 8, 4)), jnp.float32)},
  }
  # Values that arithmetic would not survive.
  params['head'] = params['head'].at[0, :4].set(
      jnp.asarray([jnp.inf, -0.0, 1e-42, jnp.nan], jnp.float32))
  return {
      'params': params,
      'opt_state': optax.adamw(1e-3).init(params),
      'step': jnp.asarray(seed, jnp.int32),
      'key': jax.random.PRNGKey(seed),
      'mask': jnp.asarray([True, False]),
      'half': jnp.asarray(rng.normal(size=3), jnp.bfloat16),
  }


def abstract(tree, sharding=None):
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def bits(tree):
  return [(x.dtype, x.shape, np.asarray(x).tobytes())
          for x in jax.tree.leaves(tree)]


def save_steps(directory, steps):
  with checkpoint.Checkpointer(directory) as checkpoints:
    for step in steps:
      checkpoints.save(step, tree_of(step), INFO | {'step': step})


def newest_whole(directory: pathlib.Path) -> int | None:
  return max(
      (int(path.name) for path in directory.iterdir()
       if path.name.isdecimal() and not manifest.damage(path)), default=None)


def files_of(directory: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in directory.rglob('*') if p.is_file())


def test_arrays_and_info_come_back_bit_for_bit(tmp_path):
  save_steps(tmp_path, [3])
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    restored = checkpoints.restore_latest(abstract(tree_of(0)))
  assert restored.step == 3
  assert restored.info == INFO | {'step': 3}
  assert bits(restored.tree) == bits(tree_of(3))
  assert jax.tree.structure(restored.tree) == jax.tree.structure(tree_of(3))


def test_an_empty_directory_holds_nothing_to_restore(tmp_path):
  with checkpoint.Checkpointer(tmp_path / 'new') as checkpoints:
    assert checkpoints.restore_latest(abstract(tree_of(0))) is None
    assert newest_whole(tmp_path / 'new') is None


def test_arrays_go_where_the_abstract_tree_wants_them(tmp_path):
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ('a', 'b'))
  value = jnp.arange(64.0).reshape(8, 8)
  saved = jax.device_put(value, NamedSharding(mesh, PartitionSpec('a', 'b')))
  wanted = NamedSharding(mesh, PartitionSpec('b', None))
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {'x': saved}, {})
    checkpoints.wait()
    got = checkpoints.restore(1, abstract({'x': saved}, wanted)).tree['x']
  assert got.sharding.is_equivalent_to(wanted, 2)
  np.testing.assert_array_equal(got, value)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
  update = jax.jit(
      lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
  tree = {'x': jnp.arange(1e6)}
  expected = np.arange(1e6, dtype=np.float32)
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    for step in range(4):
      checkpoints.save(step, tree, {})
      tree = jax.block_until_ready(update(tree))
      checkpoints.wait()
      got = checkpoints.restore(step, abstract(tree)).tree['x']
      np.testing.assert_array_equal(got, expected + step)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
  save_steps(tmp_path, [1, 2, 5, 9])
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.steps() == [5, 9]


def test_keeping_fewer_than_two_is_refused(tmp_path):
  with pytest.raises(types.UserError, match='keep=1'):
    checkpoint.Checkpointer(tmp_path, keep=1)


def test_saving_a_step_again_replaces_it(tmp_path):
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, tree_of(1), {'try': 1})
    checkpoints.save(1, tree_of(2), {'try': 2})
    checkpoints.wait()
    restored = checkpoints.restore(1, abstract(tree_of(0)))
  assert restored.info == {'try': 2}
  assert bits(restored.tree) == bits(tree_of(2))


def test_a_checkpoint_older_than_the_newest_can_be_saved(tmp_path):
  save_steps(tmp_path, [10])
  save_steps(tmp_path, [4])
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    assert 4 in checkpoints.steps()


def damage_truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path):
  path.write_bytes(b'')


def damage_flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def damage_remove(path):
  path.unlink()


@pytest.mark.parametrize(
    'damage', [damage_truncate, damage_empty, damage_flip, damage_remove])
def test_damage_to_any_file_is_found(tmp_path, damage):
  save_steps(tmp_path, [1])
  unimportant = {'_CHECKPOINT_METADATA', 'commit_success.txt'}
  paths = [
      p for p in files_of(tmp_path / '1')
      if p.parent != tmp_path / '1' or p.name not in unimportant]
  assert len(paths) > 5
  for path in paths:
    content = path.read_bytes()
    damage(path)
    assert path.name in manifest.damage(tmp_path / '1')
    path.write_bytes(content)
  assert manifest.damage(tmp_path / '1') == ''


def test_the_commit_stamp_is_not_needed_to_restore(tmp_path):
  save_steps(tmp_path, [1])
  (tmp_path / '1' / '_CHECKPOINT_METADATA').write_bytes(b'')
  (tmp_path / '1' / 'commit_success.txt').unlink()
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    restored = checkpoints.restore_latest(abstract(tree_of(0)))
  assert bits(restored.tree) == bits(tree_of(1))


@pytest.mark.parametrize('damage', [damage_truncate, damage_flip])
def test_the_checkpoint_before_a_damaged_one_is_used_with_a_warning(
    tmp_path, damage, caplog):
  save_steps(tmp_path, [1, 2])
  largest = max(files_of(tmp_path / '2'), key=lambda p: p.stat().st_size)
  damage(largest)
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    assert newest_whole(tmp_path) == 1
    with pytest.raises(types.UserError, match='damaged'):
      checkpoints.restore(2, abstract(tree_of(0)))
    with caplog.at_level(logging.WARNING):
      restored = checkpoints.restore_latest(abstract(tree_of(0)))
    assert restored.step == 1
    assert bits(restored.tree) == bits(tree_of(1))
    # The run comes by step 2 again.
    checkpoints.save(2, tree_of(2), INFO)
    checkpoints.wait()
    assert newest_whole(tmp_path) == 2
  warnings = [r.getMessage() for r in caplog.records
              if r.levelno == logging.WARNING and 'damaged' in r.getMessage()]
  assert len(warnings) == 1
  assert str(tmp_path / '2') in warnings[0]
  assert largest.name in warnings[0]


def test_if_every_checkpoint_is_damaged_there_is_none(tmp_path, caplog):
  save_steps(tmp_path, [1, 2])
  for step in '12':
    (tmp_path / step / manifest.NAME).unlink()
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(abstract(tree_of(0))) is None
  second, first = [
      r.getMessage() for r in caplog.records if 'damaged' in r.getMessage()]
  assert str(tmp_path / '2') in second and 'the one before it' in second
  assert str(tmp_path / '1') in first and 'begins again' in first


def test_an_altered_manifest_is_found(tmp_path):
  save_steps(tmp_path, [1])
  path = tmp_path / '1' / manifest.NAME
  content = json.loads(path.read_text())
  content['files'].pop(next(iter(content['files'])))
  path.write_text(json.dumps(content))
  assert 'altered' in manifest.damage(tmp_path / '1')


def test_an_unfinished_save_is_no_checkpoint_and_is_cleared(tmp_path):
  save_steps(tmp_path, [1])
  unfinished = tmp_path / '2.orbax-checkpoint-tmp'
  (unfinished / 'tree').mkdir(parents=True)
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]
    assert checkpoints.restore_latest(abstract(tree_of(0))).step == 1
  assert not unfinished.exists()


def _limited(max_bytes: int):
  """Files of this process may not grow beyond `max_bytes`."""
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))


def test_when_a_file_cannot_grow_the_error_is_one_line_and_nothing_is_lost(
    tmp_path):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  noise = jax.random.normal(jax.random.PRNGKey(0), (500_000,))
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, tree_of(1), INFO)
    checkpoints.wait()
    try:
      _limited(100_000)
      with pytest.raises(types.UserError) as caught:
        checkpoints.save(2, {'x': noise}, {})
        checkpoints.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == (
        f'cannot save checkpoint {tmp_path / "2"}: File too large; free space '
        'and run the same command to resume.')
    # The rest of the failed save no longer takes room.
    assert [p.name for p in tmp_path.iterdir()] == ['1']
    assert bits(checkpoints.restore_latest(abstract(tree_of(0))).tree) == (
        bits(tree_of(1)))
    checkpoints.save(3, tree_of(3), INFO)
    checkpoints.wait()
    assert newest_whole(tmp_path) == 3


def test_a_full_disk_is_named_in_one_line(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  checkpoints = checkpoint.Checkpointer(tmp_path)
  checkpoints.save(1, tree_of(1), INFO)
  checkpoints.wait()
  monkeypatch.setattr(manifest, 'write', full)
  checkpoints.save(2, tree_of(2), INFO)
  # The failure is only known once the background write has ended.
  with pytest.raises(types.UserError, match='No space left on device; free'):
    checkpoints.save(3, tree_of(3), INFO)
  assert newest_whole(tmp_path) == 1


def test_other_errors_of_a_save_keep_their_type(tmp_path, monkeypatch):
  def broken(*_):
    raise RuntimeError('a bug')

  checkpoints = checkpoint.Checkpointer(tmp_path)
  monkeypatch.setattr(manifest, 'write', broken)
  checkpoints.save(1, tree_of(1), INFO)
  with pytest.raises(RuntimeError, match='a bug'):
    checkpoints.wait()


KILLED = """
import sys
import jax.numpy as jnp
from longjax.train import checkpoint
checkpoints = checkpoint.Checkpointer(sys.argv[1])
step = 0
while True:
  step += 1
  checkpoints.save(step, {'x': jnp.full((1000,), step)}, {'step': step})
  print(step, flush=True)
"""


def test_a_process_killed_while_saving_leaves_a_valid_checkpoint(tmp_path):
  for delay_seconds in (0.003, 0.011, 0.017):
    process = subprocess.Popen(
        [sys.executable, '-c', KILLED, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
      if int(line) == 4:
        break
    time.sleep(delay_seconds)
    process.kill()
    process.wait()
    process.stdout.close()
    with checkpoint.Checkpointer(tmp_path) as checkpoints:
      like = jax.ShapeDtypeStruct(
          (1000,), jnp.int32,
          sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
      restored = checkpoints.restore_latest({'x': like})
    assert restored.step >= 3
    assert restored.info == {'step': restored.step}
    np.testing.assert_array_equal(restored.tree['x'], restored.step)


def test_a_stop_signal_is_noted_once_and_a_second_interrupt_aborts():
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with checkpoint.StopSignal() as stop:
    assert not stop
    assert stop.exit_code == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop
    assert stop.name == 'SIGTERM'
    assert stop.exit_code == 143
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)
  assert before == (
      signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_one_interrupt_asks_for_a_stop_without_aborting():
  with checkpoint.StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
    assert stop
    assert stop.exit_code == 130


def test_processes_agree_to_stop_at_the_same_place(monkeypatch):
  """The answer is that of the call before, of whichever process was told."""
  with checkpoint.StopSignal() as stop:
    assert not stop.agree()
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    others = iter([0, 0, 15, 0, 15])
    monkeypatch.setattr(
        checkpoint.multihost, 'maximum',
        lambda value: jnp.int32(max(value, next(others))))
    assert [stop.agree() for _ in range(4)] == [False, False, False, True]
    assert stop.exit_code == 0
    stop.settle()
    assert stop.name == 'SIGTERM' and stop.exit_code == 143

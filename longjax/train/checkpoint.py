"""Checkpoints: saved while training goes on, checked before they are used.

A step's directory is written by Orbax under a temporary name. When every file
is there, a manifest of their sizes and CRCs is added, and then the directory
is renamed: what carries its final name is complete, and a file truncated or
altered later is found by its CRC. On an object store (gs://...) nothing can be
renamed; there a step counts once Orbax has added its commit file.

  with checkpoint.Checkpointer(workdir / 'checkpoints') as checkpoints:
    restored = checkpoints.restore_latest(abstract_state)
    ...
    checkpoints.save(step, state, {'stage': 'rl'})
"""

import contextlib
import dataclasses
import errno
import os
import re
import signal
import types as python_types
from typing import Any

import chex
import jax
import orbax.checkpoint as ocp
from absl import logging

from longjax import types
from longjax.parallel import multihost
from longjax.train import manifest, mirror

_TMP_INFIX = '.orbax-checkpoint-tmp'
_COMMIT_FILE = 'commit_success.txt'
_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM,
    errno.EROFS, errno.EIO)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
  """What a checkpoint held.

  Attributes:
    step: the number it was saved under.
    tree: the arrays, placed as the abstract tree asked.
    info: the JSON values saved beside them.
  """

  step: int
  tree: Any
  info: dict[str, Any]


class Checkpointer:
  """Saves and restores trees of arrays under one directory.

  Every process of a run calls the same methods in the same order.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2):
    """Opens or makes the directory.

    Args:
      directory: holds one subdirectory per step; may be a URL.
      keep: newest checkpoints kept; at least 2, so that one remains when the
        newest turns out to be damaged.
    """
    if keep < 2:
      raise types.UserError(
          f'keep={keep} checkpoints would leave none if one is damaged; keep '
          'at least 2.')
    self._directory = mirror.absolute(directory)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(
            post_finalization_callback=self._write_manifest),
    )
    try:
      self._manager = ocp.CheckpointManager(self._directory, options=options)
    except OSError as error:
      raise types.UserError(
          f'cannot use checkpoint directory {self._directory}: '
          f'{error.strerror}.') from error
    self._saving: int | None = None

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def save(
      self, step: int, tree: chex.ArrayTree, info: dict[str, Any]
  ) -> None:
    """Begins to save; returns when the arrays may be donated or changed.

    A save that is still going on is waited for first. An existing checkpoint
    of the same step is replaced.

    Args:
      step: its number; the newest checkpoint is the one with the highest.
      tree: any pytree of arrays, of jax or NumPy; the latter equal in all
        processes.
      info: anything JSON can hold exactly.

    Raises:
      UserError: the disk is full or not writable (of this save, or of the
        previous one, whose failure was not known when its call returned). The
        previous checkpoints are intact.
    """
    self.wait()
    if step in self._manager.all_steps():
      self._manager.delete(step)
    if jax.default_backend() == 'cpu':
      # Host memory is read in place while the disk is written, and the
      # caller is about to donate it.
      tree = jax.tree.map(lambda x: x.copy(), tree)
    args = ocp.args.Composite(
        tree=ocp.args.StandardSave(tree), info=ocp.args.JsonSave(info))
    self._saving = step
    try:
      self._manager.save(step, args=args, force=True)
    except (OSError, ValueError, RuntimeError) as error:
      self._fail(error)

  def wait(self) -> None:
    """Returns when everything saved is on disk; raises as `save` does."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError, RuntimeError) as error:
      self._fail(error)
    self._saving = None

  def close(self) -> None:
    """Waits, then lets go of threads."""
    self.wait()
    self._manager.close()

  def steps(self) -> list[int]:
    """Numbers of the checkpoints present, damaged ones too, ascending."""
    is_remote = mirror.is_remote(self._directory)
    return sorted(
        int(path.name)
        for path in self._directory.iterdir()
        if path.name.isdecimal() and path.is_dir()
        and (not is_remote or (path / _COMMIT_FILE).exists()))

  def restore(self, step: int, abstract_tree: Any) -> Restored:
    """Reads one checkpoint.

    Args:
      step: its number.
      abstract_tree: the tree that was saved, as ShapeDtypeStructs with the
        shardings wanted now, or NumPy arrays; or what makes it of the `info`
        that was saved.

    Raises:
      UserError: it is absent or damaged.
    """
    problem = multihost.on_primary(
        lambda: manifest.damage(self._directory / str(step)))
    if problem:
      raise types.UserError(
          f'checkpoint {self._directory / str(step)} is damaged: {problem}.')
    return self._restore(step, abstract_tree)

  def _restore(self, step: int, abstract_tree: Any) -> Restored:
    info = self._manager.restore(
        step, args=ocp.args.Composite(info=ocp.args.JsonRestore())).info
    if callable(abstract_tree):
      abstract_tree = abstract_tree(info)
    tree = self._manager.restore(
        step, args=ocp.args.Composite(
            tree=ocp.args.StandardRestore(abstract_tree))).tree
    return Restored(step=step, tree=tree, info=info)

  def restore_latest(self, abstract_tree: Any) -> Restored | None:
    """Reads the newest undamaged checkpoint; None if there is none.

    Newer ones that are damaged are named in a warning and deleted: the run
    will come by their steps again.
    """
    step = multihost.on_primary(self._newest_undamaged)
    self._manager.reload()
    return None if step is None else self._restore(step, abstract_tree)

  def _newest_undamaged(self) -> int | None:
    """Its number; those after it are deleted."""
    steps = self.steps()
    for step in reversed(steps):
      problem = manifest.damage(self._directory / str(step))
      if not problem:
        return step
      logging.warning(
          'Checkpoint %s is damaged (%s); %s.', self._directory / str(step),
          problem, 'using the one before it' if step > steps[0] else
          'there is none before it, so training begins again')
      (self._directory / str(step)).rmtree()
    return None

  def _write_manifest(self) -> None:
    """Lists the files of the step being saved, before it gets its name."""
    if not multihost.is_primary():
      return
    paths = list(self._directory.glob(f'{self._saving}{_TMP_INFIX}*'))
    if mirror.is_remote(self._directory):
      paths = [self._directory / str(self._saving)]
    assert paths, f'no temporary directory of step {self._saving}'
    for path in paths:
      manifest.write(path)

  def _fail(self, error: Exception) -> None:
    """Raises UserError for trouble with the disk, else `error`."""
    step, self._saving = self._saving, None
    reason = _disk_trouble(error)
    if reason is None:
      raise error
    if multihost.is_primary():
      with contextlib.suppress(OSError):
        for path in self._directory.glob(f'*{_TMP_INFIX}*'):
          path.rmtree(missing_ok=True)
    raise types.UserError(
        f'cannot save checkpoint {self._directory / str(step)}: {reason}; free '
        'space and run the same command to resume.') from error


class StopSignal:
  """Notes SIGTERM and SIGINT, so that a job can save before it stops.

  A second SIGINT raises KeyboardInterrupt at once. Use as a context manager in
  the main thread; the previous handlers return on exit.

    with checkpoint.StopSignal() as stop:
      while step < num_steps and not stop:
        ...
  """

  def __init__(self) -> None:
    self.number: int | None = None
    self._previous: dict[int, Any] = {}
    self._asked: jax.Array | None = None

  def __enter__(self) -> 'StopSignal':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __bool__(self) -> bool:
    return self.number is not None

  def agree(self) -> bool:
    """Whether a signal came, with the same answer in all processes.

    A signal may reach one of them only. All call this at the same places;
    with several processes the answer is what was known at the call before,
    so that nobody waits for the devices.
    """
    if jax.process_count() == 1:
      return bool(self)
    asked, self._asked = self._asked, multihost.maximum(self.number or 0)
    return asked is not None and int(asked) > 0

  def agree_now(self) -> bool:
    """The same, waiting for what all know now; for where devices are idle."""
    return int(multihost.maximum(self.number or 0)) > 0

  def settle(self) -> None:
    """Gives all processes, stopped together, the signal that stopped them."""
    self.number = int(multihost.maximum(self.number or 0)) or None

  @property
  def name(self) -> str:
    """'SIGTERM' or 'SIGINT'; '' if none came."""
    return signal.Signals(self.number).name if self.number else ''

  @property
  def exit_code(self) -> int:
    """What a process stopped by the signal exits with; 0 if none came."""
    return 128 + self.number if self.number else 0

  def _note(self, number: int, _: python_types.FrameType | None) -> None:
    if self.number is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.number = number


def _disk_trouble(error: BaseException | None) -> str | None:
  """The operating system's words for a failed write; None if it was no such.

  Orbax and TensorStore wrap the error of the write, the latter as text.
  """
  while error is not None:
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
      return os.strerror(error.errno)
    for number in _DISK_ERRORS:
      if re.search(rf'\b{re.escape(os.strerror(number))}\b', str(error)):
        return os.strerror(number)
    error = error.__cause__ or error.__context__
  return None

"""A work directory on an object store (gs://...), worked on in a local copy.

An object store cannot append to a file or rename a directory, and data sets,
tokenizers and safetensors are read from disks. So a run works in a local
directory as it always does, and `publish` brings the store up to date between
steps: before each checkpoint, after each stage, at the end. Checkpoints and
compiled programs go straight to the store and are not in the copy.

An object appears whole when it is written. A list of all files, `MIRROR.json`,
is written after them: what it does not name does not belong to the run, so a
kill in the middle of a directory leaves nothing half there. After a kill the
store's copy is taken; records past its last checkpoint are truncated, as on a
disk.

For a work directory on a disk everything here does nothing.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import jax
from etils import epath

from longjax import types
from longjax.parallel import multihost

LIST_FILE = 'MIRROR.json'

# What other processes read of what the primary one wrote.
_FOR_ALL = (
    'config.json', 'tokenizer/', 'data/', 'models/', 'prompt_stats/',
    'selected/')
# Of a Hugging Face directory; others hold the weights once more.
_MODEL_SUFFIXES = ('.json', '.jinja', '.model', '.safetensors', '.txt')


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path leads to an object store."""
  return '://' in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> epath.Path:
  """The path from the root; a URL stays as it is."""
  return epath.Path(path) if is_remote(path) else epath.Path(path).absolute()


class Mirror:
  """A work directory and its local copy; the same thing on a disk.

  Attributes:
    local: where a run reads and writes all but checkpoints.
    remote: the work directory as the user named it.
  """

  def __init__(self, workdir: str | os.PathLike[str]):
    """Takes the copy of what the store holds; all processes call this.

    Args:
      workdir: a path on a disk, or a URL such as 'gs://bucket/run'.
    """
    self.remote = epath.Path(workdir)
    # What the store is known to hold: name -> size and time of our file.
    self._stored: dict[str, list[int]] = {}
    if not is_remote(workdir):
      self.local = pathlib.Path(workdir)
      return
    self.local = _local_copy(workdir)
    shutil.rmtree(self.local, ignore_errors=True)  # Of an earlier process.
    self.local.mkdir(parents=True)
    multihost.on_primary(lambda: self._download(''))

  def publish(self) -> None:
    """Brings what the primary process wrote to the store and to the others.

    All processes call it at the same places, when no file is half written.
    """
    if not is_remote(self.remote):
      return
    multihost.on_primary(self._upload)
    if not multihost.is_primary():
      self._download(_FOR_ALL)

  def _upload(self) -> None:
    present = {}
    for path in sorted(self.local.rglob('*')):
      if path.is_file():
        stat = path.stat()
        present[path.relative_to(self.local).as_posix()] = [
            stat.st_size, stat.st_mtime_ns]
    if present == self._stored:
      return
    with reporting(self.remote):
      for name, state in present.items():
        if self._stored.get(name) != state:
          _copy(self.local / name, self.remote / name)
      (self.remote / LIST_FILE).write_text(json.dumps(present, indent=0))
      for name in self._stored.keys() - present.keys():
        (self.remote / name).unlink(missing_ok=True)
    self._stored = present

  def _download(self, prefixes: str | tuple[str, ...]) -> None:
    """Takes the files of the store whose names begin so, if they changed."""
    with reporting(self.remote):
      if not (self.remote / LIST_FILE).exists():
        return
      listed = json.loads((self.remote / LIST_FILE).read_text())
      for name, state in listed.items():
        if not name.startswith(prefixes) or self._stored.get(name) == state:
          continue
        if not (self.remote / name).exists():
          continue  # Deleted by the user, who wants it made again.
        target = self.local / name
        _copy(self.remote / name, target)
        # The time tells a file that has changed since.
        os.utime(target, ns=(state[1], state[1]))
        self._stored[name] = state


def fetched(directory: pathlib.Path | epath.Path) -> pathlib.Path:
  """Where the files of a model or tokenizer can be read from a disk.

  That is the directory itself, or a copy of one on an object store.
  """
  if not is_remote(directory):
    return pathlib.Path(directory)
  source, target = epath.Path(directory), _local_copy(directory)
  with reporting(source):
    for path in source.iterdir():
      if path.suffix not in _MODEL_SUFFIXES:
        continue
      copy = target / path.name
      if not copy.exists() or copy.stat().st_size != path.stat().length:
        _copy(path, copy)
  return target


def _local_copy(url: str | os.PathLike[str]) -> pathlib.Path:
  """One for each process: several may share a host."""
  name = hashlib.sha256(os.fspath(url).rstrip('/').encode()).hexdigest()[:16]
  return pathlib.Path(
      tempfile.gettempdir(), f'longjax-{name}-{jax.process_index()}')


def _copy(
    source: pathlib.Path | epath.Path, target: pathlib.Path | epath.Path
) -> None:
  if not is_remote(target):
    target.parent.mkdir(parents=True, exist_ok=True)
  with source.open('rb') as read, target.open('wb') as write:
    shutil.copyfileobj(read, write, 1 << 22)


@contextlib.contextmanager
def reporting(path: pathlib.Path | epath.Path) -> Iterator[None]:
  """Turns what an object store answers into one line."""
  if not is_remote(path):
    yield
    return
  try:
    yield
  except types.UserError:
    raise
  except ImportError as error:
    raise types.UserError(
        f'{path} needs a package that is not installed ({error}); for gs:// '
        'LONGJAX_EXTRAS=gcs bash launch/local.sh installs it.') from error
  # Their clients raise what they like: gcsfs has errors of its own, and lets
  # those of google.auth and aiohttp through.
  except Exception as error:
    raise types.UserError(
        f'cannot use {path}: {error or type(error).__name__}; see that it is '
        'there and that you may use it, then run the same command again.'
    ) from error

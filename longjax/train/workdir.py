"""Whose a work directory is, and the facts about its run.

  config.json  the resolved configuration; a run of another one is refused
  run.json     device, versions, command, seconds by stage, time it finished
  compiled/    programs, so that a restart need not compile them again
"""

import contextlib
import json
import os
import pathlib
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from longjax import config as config_lib
from longjax import types
from longjax.data import records
from longjax.parallel import multihost
from longjax.train import mirror, run_state

CONFIG_FILE = 'config.json'
FACTS_FILE = 'run.json'
COMPILED_FOLDER = 'compiled'

# What a run leaves that only its own config can go on from.
RESULTS = (
    'tokenizer', 'data', 'checkpoints', 'evals', 'model', 'metrics.jsonl')
_PACKAGES = ('jax', 'jaxlib', 'longjax')


def claim(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    *,
    name: str | os.PathLike[str] | None = None,
) -> None:
  """Writes config.json, or refuses the work directory of another config.

  Where a run has left nothing yet, as after a mistake in its config, the new
  config simply takes its place. A directory of something else is refused.

  Args:
    workdir: of the run; the primary process calls this.
    config: resolved, see `config.resolved`.
    name: what the user calls the directory, if it is a copy.

  Raises:
    UserError: the directory holds a run of another config, whose fields are
      named, or something that is no run.
  """
  name = workdir if name is None else name
  path = workdir / CONFIG_FILE
  results = _results(workdir)
  if not path.exists() and results:
    raise types.UserError(
        f'--workdir={name} holds {", ".join(results)} but no '
        f'{CONFIG_FILE} that says of which run; use another --workdir.')
  there = _read(path) if path.exists() else config
  if not {'recipe', 'stages'} <= there.keys():
    # A model's, perhaps.
    raise types.UserError(
        f'{name}/{CONFIG_FILE} is no config of a run; use '
        'another --workdir.')
  if not results:
    records.write_text(path, json.dumps(config, indent=1))
    return
  changed = config_lib.differences(there, config)
  if changed:
    more = f' and {len(changed) - 3} more' if len(changed) > 3 else ''
    raise types.UserError(
        f'--workdir={name} holds a run of a different config: '
        f'{"; ".join(changed[:3])}{more}. Use another --workdir, or the same '
        'config to resume.')


def check_shared(copy: mirror.Mirror) -> None:
  """Raises UserError unless this process sees what the primary one wrote."""
  if not (copy.local / CONFIG_FILE).exists():
    raise types.UserError(
        f'--workdir={copy.remote} is not the same directory in all processes; '
        'give one on a file system they share, or gs://BUCKET/DIR.')


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    there = json.loads(path.read_bytes())
  except ValueError as error:
    raise types.UserError(
        f'{path} is damaged ({error}); restore it, or use another '
        '--workdir.') from error
  return there if isinstance(there, dict) else {}


def _results(workdir: pathlib.Path) -> list[str]:
  """Names of what was made here and belongs to one config."""
  return [
      name for name in RESULTS
      if (workdir / name).is_file() or any((workdir / name).glob('*'))]


def use_compilation_cache(workdir: str | os.PathLike[str]) -> None:
  """Keeps compiled programs in the work directory: restarts compile nothing.

  A directory that jax was given otherwise (JAX_COMPILATION_CACHE_DIR) is left
  as it is.
  """
  directory = jax.config.values['jax_compilation_cache_dir']
  if directory and pathlib.Path(directory).name != COMPILED_FOLDER:
    return
  compilation_cache.reset_cache()  # Of another run of this process.
  folder = mirror.absolute(workdir) / COMPILED_FOLDER
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  # Of a full disk or a killed process. It costs a compilation, nothing else.
  warnings.filterwarnings(
      'ignore', message='Error (reading|writing) persistent compilation cache')


class Facts:
  """run.json; what is not about arrays or text, and differs between runs."""

  def __init__(self, workdir: pathlib.Path):
    self._path = workdir / FACTS_FILE
    self._values: dict[str, Any] = {}
    if self._path.exists():
      # Nothing depends on it.
      with contextlib.suppress(types.UserError):
        self._values = _read(self._path)

  @property
  def is_finished(self) -> bool:
    """Whether all stages have been run."""
    return bool(self._values.get('finished'))

  def describe(self, devices: np.ndarray, *, seed: int) -> None:
    """Notes what runs where."""
    self._values |= {
        'device': f'{devices.size} x {devices.flat[0].device_kind}',
        'seed': seed,
        'command': ' '.join(sys.argv),
        'python': platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }
    self._write()

  @contextlib.contextmanager
  def timing(self, name: str) -> Iterator[None]:
    """Adds the seconds spent inside to those of a stage.

    Those of a process that was killed are not known and not counted.
    """
    began = time.perf_counter()
    try:
      yield
    except run_state.Stopped:
      self._add(name, time.perf_counter() - began)
      raise
    self._add(name, time.perf_counter() - began)

  def finish(self) -> None:
    """Notes that all stages have been run."""
    self._values['finished'] = time.strftime('%Y-%m-%d %H:%M:%S %z')
    self._write()

  def _add(self, name: str, seconds: float) -> None:
    spent = self._values.setdefault('seconds', {})
    spent[name] = round(spent.get(name, 0.0) + seconds, 2)
    self._write()

  def _write(self) -> None:
    if multihost.is_primary():
      records.write_text(self._path, json.dumps(self._values, indent=1))


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return 'not installed'

"""What a command line says, before a job has read it.

Overrides are kept as they were given, because only the dataclass of a job
knows their keys and types (`longjax.overrides`).
"""

import dataclasses
import os
import pathlib
import re
import uuid
from collections.abc import Sequence
from typing import Any

from etils import epath

from longjax import config as config_lib
from longjax import overrides, types

# A flag's key and value on the command line.
Override = tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """What is to be done, and where.

  Attributes:
    values: of the config file, without the overrides.
    changes: the overrides, in order.
    config_file: as given, with its variant.
    workdir: as given; None is one named after the config file.
    plan: TPU topology to plan the run for; None runs it.
    is_plan_optimized: see `planner.job.Options`.
    is_plan_searched: likewise.
  """

  values: Any
  changes: Sequence[Override]
  config_file: str
  workdir: str | None = None
  plan: str | None = None
  is_plan_optimized: bool = False
  is_plan_searched: bool = True

  @property
  def job(self) -> str:
    """What the config file and the overrides ask for."""
    return dict(self.changes).get('job', self.values.get('job', 'recipe'))

  @property
  def workdir_name(self) -> str:
    """The directory for results, as the user knows it."""
    return self.workdir or default_workdir(self.config_file)

  def build(self, cls: type) -> Any:
    """The `cls` that values and overrides describe; see `build`."""
    return build(cls, self.values, self.changes)


def split_overrides(
    arguments: Sequence[str],
) -> tuple[list[str], list[Override]]:
  """Separates `--config.KEY=VALUE` from the other arguments.

  `--config.KEY VALUE` means the same; without a value it is true, and
  `--noconfig.KEY` is false. Of `--ask.KEY` the key is `ask.KEY`, see
  `other_jobs`.
  """
  rest: list[str] = []
  found: list[Override] = []
  queue = list(arguments)
  while queue:
    argument = queue.pop(0)
    match = re.fullmatch(
        r'--?(no)?(?:config\.|(?=ask\.))([^=]+)(=.*)?', argument, re.DOTALL)
    if match is None:
      rest.append(argument)
      continue
    is_negated, key, value = match.groups()
    if value is not None:
      text = value[1:]
    elif is_negated:
      text = 'false'
    elif queue and not re.match(r'--?[a-zA-Z]', queue[0]):
      text = queue.pop(0)
    else:
      text = 'true'
    found.append((key, text))
  return rest, found


def default_workdir(config_file: str) -> str:
  """'configs/tiny.py:own_data' -> 'runs/tiny-own_data'."""
  path, _, variant = config_file.partition(':')
  stem = pathlib.Path(path).stem
  variant = re.sub(r'[^\w.-]+', '-', variant)
  return os.path.join('runs', f'{stem}-{variant}' if variant else stem)


def open_workdir(path: str) -> epath.Path:
  """Makes the directory; UserError if nothing can be written there."""
  from longjax.train import mirror

  workdir = epath.Path(path)
  try:
    with mirror.reporting(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
      probe = workdir / f'.writable-{uuid.uuid4().hex}'  # Of this process.
      probe.write_bytes(b'')
      probe.unlink()
  except OSError as error:
    raise types.UserError(
        f'cannot write to --workdir={path}: {error.strerror or error}; choose '
        'another directory.') from error
  return workdir


def build(cls: type, values: Any, changes: Sequence[Override]) -> Any:
  """The `cls` that a config file's values and the overrides describe.

  Raises:
    UserError: a key is unknown or a value none of its type.
  """
  for key, text in changes:
    overrides.apply(cls, values, key, text)
  return config_lib.build(cls, values, 'config')

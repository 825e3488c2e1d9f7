"""The command line: loads a config, applies overrides, runs its job.

`ml_collections.config_flags` loads the file. The overrides
`--config.key=value` are applied here, because the dataclasses, not the file,
know every key and type (`longjax.overrides`).

Exit codes: 0 done, 1 a bug (with traceback), 2 a mistake of the user's (one
line), 130 or 143 stopped by SIGINT or SIGTERM after saving.
"""

import difflib
import errno
import logging as python_logging
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from longjax import config as config_lib
from longjax import overrides, types

USAGE = """\
longjax: long-context reasoning and memory post-training in JAX

  longjax --config=FILE [--workdir=DIR] [--config.KEY=VALUE ...]

  --config=FILE[:VARIANT]  a Python file with get_config(), see configs/
  --workdir=DIR            results and checkpoints (default: runs/<config>);
                           the same command again resumes or reports the run
  --config.KEY=VALUE       sets one value, e.g. --config.seed=1; keys are dotted
  --helpfull               every flag, those of absl and jax included

The config's `job` chooses what is done:
  recipe   the stages named in the config, one after the other
  synth    write synthetic long-context examples
  pretrain train a small base model on synthetic text
  sft      supervised fine-tuning
  rl       AEPO reinforcement learning
  evals    score a model by task and context length

Examples:
  longjax --config=configs/tiny.py
  longjax --config=configs/tiny.py --workdir=/tmp/run --config.seed=1
  longjax --config=configs/tiny.py:own_data --workdir=/tmp/own_data

`python -m longjax` is the same. `bash launch/local.sh` installs and runs.
"""

# Loading only: `sys_argv` keeps config_flags from looking for overrides.
_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Python file with get_config(), and :VARIANT.',
    lock_config=False, sys_argv=[])
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Results and checkpoints; default runs/<config>.')

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# A flag's key and value on the command line.
_Override = tuple[str, str]


def run() -> None:
  """The console script; exits the process."""
  arguments = sys.argv[1:]
  if not arguments:
    sys.stderr.write(USAGE)
    sys.exit(2)
  if {'--help', '-help', '-h', '--helpshort', '-?'} & set(arguments):
    sys.stdout.write(USAGE)
    sys.exit(0)
  app.run(_main, flags_parser=_parse_flags)


def split_overrides(
    arguments: Sequence[str],
) -> tuple[list[str], list[_Override]]:
  """Separates `--config.KEY=VALUE` from the other arguments.

  `--config.KEY VALUE` means the same; without a value it is true, and
  `--noconfig.KEY` is false.
  """
  rest: list[str] = []
  found: list[_Override] = []
  queue = list(arguments)
  while queue:
    argument = queue.pop(0)
    match = re.fullmatch(
        r'--?(no)?config\.([^=]+)(=.*)?', argument, re.DOTALL)
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


def open_workdir(path: str) -> pathlib.Path:
  """Makes the directory; UserError if nothing can be written there."""
  workdir = pathlib.Path(path)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / '.writable').touch()
    (workdir / '.writable').unlink()
  except OSError as error:
    raise types.UserError(
        f'cannot write to --workdir={path}: {error.strerror}; choose another '
        'directory.') from error
  return workdir


def check_readable(config_file: str) -> None:
  """Raises UserError if there is no such config, with the nearest name."""
  path = pathlib.Path(config_file.partition(':')[0])
  try:
    path.read_bytes()
  except OSError as error:
    present = sorted(map(str, path.parent.glob('*.py'))) or sorted(
        map(str, pathlib.Path('configs').glob('*.py')))
    near = difflib.get_close_matches(str(path), present, n=1, cutoff=0.0)
    hint = f'; did you mean {near[0]}?' if near else '.'
    raise types.UserError(
        f'cannot read --config={path}: {error.strerror}{hint}') from error
  if path.suffix != '.py':
    raise types.UserError(
        f'--config={path} is no Python file; for example '
        '--config=configs/tiny.py.')


def build(cls: type, values: Any, changes: Sequence[_Override]) -> Any:
  """The `cls` that a config file's values and the overrides describe."""
  for key, text in changes:
    overrides.apply(cls, values, key, text)
  return config_lib.build(cls, values, 'config')


def _parse_flags(
    argv: list[str],
) -> tuple[list[str], list[_Override]]:
  """Parses absl's flags; what it returns is handed to `_main`."""
  rest, changes = split_overrides(argv[1:])
  for argument, following in zip(rest, [*rest[1:], '']):
    match = re.fullmatch(r'--?config(?:=(.*))?', argument, re.DOTALL)
    if match:
      try:
        check_readable(following if match[1] is None else match[1])
      except types.UserError as error:
        _refuse(error)
  try:
    positional = flags.FLAGS([argv[0], *rest])[1:]
  except flags.UnrecognizedFlagError as error:
    prefix, _, key = error.flagname.partition('.')
    if key:
      _refuse(f'--{prefix}.{key} is no flag; did you mean --config.{key}?')
    _refuse(error)
  except flags.Error as error:
    mistake = _user_error_within(error)
    if mistake is None and isinstance(error, flags.IllegalFlagValueError):
      if 'get_config() takes 0 positional arguments' in str(error):
        _refuse('the file given as --config has no variants; leave out what '
                'stands behind its colon.')
      if 'Error whilst parsing config file' in str(error):
        raise  # A bug in the config file: its traceback is what helps.
    _refuse(mistake or error)
  except AttributeError as error:
    if error.name != 'get_config':
      raise
    _refuse('the file given as --config does not define get_config(); see '
            'configs/tiny.py for one that does.')
  return positional, changes


def _main(parsed: tuple[list[str], list[_Override]]) -> int:
  """Runs the job; returns the exit code."""
  positional, changes = parsed
  _set_up_logging()
  try:
    if positional:
      raise types.UserError(
          f'unexpected argument {positional[0]!r}; flags look like '
          '--workdir=DIR or --config.seed=1.')
    if _CONFIG.value is None:
      raise types.UserError(
          'no --config=FILE given; for example --config=configs/tiny.py.')
    # Here, because --help and mistakes should not wait for orbax and grain.
    from longjax import recipe

    run_config = build(recipe.RunConfig, _CONFIG.value, changes)
    config_flag: Any = flags.FLAGS['config']
    workdir = open_workdir(
        _WORKDIR.value or default_workdir(config_flag.config_filename))
    return recipe.run(run_config, workdir) or 0
  except types.UserError as error:
    _refuse(error)
  except KeyboardInterrupt:
    sys.stderr.write(
        'longjax: interrupted; run the same command to resume from the last '
        'checkpoint.\n')
    return 130
  except PermissionError as error:
    _refuse(
        f'cannot use {error.filename or "a file"}: {error.strerror}; change '
        'its permissions and run the same command again.')
  except OSError as error:
    if error.errno not in _DISK_ERRORS:
      raise
    _refuse(
        f'cannot write {error.filename or "to the work directory"}: '
        f'{error.strerror}; free space and run the same command to resume.')


def _refuse(error: object) -> NoReturn:
  """Prints one line and exits with 2."""
  message = ' '.join(str(error).split())
  sys.stderr.write(f'longjax: error: {message}\n')
  sys.stderr.flush()
  sys.exit(2)


def _user_error_within(error: BaseException | None) -> types.UserError | None:
  """The first UserError among an exception's causes, as it was raised."""
  found = None
  while error is not None:
    if isinstance(error, types.UserError):
      found = error
    error = error.__cause__ or error.__context__
  return found


class _Format(python_logging.Formatter):
  """Our own news as plain lines, warnings marked as such."""

  def format(self, record: python_logging.LogRecord) -> str:
    text = super().format(record)
    if record.levelno >= python_logging.WARNING:
      return f'longjax: {record.levelname.lower()}: {text}'
    return text


def _report_stray(unraisable: Any) -> None:
  """Python's unraisablehook, without the echoes of a failed save.

  When one array of a checkpoint cannot be written, Orbax closes its event
  loop, and TensorStore cannot report the arrays that are still on their way.
  """
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def _set_up_logging() -> None:
  """Lets our lines through, and of other libraries only what matters."""
  handler = logging.get_absl_handler()
  if logging.get_verbosity() > logging.INFO:
    return  # --verbosity=1 shows everything, with files and times.
  handler.setFormatter(_Format())
  sys.unraisablehook = _report_stray
  package = str(pathlib.Path(__file__).parent)

  def matters(record: python_logging.LogRecord) -> bool:
    if record.pathname.startswith(package):
      return True
    # Orbax logs every failed save several times over, with tracebacks, and
    # then raises it: `train.checkpoint` says it in one line.
    # asyncio says it once more when the failed write is forgotten.
    is_orbax = (f'{os.sep}orbax{os.sep}' in record.pathname
                or record.name == 'asyncio')
    return record.levelno >= python_logging.WARNING and not is_orbax

  handler.addFilter(matters)

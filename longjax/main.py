"""The command line: loads a config, applies overrides, runs its job.

`ml_collections.config_flags` loads the file. The overrides
`--config.key=value` are taken off before (`longjax.command_line`), because the
dataclasses, not the file, know every key and type.

Exit codes: 0 done, 1 a bug (with traceback), 2 a mistake of the user's (one
line), 42 another process was lost (one line, see `parallel.processes`), 130 or
143 stopped by SIGINT or SIGTERM after saving, 141 nobody reads on.
"""

import contextlib
import difflib
import errno
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import config_flags

from longjax import command_line, log, other_jobs, types

USAGE = """\
longjax: long-context reasoning and memory post-training in JAX

  longjax --config=FILE [--workdir=DIR] [--config.KEY=VALUE ...]

  --config=FILE[:VARIANT]  a Python file with get_config(), see configs/
  --workdir=DIR            results and checkpoints (default: runs/<config>;
                           may be gs://BUCKET/DIR);
                           the same command again resumes or reports the run
  --config.KEY=VALUE       sets one value, e.g. --config.seed=1; keys are dotted
  --ask.KEY=VALUE          the same for configs/ask.py
  --distributed            one of several processes that train one model: the
                           same command on every host, work directory shared
  --plan=TOPOLOGY          runs nothing, but compiles the run for a TPU slice
                           such as v5p:4x4x8, on any machine: does it fit, how
                           long may it take? See docs/scale.md
  --helpfull               every flag, those of absl and jax included

The config's `job` chooses what is done:
  recipe   the stages named in the config, one after the other
  synth    write synthetic long-context examples
  pretrain train a small base model on synthetic text
  sft      supervised fine-tuning
  rl       AEPO reinforcement learning
  evals    score a model by task and context length
  convert  write a checkpoint as a Hugging Face directory, see
           configs/convert.py
  merge    make one model of several that began as one, see configs/merge.py
  ask      answer questions about documents of any length, see configs/ask.py
  bench    measure prefill, decode, score and update on this machine, see
           configs/bench.py

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

_DISTRIBUTED = flags.DEFINE_boolean(
    'distributed', False,
    'This is one of several processes; the same command starts all of them. '
    'Cloud TPU, Slurm and Kubernetes say which one, elsewhere the next three '
    'flags do.')
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, a free port.')
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'Number of processes.', lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', None, 'Which of them this is.', lower_bound=0)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    'heartbeat_timeout', 30,
    'Seconds of silence after which another process counts as lost.',
    lower_bound=2)

_PLAN = flags.DEFINE_string(
    'plan', None, 'TPU topology to plan the run for, in place of running it.')
_PLAN_OPTIMIZE = flags.DEFINE_boolean(
    'plan_optimize', False,
    "Compile plans at the compiler's default level: takes several times as "
    'long.')
_PLAN_SEARCH = flags.DEFINE_boolean(
    'plan_search', True,
    'Plans also find the longest context and the smallest topology that fit.')

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def run() -> None:
  """The console script; exits the process."""
  arguments = sys.argv[1:]
  # So that a config can import its neighbours, however longjax was started.
  sys.path += [os.getcwd(), str(pathlib.Path(__file__).parent.parent)]
  if not arguments:
    sys.stderr.write(USAGE)
    sys.exit(2)
  if {'--help', '-help', '-h', '--helpshort', '-?'} & set(arguments):
    sys.stdout.write(USAGE)
    sys.exit(0)
  app.run(_main, flags_parser=_parse_flags)


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


def _parse_flags(
    argv: list[str],
) -> tuple[list[str], list[command_line.Override]]:
  """Parses absl's flags; what it returns is handed to `_main`."""
  rest, changes = command_line.split_overrides(argv[1:])
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


def _main(parsed: tuple[list[str], list[command_line.Override]]) -> int:
  """Runs the job; returns the exit code."""
  positional, changes = parsed
  log.set_up(is_distributed=_DISTRIBUTED.value)
  try:
    if positional:
      raise types.UserError(
          f'unexpected argument {positional[0]!r}; flags look like '
          '--workdir=DIR or --config.seed=1.')
    if _CONFIG.value is None:
      raise types.UserError(
          'no --config=FILE given; for example --config=configs/tiny.py.')
    command = command_line.Command(
        values=_CONFIG.value, changes=changes, config_file=_config_file(),
        workdir=_WORKDIR.value, plan=_PLAN.value,
        is_plan_optimized=_PLAN_OPTIMIZE.value,
        is_plan_searched=_PLAN_SEARCH.value)
    code = other_jobs.run(command, _all_processes)
    if code is not None:
      return code
    # Here, because --help and mistakes should not wait for orbax and grain.
    from longjax import recipe, run_config

    config = command.build(run_config.RunConfig)
    workdir = command_line.open_workdir(command.workdir_name)
    if command.plan is not None:
      return other_jobs.plan(config, command, workdir)
    with _all_processes():
      return recipe.run(config, workdir) or 0
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


def _config_file() -> str:
  """As given on the command line, with its variant."""
  config_flag: Any = flags.FLAGS['config']
  return config_flag.config_filename


@contextlib.contextmanager
def _all_processes() -> Iterator[None]:
  """Connects this process with the others, if there are any."""
  single = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
  if not _DISTRIBUTED.value:
    for flag in single:
      if flag.value is not None:
        raise types.UserError(f'--{flag.name} goes with --distributed.')
    yield
    return
  from longjax.parallel import processes

  processes.start(
      coordinator=_COORDINATOR.value, num_processes=_NUM_PROCESSES.value,
      process_id=_PROCESS_ID.value,
      heartbeat_timeout=_HEARTBEAT_TIMEOUT.value)
  try:
    yield
  except (types.UserError, OSError, KeyboardInterrupt):  # Told in one line.
    processes.finish()
    raise
  except Exception:
    # Perhaps only because a connection to a lost process was closed, which
    # jax reports as one kind of error or another.
    processes.wait_for_loss(_HEARTBEAT_TIMEOUT.value)
    processes.fail()
  processes.finish()


def _refuse(error: object) -> NoReturn:
  """Prints one line and exits with 2."""
  # Names of files may have what steers terminals.
  message = re.sub(
      r'[\x00-\x1f\x7f-\x9f]', '?', ' '.join(str(error).split()))
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

"""Jobs that are no recipe: what each makes of a command line.

Their modules are imported when they run: --help and mistakes wait for none.
"""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from etils import epath

from longjax import command_line, types

# Connects this process with the others while it is entered.
Connected = Callable[[], AbstractContextManager[None]]


def run(command: command_line.Command, connected: Connected) -> int | None:
  """Runs the job of a command.

  Args:
    command: what is to be done.
    connected: entered around what all processes do together.

  Returns:
    The exit code; None if the job is a recipe, or none that is known.

  Raises:
    UserError: flags that do not go with the job, or what the job refuses.
  """
  if command.job == 'ask':
    return _ask(command, connected)
  for key, _ in command.changes:
    if key.startswith('ask.'):
      raise types.UserError(
          f'--{key} does not go with job={command.job}; use it with '
          '--config=configs/ask.py.')
  if command.job in ('convert', 'merge'):
    return _from_files_to_files(command, connected)
  if command.job == 'bench':
    return _bench(command, connected)
  return None


def plan(
    config: Any, command: command_line.Command, workdir: epath.Path
) -> int:
  """Plans a recipe for a TPU slice, in place of running it.

  Args:
    config: a `run_config.RunConfig`.
    command: with `plan`.
    workdir: where the plan is written.
  """
  from longjax.planner import job

  assert command.plan is not None
  return job.run(
      config.trained(), workdir,
      job.Options(
          topology=command.plan, is_optimized=command.is_plan_optimized,
          is_searched=command.is_plan_searched,
          config_file=command.config_file),
      model=config.model, init_from=config.init_from,
      mesh=config.mesh, compute=config.compute)


def _from_files_to_files(
    command: command_line.Command, connected: Connected
) -> int:
  """Converts a model or merges several; that needs no work directory."""
  from longjax.train import convert_job, merge_job

  made: type
  run_job: Callable[[Any], int]
  if command.job == 'convert':
    made, run_job = convert_job.ConvertConfig, convert_job.run
    fields = '--config.source and --config.output'
  else:
    made, run_job = merge_job.MergeJobConfig, merge_job.run
    fields = '--config.base, --config.experts and --config.output'
  for name in ('workdir', 'plan'):
    if getattr(command, name) is not None:
      raise types.UserError(
          f'--{name} does not go with job={command.job}; set {fields}.')
  config = command.build(made)
  with connected():
    return run_job(config)


def _bench(command: command_line.Command, connected: Connected) -> int:
  """Measures this machine."""
  from longjax.bench import job, suite

  _refuse_plan(command)
  config = command.build(suite.BenchConfig)
  workdir = command_line.open_workdir(command.workdir_name)
  with connected():
    return job.run(config, workdir)


def _ask(command: command_line.Command, connected: Connected) -> int:
  """Answers questions about documents.

  `--ask.KEY` sets `KEY`. Documents and questions that are given several times
  are taken together.
  """
  from longjax.ask import job, settings

  _refuse_plan(command)
  merged: dict[str, list[str]] = {}
  for key, text in command.changes:
    merged.setdefault(key.removeprefix('ask.'), []).append(text)
  config = command_line.build(settings.AskConfig, command.values, [
      (key, repr(tuple(texts)) if len(texts) > 1 and key in (
          'documents', 'question') else texts[-1])
      for key, texts in merged.items()])
  workdir = command.workdir_name
  if '://' not in workdir:  # The job refuses it.
    command_line.open_workdir(workdir)
  try:
    with connected():
      return job.run(config, workdir)
  except BrokenPipeError:  # Of `| head`, which has read enough.
    # What is still to be written to it would fail again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141  # As of a program that SIGPIPE ends.


def _refuse_plan(command: command_line.Command) -> None:
  if command.plan is not None:
    raise types.UserError(f'--plan does not go with job={command.job}.')

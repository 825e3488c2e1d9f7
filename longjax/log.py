"""What reaches the terminal: our own news, and of other libraries what matters.

With several processes only the primary one has news; the others report errors.
"""

import logging as python_logging
import os
import pathlib
import sys
from typing import Any

from absl import logging


def set_up(*, is_distributed: bool) -> None:
  """Lets our lines through, and of other libraries only what matters.

  Args:
    is_distributed: this is one of several processes.
  """
  handler = logging.get_absl_handler()
  if logging.get_verbosity() > logging.INFO:
    return  # --verbosity=1 shows everything, with files and times.
  handler.setFormatter(_Format())
  sys.unraisablehook = _report_stray
  package = str(pathlib.Path(__file__).parent)

  def matters(record: python_logging.LogRecord) -> bool:
    if record.pathname.startswith(package):
      return record.levelno >= python_logging.ERROR or (
          not is_distributed or _is_primary())
    # Orbax logs every failed save several times over, with tracebacks, and
    # then raises it: `train.checkpoint` says it in one line.
    # asyncio says it once more when the failed write is forgotten.
    is_orbax = (f'{os.sep}orbax{os.sep}' in record.pathname
                or record.name == 'asyncio')
    return record.levelno >= python_logging.WARNING and not is_orbax

  handler.addFilter(matters)


class _Format(python_logging.Formatter):
  """Our own news as plain lines, warnings marked as such."""

  def format(self, record: python_logging.LogRecord) -> str:
    text = super().format(record)
    if record.levelno >= python_logging.WARNING:
      return f'longjax: {record.levelname.lower()}: {text}'
    return text


def _is_primary() -> bool:
  # Here, because --help and mistakes should not wait for jax.
  from longjax.parallel import multihost

  return multihost.is_primary()


def _report_stray(unraisable: Any) -> None:
  """Python's unraisablehook, without the echoes of a failed save.

  When one array of a checkpoint cannot be written, Orbax closes its event
  loop, and TensorStore cannot report the arrays that are still on their way.
  """
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)

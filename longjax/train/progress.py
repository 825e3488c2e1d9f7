"""What a person watching a run sees.

On a terminal: a bar with rate and time left, and above it one line a step. In
a log file: the same lines, and the state of the bar now and then.
"""

import collections
import math
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

import rich.console
import rich.progress

from longjax.parallel import multihost

# The rate is that of the last seconds, and of at least a few advances: the
# first step compiles, and steps get slower as responses get longer.
_WINDOW_SECONDS = 30.0
_MIN_WINDOW_ADVANCES = 4


class Progress:
  """A progress bar where there is a terminal, plain lines where not.

    with progress.Progress(num_steps, 'rl', unit='step', start=step) as bar:
      for ...:
        bar.log_step(progress.rl_line(step, num_steps, values))
        bar.advance()

  Only the primary process shows anything.
  """

  def __init__(
      self,
      total: int,
      description: str,
      unit: str = 'step',
      *,
      start: int = 0,
      stream: TextIO | None = None,
      seconds_between_lines: float = 10.0,
      clock: Callable[[], float] = time.monotonic,
  ):
    """Prepares a bar; `with` shows it.

    Args:
      total: number of units until the end.
      description: what is going on, one or two words.
      unit: one unit, singular: 'step', 'example'.
      start: units done before, by a run that this one resumes.
      stream: where to write; None is standard error.
      seconds_between_lines: cadence of plain lines.
      clock: seconds, for tests.
    """
    self._total = total
    self._description = description
    self._unit = unit
    self._start = start
    self._done = start
    self._stream = sys.stderr if stream is None else stream
    self._seconds_between_lines = seconds_between_lines
    self._clock = clock
    self._history: collections.deque[tuple[float, int]] = collections.deque()
    self._began = self._last_line = clock()
    self._bar: rich.progress.Progress | None = None
    self._is_shown = multihost.is_primary()

  def __enter__(self) -> 'Progress':
    self._began = self._last_line = self._clock()
    self._history.append((self._began, self._done))
    if self._is_shown and self._stream.isatty():
      self._bar = rich.progress.Progress(
          rich.progress.TextColumn('{task.description}', markup=False),
          rich.progress.BarColumn(bar_width=None),
          rich.progress.TextColumn('{task.fields[state]}', markup=False),
          console=rich.console.Console(file=self._stream),
          expand=True,
      )
      self._bar.add_task(
          self._description, total=self._total, completed=self._done,
          state=self.state())
      self._bar.start()
    else:
      self._plain(f'{self._description}: {self.state()}')
    return self

  def __exit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      traceback: TracebackType | None,
  ) -> None:
    if self._bar is not None:
      self._bar.stop()
      return
    how = 'stopped' if kind is not None else 'done'
    spent = duration(self._clock() - self._began)
    self._plain(f'{self._description}: {self.state()} | {how} after {spent}')

  def advance(self, amount: int = 1) -> None:
    """Counts units as done."""
    self._done += amount
    now = self._clock()
    self._history.append((now, self._done))
    while (
        len(self._history) > _MIN_WINDOW_ADVANCES + 1
        and now - self._history[1][0] > _WINDOW_SECONDS
    ):
      self._history.popleft()
    if self._bar is not None:
      task_id = self._bar.task_ids[0]
      self._bar.update(task_id, completed=self._done, state=self.state())
    elif (
        self._done < self._total
        and now - self._last_line >= self._seconds_between_lines
    ):
      self._last_line = now
      self._plain(f'{self._description}: {self.state()}')

  def log_step(self, line: str) -> None:
    """Prints a line above the bar."""
    if self._bar is not None:
      self._bar.console.print(
          line, markup=False, highlight=False, soft_wrap=True)
    else:
      self._plain(line)

  def state(self) -> str:
    """'12/120 steps (10%) | 1.4 steps/s | 1:17 left', as far as known."""
    percent = 100 * self._done // max(self._total, 1)
    parts = [f'{self._done:,}/{self._total:,} {self._unit}s ({percent}%)']
    # The first advance includes compilation and says little about the rest.
    history = [h for h in self._history if h[1] > self._start]
    if len(history) > 1:
      units = history[-1][1] - history[0][1]
      seconds = max(history[-1][0] - history[0][0], 1e-9)
      parts.append(rate(units / seconds, self._unit))
      if units and self._done < self._total:
        left = (self._total - self._done) * seconds / units
        parts.append(f'{duration(left)} left')
    return ' | '.join(parts)

  def _plain(self, line: str) -> None:
    if self._is_shown:
      self._stream.write(line + '\n')
      self._stream.flush()


def rate(units_per_second: float, unit: str) -> str:
  """'12.3 steps/s', or '4.2 s/step' for slow ones."""
  if units_per_second >= 1.0:
    digits = 0 if units_per_second >= 100 else 1
    return f'{units_per_second:,.{digits}f} {unit}s/s'
  if units_per_second <= 0.0:
    return f'0 {unit}s/s'
  return f'{1.0 / units_per_second:,.1f} s/{unit}'


def duration(seconds: float) -> str:
  """'0:07', '12:34', '5:06:07', '2d 03:04:05'."""
  minutes, second = divmod(round(max(seconds, 0.0)), 60)
  hours, minute = divmod(minutes, 60)
  days, hour = divmod(hours, 24)
  if days:
    return f'{days}d {hour:02d}:{minute:02d}:{second:02d}'
  if hours:
    return f'{hours}:{minute:02d}:{second:02d}'
  return f'{minute}:{second:02d}'


def rl_line(
    step: int, total: int, values: Mapping[str, float], *, name: str = 'rl'
) -> str:
  """One RL step in one line; parts whose metric is missing are left out.

    rl  12/120 | reward 0.42 (mc 0.50, numeric 0.21) | entropy 0.231 FULL
    [0.140, 0.250] | length 38 (2% cut) | grad 0.83 | gap 2.1e-06 | 1,234 tok/s

  The sampler/trainer gap is the mean absolute difference of logprobs, nats.
  """
  parts = [_counter(name, step, total)]
  tasks = sorted(
      name.removeprefix('reward/') for name in values
      if name.startswith('reward/') and name != 'reward/mean')
  if 'reward/mean' in values:
    by_task = ', '.join(f'{t} {values[f"reward/{t}"]:.2f}' for t in tasks)
    by_task = f' ({by_task})' if by_task else ''
    parts.append(f'reward {values["reward/mean"]:.2f}{by_task}')
  parts += _entropy_part(values)
  if 'length/mean' in values:
    cut = values.get('length/truncated', 0.0)
    parts.append(f'length {values["length/mean"]:.0f} ({cut:.0%} cut)')
  if 'grad_norm' in values:
    parts.append(f'grad {values["grad_norm"]:.2f}')
  if 'gap/logprob_mean' in values:
    parts.append(f'gap {values["gap/logprob_mean"]:.1e}')
  return ' | '.join(parts + _speed_part(values))


def sft_line(
    step: int, total: int, values: Mapping[str, float], *, name: str = 'sft'
) -> str:
  """One SFT step in one line; parts whose metric is missing are left out.

    sft  300/900 | loss 0.412 | grad 1.20 | 21,034 tok/s

  Loss in nats per token.
  """
  parts = [_counter(name, step, total)]
  if 'loss' in values:
    parts.append(f'loss {values["loss"]:.3f}')
  if 'grad_norm' in values:
    parts.append(f'grad {values["grad_norm"]:.2f}')
  return ' | '.join(parts + _speed_part(values))


def _counter(name: str, step: int, total: int) -> str:
  return f'{name} {step:{len(str(total))}d}/{total}'


def _entropy_part(values: Mapping[str, float]) -> list[str]:
  if 'entropy/seq_mean' not in values:
    return []
  part = f'entropy {values["entropy/seq_mean"]:.3f}'
  if 'aepo/mode' in values:
    part += ' POS' if values['aepo/mode'] else ' FULL'
  low, high = (values.get(f'aepo/{k}', math.nan) for k in ('low', 'high'))
  if math.isfinite(low) and math.isfinite(high):  # Not before it is measured.
    part += f' [{low:.3f}, {high:.3f}]'
  return [part]


def _speed_part(values: Mapping[str, float]) -> list[str]:
  if 'time/tokens_per_second' not in values:
    return []
  return [f'{values["time/tokens_per_second"]:,.0f} tok/s']

"""Answers on the screen while they are written.

Answers go to standard output and nothing else does, so that they can be put
into a file; progress and news go to standard error.
"""

import re
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from absl import logging

from longjax.data import turns
from longjax.parallel import multihost

_DIM, _PLAIN = '\x1b[2m', '\x1b[0m'
# A model may write what moves a terminal's cursor, sets its colours, or turns
# the direction of what follows.
_CONTROL = re.compile(
    r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]')


class Answers:
  """Shows several answers that are written at once, one after the other."""

  def __init__(
      self,
      headings: Sequence[str],
      *,
      show_thinking: bool,
      footers: Sequence[Callable[[], str]] | None = None,
      stream: TextIO | None = None,
  ):
    """Shows nothing yet.

    Args:
      headings: above each answer; '' is none.
      show_thinking: also what stands before '</think>', dimmed on a terminal.
      footers: below each answer; each is asked for when its answer ends. ''
        is none.
      stream: where to write; None is standard output.
    """
    self._stream = sys.stdout if stream is None else stream
    self._writers = [
        _Writer(self._write, '\n' * (i > 0) + heading, footer,
                show_thinking=show_thinking,
                is_terminal=self._stream.isatty())
        for i, (heading, footer) in enumerate(zip(
            headings, footers or [str] * len(headings), strict=True))]
    self._current = 0
    self._is_shown = multihost.is_primary()

  def add(
      self, number: int, text: str, *, is_last: bool = False,
      is_finished: bool = True,
  ) -> None:
    """More of an answer; it waits until those before it are complete.

    Args:
      number: of the answer.
      text: what is new.
      is_last: nothing follows.
      is_finished: with `is_last`, it was not cut.
    """
    self._writers[number].add(text, is_last=is_last, is_finished=is_finished)
    while self._current < len(self._writers):
      writer = self._writers[self._current]
      writer.show()
      if not writer.is_done:
        return
      self._current += 1

  def _write(self, text: str) -> None:
    if self._is_shown and text:
      # A terminal of another encoding shows '?' for what it lacks.
      encoding = self._stream.encoding or 'utf-8'
      self._stream.write(text.encode(encoding, 'replace').decode(encoding))
      self._stream.flush()


class _Writer:
  """One answer: thinking, then what stands after '</think>'."""

  def __init__(
      self, write: Callable[[str], None], heading: str,
      footer: Callable[[], str], *, show_thinking: bool, is_terminal: bool,
  ):
    self.is_done = False
    self._write = write
    self._heading = heading
    self._footer = footer
    self._show_thinking = show_thinking
    self._is_terminal = is_terminal
    self._waiting = ''
    self._is_thinking = True
    self._has_text = False  # Anything was added.
    self._has_begun = False  # With what stands on the screen now.
    self._is_last = False
    self._is_finished = True

  def add(self, text: str, *, is_last: bool, is_finished: bool) -> None:
    """Takes text, shows nothing."""
    self._waiting += text
    self._has_text = True
    self._is_last, self._is_finished = is_last, is_finished

  def show(self) -> None:
    """Shows what waits and is certain."""
    if not self._has_text:
      return
    if self._heading:
      self._write(f'{self._heading}\n')
      self._heading = ''
    if self._is_thinking:
      self._think()
    if not self._is_thinking:
      self._text(self._waiting)
      self._waiting = ''
    if self._is_last:
      self._end()

  def _think(self) -> None:
    thinking, tag, rest = self._waiting.partition(turns.THINK_END)
    if tag:
      self._is_thinking = False
    elif self._show_thinking:
      # The last characters may begin the tag.
      keep = 0 if self._is_last else len(turns.THINK_END) - 1
      end = max(len(thinking) - keep, 0)
      thinking, rest = thinking[:end], thinking[end:]
    else:
      return  # Whether it is thinking at all shows at its end.
    if self._show_thinking:
      self._text(thinking, is_dim=True)
      if tag and self._has_begun:
        self._write('\n')
        self._has_begun = False
    self._waiting = rest

  def _text(self, text: str, *, is_dim: bool = False) -> None:
    text = printable(text)
    if not self._has_begun:
      text = text.lstrip()
    if not text:
      return
    self._has_begun = True
    if is_dim and self._is_terminal:
      text = f'{_DIM}{text}{_PLAIN}'
    self._write(text)

  def _end(self) -> None:
    if self._is_thinking and self._is_finished:
      # No '</think>': a model that does not think.
      self._text(self._waiting)
    if self._has_begun:
      self._write('\n')
    if not self._is_finished:
      where = 'while it was thinking ' if self._is_thinking else ''
      logging.warning(
          'The answer was cut %sat the longest length; raise '
          '--ask.sampler.max_response_len.', where)
    if footer := self._footer():
      self._write(f'{footer}\n')
    self.is_done = True


def printable(text: str) -> str:
  """Text without what steers terminals."""
  return _CONTROL.sub('', text)

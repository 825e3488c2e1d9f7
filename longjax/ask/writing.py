"""Answers written for someone who reads along."""

import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from longjax import types
from longjax.ask import inquiry, saved, screen
from longjax.data import chat
from longjax.data import tokenizer as tokenizer_lib
from longjax.rollout import engine, streaming


def stream(
    session: engine.Session,
    prompts: Sequence[types.Prompt],
    keys: np.ndarray,  # u32[P, ...]
    *,
    tokenizer: tokenizer_lib.Tokenizer,
    shown: screen.Answers,
    numbers: Sequence[int],
) -> list[list[int]]:
  """Writes one answer to each prompt and shows it meanwhile.

  Args:
    session: who writes.
    prompts: what is asked.
    keys: of the samples.
    tokenizer: of the model.
    shown: where they are shown.
    numbers: the answers' numbers there.

  Returns:
    Their ids, stop tokens included.
  """
  written: list[list[int]] = [[] for _ in prompts]

  def kept(tokens: Iterable[engine.Token]) -> Iterator[engine.Token]:
    for token in tokens:
      written[token.prompt].append(token.token)
      yield token

  for piece in streaming.pieces(
      kept(session.generate(prompts, keys)), tokenizer):
    shown.add(
        numbers[piece.prompt], piece.text, is_last=piece.is_last,
        is_finished=written[piece.prompt][-1] in tokenizer.stop_ids)
  return written


def answer(
    tokens: Sequence[int], tokenizer: tokenizer_lib.Tokenizer
) -> saved.Answer:
  """The answer that ids are."""
  is_finished = bool(tokens) and tokens[-1] in tokenizer.stop_ids
  return saved.Answer(
      text=chat.response_text(tokens, tokenizer, is_finished=is_finished),
      is_finished=is_finished)


def known(
    asked: Sequence[inquiry.Asked], *, show_thinking: bool
) -> screen.Answers:
  """Shows the answers that are there, and takes the others.

  Args:
    asked: all that is asked, in order.
    show_thinking: see `screen.Answers`.
  """
  shown = screen.Answers(
      [one.heading for one in asked], show_thinking=show_thinking,
      footers=[functools.partial(_footer, one) for one in asked])
  show(shown, [one for one in asked if one.reading.answer])
  return shown


def show(shown: screen.Answers, asked: Sequence[inquiry.Asked]) -> None:
  """Shows answers that were not streamed."""
  for one in asked:
    given = one.reading.answer
    assert given is not None, one.question
    shown.add(
        one.number, given.text, is_last=True, is_finished=given.is_finished)


def _footer(asked: inquiry.Asked) -> str:
  """Where the facts of the last memory came from."""
  known_sources = asked.reading.sources.known
  if not known_sources:
    return ''
  return '\n'.join(['\nWhere the kept facts came from:', *(
      f'  {source}: {screen.printable(sentence)}'
      for sentence, source in known_sources.items())])

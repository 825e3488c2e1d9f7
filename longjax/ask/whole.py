"""Documents that fit into the window, read as a whole."""

from collections.abc import Sequence

import jax
from absl import logging

from longjax import types
from longjax.ask import files, inquiry, screen, settings, writing
from longjax.data import chat
from longjax.data import tokenizer as tokenizer_lib
from longjax.rollout import engine

# Prompts that are made at a time, over those the sampler holds.
_BATCHES_AT_ONCE = 4
# Counted line by line, a document may have more tokens than at once.
_SLACK = 1.1


def fits(
    context: inquiry.Context, questions: Sequence[str], *, room: int,
    tokenizer: tokenizer_lib.Tokenizer,
) -> bool:
  """Whether a context makes prompts of at most `room` tokens."""
  if context.size.num_tokens > room * _SLACK:
    return False
  documents = files.whole(context.paths)
  longest = max(
      len(chat.turn_tokens(question, tokenizer)) for question in questions)
  return len(chat.context_tokens(documents, tokenizer)) + longest <= room


def answer(
    model: inquiry.Model,
    config: settings.AskConfig,
    asked: Sequence[inquiry.Asked],
    *,
    shown: screen.Answers,
    window: int,
    save: inquiry.Save,
) -> None:
  """Answers questions about contexts that fit, and shows the answers.

  Args:
    model: who is asked.
    config: what is set.
    asked: the questions; those answered before are passed over.
    shown: where answers are shown.
    window: tokens of prompt and response at most.
    save: called when some are answered.
  """
  session = model.session(
      settings.whole_engine(config, window, len(asked)), config.sampler)
  size = _BATCHES_AT_ONCE * config.at_once
  for start in range(0, len(asked), size):
    numbers = [
        i for i in range(start, min(start + size, len(asked)))
        if asked[i].reading.answer is None]
    if not numbers:
      continue
    made = [_prompt(asked[i], model.tokenizer) for i in numbers]
    session.forget()
    logging.info('Answering.')
    written = writing.stream(
        session, made, engine.prompt_keys(jax.random.key(config.seed), made),
        tokenizer=model.tokenizer, shown=shown,
        numbers=[asked[i].number for i in numbers])
    for i, tokens in zip(numbers, written, strict=True):
      asked[i].reading.answer = writing.answer(tokens, model.tokenizer)
    save()


def _prompt(
    asked: inquiry.Asked, tokenizer: tokenizer_lib.Tokenizer
) -> types.Prompt:
  example = asked.example(files.whole(asked.context.paths))
  return types.Prompt(
      example=example, number=asked.seed,
      tokens=tuple(chat.render_prompt(example, tokenizer)))

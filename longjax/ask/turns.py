"""Documents of any length, read part by part with the memory agent.

All questions about a document are asked about a part before the next one is
read. After each part all readers are saved: one killed in between goes on with
the same bits, because a round depends on nothing but what was saved.
"""

import contextlib
from collections.abc import Callable, Sequence

import jax
from absl import logging

from longjax import types
from longjax.agents import memory as memory_lib
from longjax.agents import query, rounds, sampled
from longjax.ask import inquiry, parts, screen, settings, writing
from longjax.data import chat
from longjax.rollout import engine
from longjax.train import progress

# No turn of a reader; chooses the random numbers of splits.
_SPLITTING = (1 << 32) - 1


def lengths(
    agent: memory_lib.MemoryAgent, config: settings.AskConfig
) -> tuple[int, int]:
  """Tokens of a prompt at most: of the last turn, and of the others."""
  def split(question):  # By the model it is not known yet.
    return (question, question) if config.split == 'model' else query.split(
        question)

  found = [agent.longest_prompts(*split(q)) for q in config.questions]
  return max(last for last, _ in found), max(other for _, other in found)


def answer(
    model: inquiry.Model,
    config: settings.AskConfig,
    asked: Sequence[inquiry.Asked],
    *,
    agent: memory_lib.MemoryAgent,
    shown: screen.Answers,
    save: inquiry.Save,
) -> None:
  """Answers questions about contexts of any length, and shows the answers.

  Args:
    model: who is asked.
    config: what is set.
    asked: the questions; those answered before are passed over.
    agent: writes prompts.
    shown: where answers are shown.
    save: called after every part.
  """
  reading = _Reading(model, agent, config, asked, shown)
  done, total = reading.num_read()
  with contextlib.ExitStack() as stack:
    bar = None
    if done < total:
      bar = stack.enter_context(
          progress.Progress(total, 'reading', unit='part', start=done))
    reading.before_answers = stack.close
    for made in rounds.read(
        agent, reading.queries, reading.generate, reading.readers):
      reading.note(made)
      save()
      if bar is not None and config.show_memory:
        reading.show_memory(bar, made)
      before, (done, _) = done, reading.num_read()
      if bar is not None and done > before:
        bar.advance(done - before)


class _Reading:
  """What is asked in a round, and what becomes of it."""

  def __init__(
      self, model: inquiry.Model, agent: memory_lib.MemoryAgent,
      config: settings.AskConfig, asked: Sequence[inquiry.Asked],
      shown: screen.Answers,
  ):
    self.before_answers: Callable[[], None] = lambda: None
    self._model = model
    self._agent = agent
    self._config = config
    self._asked = asked
    self._shown = shown
    self._unshown: list[inquiry.Asked] = []  # Answered while others read on.
    self._documents = {
        one.context: parts.Parts(
            agent, one.context.paths, num_parts=one.context.size.num_parts)
        for one in asked}
    self.readers = [
        one.reading.reader(i) for i, one in enumerate(asked)
        if one.reading.answer is None]
    self._key = jax.random.key(config.seed)
    shapes = settings.memory_engine(
        config, lengths(agent, config),
        part_len=agent.config.part_len, num_prompts=len(asked))
    self._session = model.session(shapes, config.sampler)
    self._write = sampled.generate(
        self._session, self._key,
        examples=[one.example() for one in asked],
        numbers=[one.seed for one in asked])
    self.queries = [
        rounds.Query(
            question=question, instruction=instruction,
            num_parts=one.context.size.num_parts,
            parts=self._documents[one.context])
        for one, (question, instruction) in zip(
            asked, self._split(max(shapes.prompt_buckets)), strict=True)]

  def _split(self, max_len: int) -> list[tuple[str, str]]:
    """What each question asks, and in what form to answer."""
    found = [query.split(one.question) for one in self._asked]
    if self._config.split == 'rules' or not self.readers:
      return found
    tokenizer = self._model.tokenizer
    prompts = [
        rounds.Prompt(
            query=i, sample=0, turn=_SPLITTING,
            tokens=tuple(query.model_prompt(one.question, tokenizer)))
        for i, one in enumerate(self._asked)]
    # What the window cannot hold is left to the rules.
    prompts = [p for p in prompts if len(p.tokens) <= max_len]
    for prompt, response in zip(
        prompts, self._write(prompts) if prompts else (), strict=True):
      text = chat.response_text(
          response.tokens, tokenizer, is_finished=response.is_finished)
      found[prompt.query] = query.read_split(
          text, self._asked[prompt.query].question)
    return found

  def num_read(self) -> tuple[int, int]:
    """Parts read, and all parts."""
    turn_of = {one.context: one.reading.turn for one in self._asked}
    return (
        sum(min(turn, c.size.num_parts) for c, turn in turn_of.items()),
        sum(context.size.num_parts for context in turn_of))

  def generate(
      self, prompts: Sequence[rounds.Prompt]
  ) -> Sequence[rounds.Response]:
    """Writes a round; the last one, only answers, is shown meanwhile."""
    self._session.forget()
    if any(p.turn < self.queries[p.query].num_parts for p in prompts):
      return self._write(prompts)
    self.before_answers()
    writing.show(self._shown, self._unshown)
    logging.info('Answering.')
    given = [
        types.Prompt(
            example=self._asked[p.query].example(), tokens=p.tokens,
            number=self._asked[p.query].seed) for p in prompts]
    keys = sampled.turn_keys(self._key, prompts)
    stop_ids = self._model.tokenizer.stop_ids
    return [
        rounds.Response(tokens=tokens, is_finished=tokens[-1] in stop_ids)
        for tokens in writing.stream(
            self._session, given, engine.prompt_keys(keys, given),
            tokenizer=self._model.tokenizer,
            shown=self._shown,
            numbers=[self._asked[p.query].number for p in prompts])]

  def note(self, turns: Sequence[rounds.Turn]) -> None:
    """Keeps what a round left."""
    for turn in turns:
      one = self._asked[turn.prompt.query]
      reading = one.reading
      reading.turn, reading.notes = turn.prompt.turn + 1, turn.notes
      if turn.is_last:
        reading.answer = writing.answer(
            turn.response.tokens, self._model.tokenizer)
        self._unshown.append(one)
        continue
      reading.sources.update(
          self._agent.text(turn.notes.memory), reading.turn,
          self._documents[one.context].lines)
      if not turn.response.is_finished:
        logging.log_every_n_seconds(
            logging.WARNING,
            'A memory was cut at --ask.sampler.max_response_len=%d tokens.',
            60, self._config.sampler.max_response_len)

  def show_memory(
      self, bar: progress.Progress, turns: Sequence[rounds.Turn]
  ) -> None:
    """Prints the memories above the bar."""
    for turn in turns:
      if turn.is_last:
        continue
      one = self._asked[turn.prompt.query]
      about = f' | {one.heading}' if one.heading else ''
      text = screen.printable(self._agent.text(turn.notes.memory))
      text = text.replace('\n', '\n  ')
      bar.log_step(
          f'memory after part {turn.prompt.turn + 1}/'
          f'{one.context.size.num_parts}{about}: {text}')

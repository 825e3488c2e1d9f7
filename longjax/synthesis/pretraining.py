"""Text that teaches a small model to look things up: induction.

A model of this size does not learn to copy from its context by fine-tuning on
tasks; it must have seen many contexts in which the next token is determined by
an earlier one. Two kinds of group, both endless and random access:

  streams  random ordinary tokens. Half repeat a span to the end; half list
           (key, relation, value) records and ask for them again in another
           order.
  pages    documents of a few of the recipe's examples, shuffled together;
           then sentences of theirs begun anew, to be finished, questions
           with the reasoning that leads to the answer, but not the answer
           as a response states it, and small sums.

Only what the context determines is trained on. Many questions share one
context, which is what makes this cheap: reading takes most of the tokens.
"""

import dataclasses
import random
from collections.abc import Iterable, Sequence

import grain
import numpy as np

from longjax import rows, types
from longjax.data import chat
from longjax.data import tokenizer as tokenizer_lib
from longjax.synthesis import pipeline, questions

# Far more than any run reads; Grain asks for a length.
_MANY = 1 << 40
# Tokens of context for each example, at least.
_MIN_SHARE = 96
# Branches of one kind about one context.
_MOST_OF_KIND = 6
_SENTENCE_STARTS = ('', ' ', '\n')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
  """The mixture.

  Attributes:
    stream_fraction: share of streams; the rest are pages.
    min_len: tokens of the shortest group; the longest fills a row. Lengths
      are log-uniform.
  """

  stream_fraction: float = 0.5
  min_len: int = 32

  def __post_init__(self):
    if not 0.0 <= self.stream_fraction <= 1.0:
      raise types.UserError(
          f'text.stream_fraction={self.stream_fraction} must be in [0, 1].')
    if self.min_len < 16:
      raise types.UserError(
          f'text.min_len={self.min_len} must be at least 16.')


def groups(
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    config: PretrainingConfig,
    row_len: int,
    seed: int,
) -> grain.MapDataset:
  """An endless random-access stream of `rows.Group` of at most `row_len`."""
  ordinary = tokenizer.ordinary_ids()

  def make(index: int) -> rows.Group:
    rng = np.random.default_rng((seed, index))
    most = round(config.min_len * (row_len / config.min_len) ** rng.random())
    if rng.random() < config.stream_fraction:
      half = rng.random() < 0.5
      group = _repeat(rng, ordinary, most) if half else _records(
          rng, ordinary, most)
    else:
      group = _cut(_pages(rng, tokenizer, most), most)
      if group.num_tokens > row_len:  # The smallest pages may be longer.
        group = _records(rng, ordinary, most)
    return _cut(group, most)

  return grain.MapDataset.range(_MANY).map(make)


def _cut(group: rows.Group, most: int) -> rows.Group:
  """Drops branches, the last ones first, until the group fits."""
  branches = list(group.branches)
  while len(branches) > 1 and dataclasses.replace(
      group, branches=branches).num_tokens > most:
    branches.pop()
  return dataclasses.replace(group, branches=branches)


def _branch(cue: Iterable[int], response: Iterable[int]) -> rows.Branch:
  return rows.Branch(
      extra_prompt=[int(t) for t in cue], response=[int(t) for t in response],
      trajectory=0)


def _repeat(
    rng: np.random.Generator, ordinary: np.ndarray, most: int
) -> rows.Group:
  """A span, repeated until the group is full."""
  span = rng.choice(ordinary, rng.integers(4, most // 2))
  copies = np.resize(span, most)
  return rows.Group(prompt=[*map(int, span), int(span[0])], branches=[
      _branch([], copies[len(span) + 1:])])


def _records(
    rng: np.random.Generator, ordinary: np.ndarray, most: int
) -> rows.Group:
  """Records (key, relation, value, stop), then asked for in another order."""
  # A record takes up to 5 tokens where it is stated and 5 where it is asked.
  num_records = max(2, int(rng.integers(most // 20, most // 9 + 1)))
  few = max(2, num_records // 2)
  keys, relations = rng.choice(ordinary, (2, few))
  stop = rng.choice(ordinary)
  pairs = [
      (k, r) for k in dict.fromkeys(keys) for r in dict.fromkeys(relations)]
  pairs = [pairs[i] for i in rng.permutation(len(pairs))[:num_records]]
  values = [rng.choice(ordinary, rng.integers(1, 3)) for _ in pairs]
  prompt: list[int] = []
  for (key, relation), value in zip(pairs, values, strict=True):
    prompt += [int(key), int(relation), *map(int, value), int(stop)]
  return rows.Group(prompt=prompt, branches=[
      _branch(pairs[i], [*values[i], stop])
      for i in rng.permutation(len(pairs))])


def _pages(
    rng: np.random.Generator, tokenizer: tokenizer_lib.Tokenizer, most: int
) -> rows.Group:
  """Documents, then what they determine, in any order, and sums."""
  documents = _documents(
      rng, tokenizer, budget=round(most * rng.uniform(0.25, 0.6)))
  chooser = random.Random(int(rng.integers(1 << 62)))
  branches = [
      _asked(rng, tokenizer, *asked)
      for asked in questions.ask(documents, chooser, most=_MOST_OF_KIND)]
  begun = [
      cloze for sentence in questions.sentences(documents)
      if (cloze := _cloze(rng, documents, sentence))]
  begun = chooser.sample(begun, min(len(begun), _MOST_OF_KIND))
  sums = [_sum(rng) for _ in range(_MOST_OF_KIND // 2)]
  branches += [_text_branch(tokenizer, *text) for text in begun + sums]
  return rows.Group(
      prompt=chat.context_tokens(documents, tokenizer),
      branches=[branches[i] for i in rng.permutation(len(branches))])


def _text_branch(
    tokenizer: tokenizer_lib.Tokenizer, cue: str, rest: str
) -> rows.Branch:
  return _branch(tokenizer.encode(cue), tokenizer.encode(rest))


def _asked(
    rng: np.random.Generator, tokenizer: tokenizer_lib.Tokenizer,
    question: str, reasoning: str,
) -> rows.Branch:
  """A question as plain text, or as a turn that thinks and says no more."""
  if rng.random() < 0.5:
    return _text_branch(tokenizer, f'\n{question}', f' {reasoning}\n')
  return _branch(
      chat.turn_tokens(question, tokenizer),
      chat.reasoning_tokens(reasoning, tokenizer))


def _documents(
    rng: np.random.Generator, tokenizer: tokenizer_lib.Tokenizer, *,
    budget: int,
) -> list[types.Document]:
  """Documents of several examples, shuffled together.

  Args:
    rng: of this group.
    tokenizer: measures lengths.
    budget: tokens, exceeded only by a single example that has no shorter form.

  Returns:
    The documents, those of one example in their order.
  """
  share = budget // int(rng.integers(1, max(1, budget // _MIN_SHARE) + 1))
  drawn: list[types.TaskExample] = []
  while not drawn or budget >= share:
    drawn.append(_draw(rng, tokenizer, share))
    budget -= len(chat.render_prompt(drawn[-1], tokenizer))
  owners = np.repeat(
      np.arange(len(drawn)), [len(e.documents) for e in drawn])
  unread = [iter(example.documents) for example in drawn]
  return [next(unread[i]) for i in rng.permutation(owners)]


def _draw(
    rng: np.random.Generator, tokenizer: tokenizer_lib.Tokenizer, length: int
) -> types.TaskExample:
  """An example of a random task with a context of about `length` tokens."""
  task = pipeline.TASKS[rng.integers(len(pipeline.TASKS))]
  split = pipeline.SplitConfig(
      name='pretrain', names='train', min_tokens=length, max_tokens=length)
  while True:
    example = pipeline.draw(
        task, 'pretrain', random.Random(int(rng.integers(1 << 62))),
        split=split, config=pipeline.SynthConfig(),
        count_tokens=lambda text: len(tokenizer.encode(text)))
    if example is not None:
      return example
    # Too short for this task's smallest context.
    split = dataclasses.replace(split, max_tokens=split.max_tokens + 16)


def _cloze(
    rng: np.random.Generator, documents: Sequence[types.Document],
    sentence: str,
) -> tuple[str, str] | None:
  """The shortest beginning that occurs once in the context, and the rest."""
  context = '\n'.join(document.text for document in documents)
  words = sentence.split(' ')
  for n in range(1, len(words)):
    cue = ' '.join(words[:n])
    if context.count(cue + ' ') == 1:
      start = _SENTENCE_STARTS[rng.integers(len(_SENTENCE_STARTS))]
      return start + cue, ' ' + ' '.join(words[n:])
  return None


def _sum(rng: np.random.Generator) -> tuple[str, str]:
  """An addition of two or three digits, or a difference, and its result."""
  terms = rng.integers(1, 10, rng.integers(2, 4)).tolist()
  start = _SENTENCE_STARTS[rng.integers(len(_SENTENCE_STARTS))]
  if len(terms) == 2 and terms[0] > terms[1] and rng.random() < 0.5:
    return f'{start}{terms[0]} - {terms[1]} =', f' {terms[0] - terms[1]}.'
  return f'{start}{" + ".join(map(str, terms))} =', f' {sum(terms)}.'

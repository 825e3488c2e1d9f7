"""Text that teaches a small model to look things up: induction.

A model of this size does not learn to copy from its context by fine-tuning on
tasks; it must have seen many contexts in which the next token is determined by
an earlier one. Two kinds of group, both endless and random access:

  streams  random ordinary tokens. Half repeat a span to the end; half list
           (key, relation, value) records and ask for them again in another
           order.
  pages    pages of the synthetic worlds, key links and chat turns, after which
           sentences of the context are begun anew and must be finished, or are
           asked for by a question about that one fact; and small sums.

Only what the context determines is trained on.
"""

import dataclasses
import random
import re
from collections.abc import Iterable, Iterator, Sequence

import grain
import numpy as np

from longjax import rows, types
from longjax.data import chat
from longjax.data import tokenizer as tokenizer_lib
from longjax.synthesis import pipeline
from longjax.synthesis import world as world_lib

# Far more than any run reads; Grain asks for a length.
_MANY = 1 << 40
# Tasks whose contexts differ in form.
_CONTEXTS = ('multihop', 'dialogue', 'numeric', 'keychain')
_SENTENCE_STARTS = ('', ' ', '\n')
# What pages say, as `world` and its neighbours write it.
_EXCHANGE = re.compile(r'User: (.*)\nBot: (.*)')
_FACT = re.compile(r'The (\w+) of (.+) is \w+\.')
_NUMBER = re.compile(r'(\w+) holds \d+ (\w+)\.')
_KEY = re.compile(r'Key (\w+) ')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
  """The mixture.

  Attributes:
    stream_fraction: share of streams; the rest are pages.
    min_len: tokens of the shortest group.
    max_len: tokens of the longest; None means a whole row. Lengths are
      log-uniform.
  """

  stream_fraction: float = 0.5
  min_len: int = 32
  max_len: int | None = None

  def __post_init__(self):
    if not 0.0 <= self.stream_fraction <= 1.0:
      raise types.UserError(
          f'text.stream_fraction={self.stream_fraction} must be in [0, 1].')
    if self.min_len < 16 or (
        self.max_len is not None and self.max_len < self.min_len):
      raise types.UserError(
          f'text needs 16 <= min_len <= max_len, got {self.min_len} and '
          f'{self.max_len}.')


def groups(
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    config: PretrainingConfig,
    row_len: int,
    seed: int,
) -> grain.MapDataset:
  """An endless random-access stream of `rows.Group` of at most `row_len`."""
  ordinary = tokenizer.ordinary_ids()
  max_len = min(config.max_len or row_len, row_len)

  def make(index: int) -> rows.Group:
    rng = np.random.default_rng((seed, index))
    most = round(config.min_len * (max_len / config.min_len) ** rng.random())
    if rng.random() < config.stream_fraction:
      half = rng.random() < 0.5
      group = _repeat(rng, ordinary, most) if half else _records(
          rng, ordinary, most)
    else:
      group = _cut(_pages(rng, tokenizer, most), most)
      if group.num_tokens > max_len:  # The smallest pages may be longer.
        group = _records(rng, ordinary, most)
    return _cut(group, most)

  return grain.MapDataset.range(_MANY).map(make)


def _cut(group: rows.Group, most: int) -> rows.Group:
  """Drops branches, at random places already, until the group fits."""
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
  """Documents, then sentences of theirs to be finished or found, and sums."""
  documents = _documents(rng, tokenizer, most)
  branches = []
  for sentence in _sentences(documents):
    cloze = _cloze(rng, documents, sentence)
    if cloze:
      branches.append(_text_branch(tokenizer, *cloze))
  for question, sentence in _questions(documents):
    branches.append(_asked(rng, tokenizer, question, sentence))
  branches += [
      _text_branch(tokenizer, *_sum(rng)) for _ in range(len(branches) // 10)]
  return rows.Group(
      prompt=chat.context_tokens(documents, tokenizer),
      branches=[branches[i] for i in rng.permutation(len(branches))])


def _text_branch(
    tokenizer: tokenizer_lib.Tokenizer, cue: str, rest: str
) -> rows.Branch:
  return _branch(tokenizer.encode(cue), tokenizer.encode(rest))


def _questions(
    documents: Sequence[types.Document],
) -> Iterator[tuple[str, str]]:
  """(question about one fact, the sentence that answers it)."""
  requests: dict[str, list[str]] = {}
  for document in documents:
    for request, reply in _EXCHANGE.findall(document.text):
      requests.setdefault(request, []).append(reply)
  for request, replies in requests.items():
    if len(replies) == 1:
      yield f'Repeat the reply to: {request}', replies[0]
  for sentence in _sentences(documents):
    if match := _FACT.fullmatch(sentence):
      relation = world_lib.RELATIONS.get(match[1])
      word = relation.question_word if relation else 'What'
      yield f'{word} is the {match[1]} of {match[2]}?', sentence
    elif match := _NUMBER.fullmatch(sentence):
      yield f'How many {match[2]} does {match[1]} hold?', sentence
    elif match := _KEY.match(sentence):
      yield f'Follow key {match[1]}.', sentence


def _asked(
    rng: np.random.Generator, tokenizer: tokenizer_lib.Tokenizer,
    question: str, sentence: str,
) -> rows.Branch:
  """A question as plain text or as a turn of the chat template."""
  if rng.random() < 0.5:
    cue = chat.turn_tokens(question, tokenizer)
    return _branch(cue, tokenizer.encode(sentence))
  return _text_branch(tokenizer, f'\n{question}', f' {sentence}')


def _documents(
    rng: np.random.Generator, tokenizer: tokenizer_lib.Tokenizer, most: int
) -> tuple[types.Document, ...]:
  """The context of a random task; about half of `most` tokens."""
  task = _CONTEXTS[rng.integers(len(_CONTEXTS))]
  length = max(24, most // 2)
  split = pipeline.SplitConfig(
      name='pretrain', names='train', min_tokens=length, max_tokens=length)
  while True:
    example = pipeline.draw(
        task, 'pretrain', random.Random(int(rng.integers(1 << 62))),
        split=split, config=pipeline.SynthConfig(),
        count_tokens=lambda text: len(tokenizer.encode(text)))
    if example is not None:
      return example.documents
    # Too short for this task's smallest context.
    split = dataclasses.replace(split, max_tokens=split.max_tokens + 16)


def _sentences(documents: Sequence[types.Document]) -> list[str]:
  """Everything that ends in a full stop, question marks kept inside."""
  return [
      stripped + '.' for document in documents
      for line in document.text.split('\n') for part in line.split('. ')
      if (stripped := part.strip().rstrip('.'))]


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

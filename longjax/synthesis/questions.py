"""What a context can be asked: questions of every task and their reasoning.

A generator makes one question and the pages it needs. Here it is the other
way round: the finished documents are read, and whatever they determine is
asked for. Many questions then share one context, for pretraining.

Sentences are those of the first template of `world` and of the other
generators; what has two values in the context is not asked for.
"""

import itertools
import random
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from longjax import types
from longjax.synthesis import dialogue, multiple_choice, tables
from longjax.synthesis import world as world_lib

_Key = TypeVar('_Key', bound=Hashable)
# (question, reasoning that ends in its answer)
Asked = tuple[str, str]
# (subject, relation) -> (value, the sentence that states it)
Facts = Mapping[tuple[str, str], tuple[str, str]]

_SENTENCE = re.compile(r'[^.?]+[.?]')
_EXCHANGE = re.compile(r'User: (.*)\nBot: (.*)')
_FACT = re.compile(r'The (?P<r>\w+) of (?P<s>[\w ]+) is (?P<v>\w+)\.')
_NUMBER = re.compile(r'(?P<s>\w+) holds (?P<v>\d+) (?P<r>\w+)\.')
_LINK = re.compile(r'Key (\w+) lands on key (\w+)\.')
_ASKS = re.compile(r'Key (\w+) asks: (.*\?)')
_CODE_SUBJECT = re.compile(r'(\w+) for (\w+)')


def sentences(documents: Iterable[types.Document]) -> list[str]:
  """Everything that ends in a full stop or a question mark."""
  return [
      sentence.strip() for document in documents
      for line in document.text.split('\n')
      for sentence in _SENTENCE.findall(line)]


def ask(
    documents: Sequence[types.Document], rng: random.Random, *, most: int
) -> Iterator[Asked]:
  """Questions that the documents answer.

  Args:
    documents: the context.
    rng: chooses.
    most: questions of each kind, at most.

  Yields:
    Questions and the reasoning of a demonstration, kind after kind.
  """
  said = sentences(documents)
  facts = _read(said)
  kinds = (
      _lookups(facts), _walks(facts), _codes(facts), _choices(facts, rng),
      _totals(facts, rng), _counts(facts, rng), _replies(documents),
      *_keys(said, facts))
  for kind in kinds:
    asked = list(kind)
    yield from rng.sample(asked, min(most, len(asked)))


def _single_valued(
    stated: Iterable[tuple[_Key, str, str]],
) -> dict[_Key, tuple[str, str]]:
  """(key, value, sentence) by key, without those of two values."""
  values: dict[_Key, dict[str, str]] = {}
  for key, value, sentence in stated:
    values.setdefault(key, {})[value] = sentence
  return {key: next(iter(said.items()))
          for key, said in values.items() if len(said) == 1}


def _read(said: Iterable[str]) -> dict[tuple[str, str], tuple[str, str]]:
  """The facts with one value."""
  return _single_valued(
      ((match['s'], match['r']), match['v'], sentence) for sentence in said
      if (match := _FACT.fullmatch(sentence) or _NUMBER.fullmatch(sentence)))


def _word(relation: str) -> str:
  known = world_lib.RELATIONS.get(relation)
  return known.question_word if known else 'What'


def _lookups(facts: Facts) -> Iterator[Asked]:
  for (subject, relation), (_, sentence) in facts.items():
    if relation in world_lib.ITEMS:
      yield f'How many {relation} does {subject} hold?', sentence
    else:
      yield f'{_word(relation)} is the {relation} of {subject}?', sentence


def _walks(facts: Facts) -> Iterator[Asked]:
  """Two facts, the first one's value being the second one's subject."""
  by_subject: dict[str, list[tuple[str, str]]] = {}
  for (subject, relation), (_, sentence) in facts.items():
    if relation in world_lib.RELATIONS:
      by_subject.setdefault(subject, []).append((relation, sentence))
  for (subject, first), (value, sentence) in facts.items():
    for second, continued in by_subject.get(value, ()):
      yield (f'{_word(second)} is the {second} of the {first} of {subject}?',
             f'{sentence} {continued}')


def _codes(facts: Facts) -> Iterator[Asked]:
  """The code of a guild for the badge of somebody."""
  for (keeper, relation), (_, sentence) in facts.items():
    subject = _CODE_SUBJECT.fullmatch(keeper)
    if not subject or relation != 'code':
      continue
    for (person, worn), (color, stated) in facts.items():
      if worn == 'badge' and color == subject[2]:
        yield (f'What is the code of {subject[1]} for the badge of {person}?',
               f'{stated} {sentence}')


def _choices(facts: Facts, rng: random.Random) -> Iterator[Asked]:
  """Four values of one relation, one of them right."""
  values: dict[str, set[str]] = {}
  for (_, relation), (value, _) in facts.items():
    values.setdefault(relation, set()).add(value)
  for (subject, relation), (value, sentence) in facts.items():
    known = world_lib.RELATIONS.get(relation)
    others = sorted(values[relation] - {value})
    if not known or known.words or len(others) < 3:
      continue
    options = [value, *rng.sample(others, 3)]
    rng.shuffle(options)
    marked = list(zip(multiple_choice.LETTERS, options, strict=True))
    listed = ', '.join(f'({mark}) {option}' for mark, option in marked)
    letter = multiple_choice.LETTERS[options.index(value)]
    yield (f'{_word(relation)} is the {relation} of {subject}? {listed}.',
           f'{sentence} {value} is ({letter}).')


def _two_or_three(
    held: Sequence[world_lib.Fact], rng: random.Random
) -> Iterator[list[world_lib.Fact]]:
  """Every ordered pair, some of them with a third one."""
  for a, b in itertools.permutations(held, 2):
    third = rng.choice(held)
    yield [a, b] if third in (a, b) else [a, b, third]


def _aggregated(
    operation: str, chosen: Sequence[world_lib.Fact], facts: Facts,
    answer: int, value: str = '',
) -> Asked:
  """In the words of `tables`."""
  relation = chosen[0].relation
  question, _ = tables.query(
      operation, [fact.subject for fact in chosen], relation, value)
  quotes = [facts[fact.subject, relation][1] for fact in chosen]
  return question, tables.derivation(
      operation, chosen, quotes, value, answer)


def _held(facts: Facts, wanted: str) -> list[world_lib.Fact]:
  return [
      world_lib.Fact(subject=subject, relation=relation, value=value)
      for (subject, relation), (value, _) in facts.items()
      if relation == wanted]


def _totals(facts: Facts, rng: random.Random) -> Iterator[Asked]:
  """Sums over two or three people, and differences of two."""
  for item in world_lib.ITEMS:
    for chosen in _two_or_three(_held(facts, item), rng):
      numbers = [int(fact.value) for fact in chosen]
      difference = numbers[0] - numbers[1]
      if difference > 0:
        yield _aggregated('difference', chosen[:2], facts, difference)
      yield _aggregated('total', chosen, facts, sum(numbers))


def _counts(facts: Facts, rng: random.Random) -> Iterator[Asked]:
  """How many of two or three people wear one colour."""
  for chosen in _two_or_three(_held(facts, 'badge'), rng):
    color = rng.choice(chosen).value
    answer = sum(fact.value == color for fact in chosen)
    yield _aggregated('count', chosen, facts, answer, color)


def _replies(documents: Iterable[types.Document]) -> Iterator[Asked]:
  """The k-th reply to a request; all those before it are repeated too."""
  replies: dict[str, list[str]] = {}
  for document in documents:
    for request, reply in _EXCHANGE.findall(document.text):
      replies.setdefault(request, []).append(reply)
  for request, given in replies.items():
    told = [
        f'{ordinal.capitalize()}: {reply}'
        for ordinal, reply in zip(dialogue.ORDINALS, given, strict=False)]
    for k, ordinal in enumerate(dialogue.ORDINALS[:len(given)]):
      yield (f'Repeat the {ordinal} reply to: {request}',
             ' '.join(told[:k + 1]))


def _keys(
    said: Sequence[str], facts: Facts
) -> tuple[list[Asked], list[Asked]]:
  """One link of a key chain; and a whole chain with its question's answer."""
  targets = _single_valued(
      (match[1], match[2], sentence)
      for pattern in (_LINK, _ASKS) for sentence in said
      if (match := pattern.fullmatch(sentence)))
  answers = dict(_lookups(facts))
  single = [(f'Follow key {key}.', sentence)
            for key, (_, sentence) in targets.items()]
  chains = []
  for first, (target, _) in targets.items():
    if target.endswith('?'):
      continue
    told, key, ahead = [], first, dict(targets)
    while key in ahead:  # Each link once: merged contexts may hold cycles.
      key, sentence = ahead.pop(key)
      told.append(sentence)
    if key in answers:  # Where it ends: a question.
      chains.append((
          f'Follow key {first}. What is the answer to its question?',
          ' '.join([*told, answers[key]])))
  return single, chains

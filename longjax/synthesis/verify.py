"""An oracle that reads the rendered text, and the checks made with it.

The reader knows nothing of how an example was generated: it parses sentences
and questions with its own patterns, answers from what it read, and so finds
out whether a question is answerable from its evidence, has one answer in the
whole context and none once a document with evidence is taken away (the
grounding and robustness checks of QwenLong-L1.5, arXiv:2512.12967, made
exact).
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from longjax import types

_NAME = r'[A-Z][a-z]+'
_VALUE = r'[A-Za-z]+'
_FACT_PATTERNS = tuple(re.compile(pattern) for pattern in (
    rf'The (?P<r>[a-z]+) of (?P<s>{_NAME}) is (?P<v>{_VALUE})\.',
    rf'(?P<v>{_VALUE}) is the (?P<r>[a-z]+) of (?P<s>{_NAME})\.',
    rf'(?P<s>{_NAME}) has (?P<v>{_VALUE}) as (?P<r>[a-z]+)\.',
    rf'As (?P<r>[a-z]+), (?P<s>{_NAME}) has (?P<v>{_VALUE})\.',
    rf'(?P<s>{_NAME}) holds (?P<v>\d+) (?P<r>[a-z]+)\.',
    rf'(?P<v>\d+) (?P<r>[a-z]+) are held by (?P<s>{_NAME})\.',
    rf'In the house of (?P<s>{_NAME}) are (?P<v>\d+) (?P<r>[a-z]+)\.',
    rf'There are (?P<v>\d+) (?P<r>[a-z]+) with (?P<s>{_NAME})\.',
    rf'The (?P<r>code) of (?P<s>{_NAME} for [a-z]+) is (?P<v>{_VALUE})\.',
))
_LINK = re.compile(r'Key (\w+) lands on key (\w+)\.')
_ASKS = re.compile(r'Key (\w+) asks: ([^?]*\?)')
_EXCHANGE = re.compile(r'^User: (.*)\nBot: (.*)$', re.MULTILINE)
_ORDINALS = {'first': 0, 'second': 1, 'third': 2, 'fourth': 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """What a text says.

  Attributes:
    values: (subject, relation) to every value stated.
    links: key to what it lands on: keys and questions.
    replies: request to its replies, in order.
  """

  values: dict[tuple[str, str], set[str]]
  links: dict[str, set[str]]
  replies: dict[str, list[str]]


def read(texts: Iterable[str]) -> Reading:
  """Parses every sentence it understands; order matters for replies only."""
  values: dict[tuple[str, str], set[str]] = {}
  links: dict[str, set[str]] = {}
  replies: dict[str, list[str]] = {}
  text = '\n'.join(texts)
  for pattern in _FACT_PATTERNS:
    for match in pattern.finditer(text):
      values.setdefault((match['s'], match['r']), set()).add(match['v'])
  for pattern in (_LINK, _ASKS):
    for key, target in pattern.findall(text):
      links.setdefault(key, set()).add(target)
  for request, reply in _EXCHANGE.findall(text):
    replies.setdefault(request, []).append(reply)
  return Reading(values=values, links=links, replies=replies)


def _follow(reading: Reading, start: str, relations: Sequence[str]) -> set[str]:
  """Follows relations, the last one given first."""
  reached = {start}
  for relation in reversed(relations):
    reached = set().union(
        *(reading.values.get((entity, relation), ()) for entity in reached))
  return reached


def _walk(reading: Reading, match: re.Match[str]) -> set[str]:
  relations = re.findall(r'the ([a-z]+) of', match[1])
  return _follow(reading, match[2], relations)


def _code(reading: Reading, match: re.Match[str]) -> set[str]:
  guild, asked = match[1], match[2]
  nested = re.fullmatch(rf'the ([a-z]+) of ({_NAME})', asked)
  keys = _follow(reading, nested[2], [nested[1]]) if nested else {asked}
  return set().union(
      *(reading.values.get((f'{guild} for {key}', 'code'), ()) for key in keys))


def _column(
    reading: Reading, names: str, relation: str
) -> list[str] | None:
  """One value for each name in "A, B and C"; None unless all are known."""
  values = [reading.values.get((name, relation), set())
            for name in re.findall(_NAME, names)]
  if any(len(value) != 1 for value in values):
    return None
  return [next(iter(value)) for value in values]


def _total(reading: Reading, match: re.Match[str]) -> set[str]:
  values = _column(reading, match[2], match[1])
  return {str(sum(map(int, values)))} if values else set()


def _difference(reading: Reading, match: re.Match[str]) -> set[str]:
  values = _column(reading, f'{match[2]} {match[3]}', match[1])
  return {str(int(values[0]) - int(values[1]))} if values else set()


def _count(reading: Reading, match: re.Match[str]) -> set[str]:
  values = _column(reading, match[1], match[3])
  return {str(values.count(match[2]))} if values else set()


def _most(reading: Reading, match: re.Match[str]) -> set[str]:
  values = _column(reading, match[2], match[1])
  return {str(max(map(int, values)))} if values else set()


def _chained(reading: Reading, match: re.Match[str]) -> set[str]:
  """Follows keys until they ask something."""
  keys = {match[1]}
  questions: set[str] = set()
  seen: set[str] = set()
  while keys - seen:
    seen |= keys
    targets = set().union(*(reading.links.get(key, ()) for key in keys))
    questions |= {target for target in targets if target.endswith('?')}
    keys = targets - questions
  return set().union(*(solve(reading, question) for question in questions))


def _choice(reading: Reading, match: re.Match[str]) -> set[str]:
  """The letters of the options that the question's answers agree with."""
  answers = solve(reading, match[1])
  options = re.findall(rf'\(([A-Z])\) ({_VALUE})', match[2])
  return {letter for letter, option in options if option in answers}


def _recall(reading: Reading, match: re.Match[str]) -> set[str]:
  replies = reading.replies.get(match[2], [])
  index = _ORDINALS[match[1]]
  return set(replies[index:index + 1])


_QUESTIONS = tuple((re.compile(pattern, re.DOTALL), solver)
                   for pattern, solver in (
    (r'(Wh[^?]*\?) (\(A\).*)', _choice),
    (rf'What is the code of ({_NAME}) for (.*)\?', _code),
    (rf'(?:Who|What) is ((?:the [a-z]+ of )+)({_NAME})\?', _walk),
    (r'How many ([a-z]+) do (.*) hold in total\?', _total),
    (rf'How many more ([a-z]+) does ({_NAME}) hold than ({_NAME})\?',
     _difference),
    (r'How many of (.*) have a ([a-z]+) ([a-z]+)\?', _count),
    (r'What is the most ([a-z]+) held by one of (.*)\?', _most),
    (r'Follow key (\w+)\. What is the answer to its question\?', _chained),
    (r'Repeat the (\w+) reply to: (.*)', _recall),
))


def solve(reading: Reading, question: str) -> set[str]:
  """Every answer the text supports; empty if it supports none."""
  for pattern, solver in _QUESTIONS:
    if match := pattern.fullmatch(question):
      return solver(reading, match)
  return set()


def answer(
    example: types.TaskExample, texts: Iterable[str]
) -> set[str]:
  """Answers to an example's question from `texts` instead of its context."""
  answers = solve(read(texts), example.question)
  if prefix := re.match(r'Begin with (\w+)\.', example.instruction):
    answers = {f'{prefix[1]} {reply}' for reply in answers}
  return answers


def unstated_options(
    example: types.TaskExample, texts: Iterable[str]
) -> list[str]:
  """Options of a multiple choice question that the context never states."""
  asked, _, listed = example.question.partition('? ')
  relations = re.findall(r'the ([a-z]+) of', asked)
  stated = set().union(
      *(values for (_, name), values in read(texts).values.items()
        if name == relations[0]))
  options = re.findall(rf'\([A-Z]\) ({_VALUE})', listed)
  return [option for option in options if option not in stated]


def problems(example: types.TaskExample) -> list[str]:
  """What is wrong with an example; empty if it is sound."""
  found = []
  gold = {example.answers[0]}
  quotes = []
  for span in example.evidence:
    text = example.documents[span.document].text
    if not 0 <= span.start < span.end <= len(text):
      found.append(f'span {span} lies outside its document')
    quotes.append(text[span.start:span.end])
  # A reply is quoted without the request that it answers.
  said = [quote.split('\nBot: ')[-1] for quote in quotes]
  if not all(quote in example.reasoning for quote in said):
    found.append('the reasoning does not quote the evidence')
  texts = [document.text for document in example.documents]
  if answer(example, texts) != gold:
    found.append('the context does not give exactly the gold answer')
  if example.kind == 'mc' and unstated_options(example, texts):
    found.append('an option is not true of anything in the context')
  if answer(example, quotes) != gold:
    found.append('the evidence alone does not give the gold answer')
  for removed in {span.document for span in example.evidence}:
    kept = [t for i, t in enumerate(texts) if i != removed]
    if answer(example, kept) == gold:
      found.append(f'answerable without document {removed}')
  return found

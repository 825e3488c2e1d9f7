"""Tests for longjax.synthesis.questions."""

import collections
import random
import re

import pytest

from longjax import types
from longjax.synthesis import pipeline, questions, verify

# How each kind of question begins or reads, and where its answer stands.
KINDS = {
    'key': r'Follow key \w+\.',
    'chain': r'Follow key \w+\. What is .*',
    'reply': r'Repeat the .*',
    'choice': r'.*\(A\).*',
    'total': r'How many .* in total\?',
    'difference': r'How many more .*',
    'count': r'How many of .*',
    'held': r'How many \w+ does \w+ hold\?',
    'code': r'What is the code of \w+ for the badge of \w+\?',
    'walk': r'\w+ is the \w+ of the \w+ of \w+\?',
    'lookup': r'\w+ is the \w+ of (?!the )[\w ]+\?',
    'code_walk': r'\w+ is the \w+ of the code of \w+ for \w+\?',
}


def kind_of(question):
  return next(k for k, p in KINDS.items() if re.fullmatch(p, question))


def documents(seed, num_examples=2):
  """Documents of a few examples of random tasks."""
  rng = random.Random(seed)
  split = pipeline.SplitConfig(
      name='context', names='train', min_tokens=150, max_tokens=400)
  found = []
  while len(found) < num_examples:
    example = pipeline.draw(
        rng.choice(pipeline.TASKS), 'x', rng, split=split,
        config=pipeline.SynthConfig(),
        count_tokens=lambda text: len(text) // 4)
    if example is not None:
      found.append(example)
  return [d for example in found for d in example.documents]


def answer(kind, reasoning):
  """What the reasoning comes to, read off its last words."""
  match kind:
    case 'reply':
      return re.split(r'(?:First|Second|Third|Fourth): ', reasoning)[-1]
    case 'choice':
      return reasoning[-3]
    case _:
      return re.findall(r'\w+', reasoning)[-1]


@pytest.fixture(scope='module')
def asked():
  """(texts, question, reasoning) over many contexts."""
  found = []
  for seed in range(150):
    context = documents(seed)
    texts = [document.text for document in context]
    found += [(texts, *pair) for pair in questions.ask(
        context, random.Random(seed), most=4)]
  return found


def test_every_kind_is_asked(asked):
  counts = collections.Counter(kind_of(question) for _, question, _ in asked)
  del counts['code_walk']  # A code that is also a name: rare.
  assert set(counts) | {'code_walk'} == set(KINDS)
  assert min(counts.values()) >= 20, counts


def test_an_oracle_that_reads_the_context_gives_the_same_answers(asked):
  num_checked = 0
  for texts, question, reasoning in asked:
    kind = kind_of(question)
    if kind in ('key', 'held', 'code_walk'):  # No task asks these on their own.
      continue
    want = verify.solve(verify.read(texts), question)
    assert want == {answer(kind, reasoning)}, (question, reasoning)
    num_checked += 1
  assert num_checked > 1000


def test_a_reasoning_quotes_the_context_and_computes(asked):
  computed = re.compile(
      r'So far \d+\.|[\d +-]+ = \d+\.|\w+ is \([A-D]\)\.')
  for texts, question, reasoning in asked:
    for sentence in re.findall(r'[^.?]+[.?]', reasoning):
      quote = re.sub(
          r'^(First|Second|Third|Fourth): ', '', sentence.strip())
      if match := re.fullmatch(r'([\d +-]+) = (\d+)\.', quote):
        terms = match[1].replace('- ', '-').replace('+ ', '').split()
        assert sum(map(int, terms)) == int(match[2])
      assert computed.fullmatch(quote) or any(
          quote in text for text in texts), (question, quote)


def test_at_most_so_many_of_a_kind_and_the_same_for_the_same_seed():
  context = documents(5, num_examples=4)
  few = list(questions.ask(context, random.Random(1), most=2))
  assert few == list(questions.ask(context, random.Random(1), most=2))
  assert few != list(questions.ask(context, random.Random(2), most=2))
  counts = collections.Counter(
      {'held': 'lookup', 'difference': 'total'}.get(k, k)
      for k in (kind_of(question) for question, _ in few))
  assert max(counts.values()) == 2


def test_what_has_two_values_is_not_asked_for():
  context = [
      types.Document(title='A', text='The mentor of Dorvan is Kelmis.'),
      types.Document(title='B', text='The mentor of Dorvan is Felbun. '
                     'The rival of Dorvan is Golwis.')]
  asked = list(questions.ask(context, random.Random(0), most=9))
  assert asked == [
      ('Who is the rival of Dorvan?', 'The rival of Dorvan is Golwis.')]


def test_sentences_end_in_a_full_stop_or_a_question_mark():
  document = types.Document(
      title='A', text='Key a3f asks: Who is the baker of Rertes? The twin of '
      'Lalmas is Virban.\nUser: Write a note.')
  assert questions.sentences([document]) == [
      'Key a3f asks: Who is the baker of Rertes?',
      'The twin of Lalmas is Virban.', 'User: Write a note.']


def test_keys_that_go_round_or_land_on_two_are_survived():
  document = types.Document(
      title='A', text='Key a1 lands on key b2. Key b2 lands on key a1. '
      'Key c3 lands on key d4. Key c3 lands on key e5. '
      'Key e5 asks: Who is the rival of Dorvan? The rival of Dorvan is Golwis.')
  asked = dict(questions.ask([document], random.Random(0), most=9))
  assert 'Follow key a1.' in asked and 'Follow key e5.' in asked
  assert 'Follow key c3.' not in asked
  assert not any('What is the answer' in question for question in asked)

"""The oracle must also notice what is wrong."""

import dataclasses

import pytest

from longjax import types
from longjax.synthesis import verify


def ask(question, *texts):
  return verify.solve(verify.read(texts), question)


FACTS = ('The captain of Tornis is Dorvan. The pet of Tornis is owl.',
         'The mentor of Dorvan is Kelmis. Dorvan holds 3 ropes. '
         'The badge of Dorvan is red.',
         'Kelmis holds 5 ropes. The badge of Kelmis is blue.',
         'The code of Larkes for red is Gilkes. '
         'The code of Larkes for blue is Pinmin.')


@pytest.mark.parametrize(('question', 'answers'), [
    ('Who is the mentor of the captain of Tornis?', {'Kelmis'}),
    ('What is the pet of the mentor of Tornis?', set()),
    ('How many ropes do Dorvan and Kelmis hold in total?', {'8'}),
    ('How many ropes do Dorvan, Kelmis and Tornis hold in total?', set()),
    ('How many more ropes does Kelmis hold than Dorvan?', {'2'}),
    ('How many of Dorvan and Kelmis have a red badge?', {'1'}),
    ('What is the most ropes held by one of Dorvan and Kelmis?', {'5'}),
    ('What is the code of Larkes for red?', {'Gilkes'}),
    ('What is the code of Larkes for the badge of Kelmis?', {'Pinmin'}),
    ('Who is the captain of Tornis? (A) Kelmis, (B) Dorvan.', {'B'}),
    ('Why?', set()),
])
def test_questions_are_answered_from_the_text(question, answers):
  assert ask(question, *FACTS) == answers


def test_contradicting_statements_give_two_answers_or_none():
  twice = (*FACTS, 'Tolken is the captain of Tornis. Dorvan holds 4 ropes.')
  assert ask('Who is the captain of Tornis?', *twice) == {'Dorvan', 'Tolken'}
  assert ask('How many ropes do Dorvan and Kelmis hold in total?',
             *twice) == set()


def test_keys_are_followed_to_what_they_ask():
  text = ('Key a1 lands on key b2. Key c3 asks: Who is the captain of Tornis? '
          'Key b2 asks: Who is the mentor of Dorvan? Key d4 lands on key d4.')
  question = 'Follow key {}. What is the answer to its question?'
  assert ask(question.format('a1'), text, *FACTS) == {'Kelmis'}
  assert ask(question.format('c3'), text, *FACTS) == {'Dorvan'}
  assert ask(question.format('d4'), text, *FACTS) == set()


def test_replies_count_in_reading_order():
  first = 'User: Write a poem about tea.\nBot: One.'
  second = 'User: Write a poem about rain.\nBot: No.\n' + first.replace(
      'One', 'Two')
  question = 'Repeat the second reply to: Write a poem about tea.'
  assert ask(question, first, second) == {'Two.'}
  assert ask(question, second, first) == {'One.'}
  assert ask(question, first) == set()


def good_example():
  return types.TaskExample(
      id='x', task='multihop', kind='qa',
      documents=tuple(types.Document(title=str(i), text=text)
                      for i, text in enumerate(FACTS)),
      question='Who is the mentor of the captain of Tornis?',
      answers=('Kelmis',),
      evidence=(types.Span(document=0, start=0, end=32),
                types.Span(document=1, start=0, end=31)),
      reasoning='The captain of Tornis is Dorvan. '
                'The mentor of Dorvan is Kelmis.')


def test_a_sound_example_has_no_problems():
  assert verify.problems(good_example()) == []


@pytest.mark.parametrize(('changes', 'problem'), [
    ({'answers': ('Dorvan',)}, 'context does not give'),
    ({'reasoning': 'It is Kelmis.'}, 'does not quote'),
    ({'evidence': (types.Span(document=0, start=0, end=32),)},
     'evidence alone'),
    ({'evidence': (types.Span(document=0, start=0, end=999),)}, 'outside'),
    ({'documents': good_example().documents
      + (types.Document(title='copy', text=FACTS[0]),)},
     'answerable without document 0'),
    ({'documents': good_example().documents
      + (types.Document(title='lie', text='Tolken is the mentor of Dorvan.'),)},
     'context does not give'),
])
def test_each_defect_is_named(changes, problem):
  found = verify.problems(dataclasses.replace(good_example(), **changes))
  assert any(problem in text for text in found), found


def test_an_option_that_nothing_states_is_a_problem():
  example = dataclasses.replace(
      good_example(), kind='mc', answers=('A', 'Dorvan'),
      question='Who is the captain of Tornis? (A) Dorvan, (B) Kelmis.')
  assert verify.unstated_options(example, FACTS) == ['Kelmis']
  assert any('option' in text for text in verify.problems(example))

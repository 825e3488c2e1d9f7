"""What is asked and how to answer, told apart."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longjax.agents import query
from longjax.data import tokenizer as tokenizer_lib


@pytest.mark.parametrize('written, want', [
    ('Who is Ada?', ('Who is Ada?', '')),
    ('Who is Ada? Answer with the name only.',
     ('Who is Ada?', 'Answer with the name only.')),
    ('Reply in JSON. Who is Ada, and when was 12.5 paid?',
     ('Who is Ada, and when was 12.5 paid?', 'Reply in JSON.')),
    ('Repeat the first reply. Begin with a765.',
     ('Repeat the first reply.', 'Begin with a765.')),
    ('List the mayors.\n```{"names": ["x?"]}```',
     ('List the mayors.', '```{"names": ["x?"]}```')),
    ('Respond with one word.', ('Respond with one word.', '')),
    ('In which format did they write letters?',
     ('In which format did they write letters?', '')),
    ('', ('', '')),
])
def test_a_query_is_split_into_what_is_asked_and_how_to_answer(written, want):
  assert query.split(written) == want


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=80))
def test_splitting_loses_no_word(written):
  question, instruction = query.split(written)
  assert sorted(f'{question} {instruction}'.split()) == sorted(written.split())


QUERY = 'As JSON, who is Ada?'


@pytest.mark.parametrize('response, want', [
    ('<question>who is Ada?</question><instruction>As JSON,</instruction>',
     ('who is Ada?', 'As JSON,')),
    ('<think><question>no</question></think>\n<question>\nwho is Ada?\n'
     '</question>\n<instruction>As JSON,</instruction>',
     ('who is Ada?', 'As JSON,')),
    # Not its words, not all of them, one twice, nothing asked, no tags.
    ('<question>who was Ada?</question><instruction>As JSON,</instruction>',
     (QUERY, '')),
    ('<question>who is Ada?</question>', (QUERY, '')),
    ('<question>who who is Ada?</question><instruction>As JSON,</instruction>',
     (QUERY, '')),
    ('<question></question><instruction>As JSON, who is Ada?</instruction>',
     (QUERY, '')),
    ('Ada was a mathematician.', (QUERY, ''))])
def test_a_models_split_counts_only_if_it_is_one(response, want):
  assert query.read_split(response, QUERY) == want


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=80), st.text(max_size=120))
def test_no_response_of_a_model_loses_a_word(written, response):
  question, instruction = query.read_split(response, written)
  assert sorted(f'{question} {instruction}'.split()) == sorted(written.split())


def test_the_prompt_ends_where_the_model_speaks():
  tokenizer = tokenizer_lib.load('configs/tiny_base')
  text = tokenizer.decode(query.model_prompt(QUERY, tokenizer))
  assert QUERY in text and '<instruction>' in text
  empty = tokenizer.decode(query.model_prompt('', tokenizer))
  assert text.replace(QUERY, '', 1) == empty

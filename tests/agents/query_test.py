"""What is asked and how to answer, told apart."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longjax.agents import query


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

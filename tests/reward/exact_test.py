import hypothesis
import pytest
from hypothesis import strategies as st

from longjax.reward import exact

MC = ('C', 'The red house')


@pytest.mark.parametrize('prediction', [
    'C', '(C)', 'C.', 'c', '(c)', '"C"', 'C)', 'option C', 'Option (C)',
    'choice C', '(C) The red house', 'C. The red house', 'C: the red house',
    'C) red house', 'The red house', 'the red house', 'C, as it says there',
    'C - The red house',
])
def test_the_gold_option_is_recognised(prediction):
  assert exact.multiple_choice(prediction, MC)


@pytest.mark.parametrize('prediction', [
    'B', '(B)', 'C or D', 'C, D', '(C) or (D)', 'C/D', 'CD', 'c. or d.',
    '(C)(D)', 'ABCD', 'A, B, C and D', 'not C', 'D. The red house', 'red',
    'house', 'The red house or the blue house', 'Cat', 'C3', '', '()', ' ',
    'the', 'The reddish house',
])
def test_everything_else_is_not(prediction):
  assert not exact.multiple_choice(prediction, MC)


def test_an_article_is_not_option_a():
  assert not exact.multiple_choice('A dog', ('A', 'Cats'))
  assert exact.multiple_choice('A dog', ('B', 'A dog'))
  assert exact.multiple_choice('B. A dog', ('B', 'A dog'))


def test_options_without_text_are_graded_by_letter():
  assert exact.multiple_choice('(B)', ('B',))
  assert not exact.multiple_choice('(A)', ('B',))


@pytest.mark.parametrize('prediction, gold', [
    ('Paris', 'Paris'),
    ('paris', 'Paris'),
    ('the city of Paris in France', 'Paris'),
    ('New York', 'new  york'),
    ('The Beatles', 'Beatles'),
    ('Beatles', 'The Beatles'),
    ('1,234', '1234'),
    ('-5', '-5'),
    ('os.path', 'os.path'),
    ('yes, it did', 'yes'),
    ('No', 'no'),
    ('()', '()'),
    ("O'Neil", 'O’Neil'),
])
def test_the_gold_may_stand_in_a_short_answer(prediction, gold):
  assert exact.short_answer(prediction, [gold])


@pytest.mark.parametrize('prediction, gold', [
    ('', 'Paris'),
    ('the', 'the cat'),  # Normalises to nothing: in QwenLong-L1 it scores 1.
    ('the', 'Paris'),
    ('a', 'an apple'),
    ('...', 'Paris'),
    ('York', 'New York'),  # Only one direction.
    ('York New', 'New York'),
    ('New big York', 'New York'),
    ('parish', 'Paris'),
    ('5', '-5'),
    ('-5', '5'),
    ('15', '1.5'),
    ('311', '3.11'),
    ('it did, yes', 'yes'),
    ('no, yes', 'yes'),
    ('yesterday', 'yes'),
    ('not', 'no'),
    ('YES', 'Paris'),
    ('[[YES]]', 'Paris'),
    ('', '()'),
    ('[]', '()'),
    ('json.decoder', 'json'),
    ('Paris ' + 'or Rome ' * 20, 'Paris'),  # Longer than 32 tokens.
])
def test_what_is_not_the_gold_scores_nothing(prediction, gold):
  assert not exact.short_answer(prediction, [gold])


def test_any_alias_counts():
  assert exact.short_answer('Big Apple', ['New York', 'the Big Apple'])
  assert not exact.short_answer('Big Apple', [])


def test_the_length_cap_grows_with_the_gold():
  gold = ' '.join(f'w{i}' for i in range(10))
  assert exact.short_answer(gold + ' x' * 30, [gold])
  assert not exact.short_answer(gold + ' x' * 31, [gold])
  assert exact.short_answer('w0' + ' x' * 31, ['w0'])
  assert not exact.short_answer('w0' + ' x' * 32, ['w0'])


@pytest.mark.parametrize('prediction, golds', [
    ('a, b, c', ('a', 'b', 'c')),
    ('c, a and b', ('a', 'b', 'c')),
    ('a, b, and c', ('a', 'b', 'c')),
    ('[a, b]', ('a', 'b')),
    ('["a", "b"]', ('a', 'b')),
    ('a; b', ('b', 'a')),
    ('a | b', ('b', 'a')),
    ('a,b', ('a', 'b')),
    ('b, b, a', ('a', 'b', 'b')),
    ('1,234, 5', ('5', '1234')),
    ('5.0, 6', ('5', '6.00')),
    ('Smith and Sons, Jones', ('Jones', 'Smith and Sons')),
    ('Paris, France; Rome, Italy', ('Rome, Italy', 'Paris, France')),
    ('Paris', ('paris',)),
    ('Paris, France', ('Paris, France',)),
])
def test_equal_multisets_of_cells_match(prediction, golds):
  assert exact.cells(prediction, golds)


@pytest.mark.parametrize('prediction, golds', [
    ('a, b', ('a', 'b', 'c')),
    ('a, b, c, d', ('a', 'b', 'c')),
    ('a, b', ('a', 'b', 'b')),
    ('a, b, b', ('a', 'b')),
    ('', ('a',)),
    ('the', ('a', 'b')),
    ('-5, 6', ('5', '6')),
    ('50, 6', ('5', '6')),
    ('5%, 6', ('5', '6')),
    (', ,', ('a',)),
])
def test_other_lists_do_not(prediction, golds):
  assert not exact.cells(prediction, golds)


def test_order_counts_only_if_asked():
  assert exact.cells('b, a', ('a', 'b'))
  assert not exact.cells('b, a', ('a', 'b'), is_ordered=True)
  assert exact.cells('a, b', ('a', 'b'), is_ordered=True)


WORDS = st.text('bcdfgh', min_size=1, max_size=4)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.lists(WORDS, min_size=1, max_size=6), st.randoms())
def test_any_order_and_separator_of_the_gold_cells_matches(golds, random):
  shuffled = list(golds)
  random.shuffle(shuffled)
  assert exact.cells(random.choice([', ', '; ', ' | ', ',']).join(
      shuffled), golds)
  assert not exact.cells(', '.join([*shuffled, 'extra']), golds)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.lists(WORDS, min_size=1, max_size=6), WORDS)
def test_the_gold_covers_itself_but_never_a_part_of_it(golds, word):
  gold = ' '.join([*golds, word])
  assert exact.short_answer(f'It was {gold}, I think', [gold])
  assert not exact.short_answer(' '.join(golds), [gold])

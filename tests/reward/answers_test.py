import pytest

from longjax.reward import answers


@pytest.mark.parametrize('text, required, strict, none', [
    ('a</think>b', 'b', 'b', 'b'),
    ('b', None, None, 'b'),
    ('a</think>b</think>c', 'c', None, 'c'),
    ('<think>a</think>\nb', '\nb', '\nb', '\nb'),
    ('a</think>', '', '', ''),
    ('a</THINK>b', None, None, 'a</THINK>b'),
    ('a</ think>b', None, None, 'a</ think>b'),
    ('', None, None, ''),
])
def test_thinking_ends_at_the_last_closing_tag(text, required, strict, none):
  assert answers.split_think(text, think='required') == required
  assert answers.split_think(text, think='strict') == strict
  assert answers.split_think(text, think='none') == none


@pytest.mark.parametrize('text, answer', [
    ('The answer is Paris.', 'Paris'),
    ('THE ANSWER IS Paris', 'Paris'),
    ('So the answer is: Paris!', 'Paris'),
    ('The answer is **Paris**.', 'Paris'),
    ('**The answer is** `Paris`', 'Paris'),
    ('The answer is Paris.\nThat was easy.', 'Paris'),
    ('The answer is Rome. No: the answer is Paris.', 'Paris'),
    ('The answer is (C).', '(C)'),
    ('The answer is -5.', '-5'),
    ('The answer is 3.5.', '3.5'),
    ('The answer is __init__.', '__init__'),
    ('The answer is C#', 'C#'),
    ('Paris', ''),
    ('The answer: Paris', ''),
    ('', ''),
    ('The answer is', ''),
    ('The answer is ...', ''),
    ('The answer is Paris. The answer is', ''),
    ('The answer is\nParis', ''),
    ('The\nanswer is Paris', ''),
])
def test_the_answer_follows_the_last_cue_up_to_the_line_end(text, answer):
  assert answers.extract(text) == answer


@pytest.mark.parametrize('text, tokens', [
    ('The  Quick, brown FOX!', ('quick', 'brown', 'fox')),
    ('the', ()),
    ('A, an; the.', ()),
    ("O'Neil’s", ('oneils',)),
    ('U.S. of A.', ('us', 'of')),
    ('Jean-Luc', ('jeanluc',)),
    ('Ｆｕｌｌ ﬁ', ('full', 'fi')),
    ('Straße', ('strasse',)),
    ('1,234.50 $', ('1234.50',)),
    ('-5', ('-5',)),
    ('−5', ('-5',)),
    ('3.11.2', ('3.11.2',)),
    ('5-7', ('5-7',)),
    ('os.path, __init__', ('ospath', 'init')),
    ('left—right/up', ('left', 'right', 'up')),
    ('()', ()),
])
def test_tokens_drop_articles_and_punctuation_but_no_sign(text, tokens):
  assert answers.tokens(text) == tokens

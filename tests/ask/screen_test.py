"""Answers appear in order, as they are written."""

import io

import pytest

from longjax.ask import screen


class Terminal(io.StringIO):

  def isatty(self):
    return True


def shown(texts, *, show_thinking=False, is_finished=True, terminal=False):
  """What one answer in pieces leaves on the screen."""
  stream = Terminal() if terminal else io.StringIO()
  answers = screen.Answers(
      [''], show_thinking=show_thinking, stream=stream, footers=[lambda: 'end'])
  for i, text in enumerate(texts):
    answers.add(0, text, is_last=i == len(texts) - 1, is_finished=is_finished)
  return stream.getvalue()


@pytest.mark.parametrize('size', [1, 3, 99])
def test_pieces_of_any_size_leave_the_same(size):
  text = 'Hm, so.\n</think>\n\nAda < Bo.'
  texts = [text[i:i + size] for i in range(0, len(text), size)]
  assert shown(texts) == 'Ada < Bo.\nend\n'
  assert shown(texts, show_thinking=True) == 'Hm, so.\n\nAda < Bo.\nend\n'


def test_a_model_that_does_not_think_has_answered():
  assert shown(['Ada', ' Holm']) == 'Ada Holm\nend\n'
  assert shown(['Ada', ' Holm'], show_thinking=True) == 'Ada Holm\nend\n'


def test_a_cut_answer_is_said_to_be_cut(caplog):
  assert shown(['Hm', '</think>A'], is_finished=False) == 'A\nend\n'
  assert 'The answer was cut at the longest' in caplog.text
  assert shown(['Hm'], is_finished=False) == 'end\n'
  assert 'cut while it was thinking at' in caplog.text


def test_thinking_is_dimmed_on_a_terminal_only():
  assert shown(['Hm</think>A'], show_thinking=True, terminal=True) == (
      '\x1b[2mHm\x1b[0m\nA\nend\n')


def test_a_model_cannot_steer_the_terminal():
  assert shown(['</think>a\x1b[2J\x07b\tc\x9b1m\n']) == 'a[2Jb\tc1m\n\nend\n'
  assert shown(['</think>a\u202eb\u2066c\u2069']) == 'abc\nend\n'


def test_a_terminal_without_a_character_shows_a_question_mark():
  raw = io.BytesIO()
  answers = screen.Answers([''], show_thinking=False, stream=io.TextIOWrapper(
      raw, encoding='latin-1'))
  answers.add(0, '</think>Grüße, 漢字', is_last=True)
  assert raw.getvalue().decode('latin-1') == 'Grüße, ??\n'


def test_an_answer_waits_for_those_before_it():
  stream = io.StringIO()
  answers = screen.Answers(
      ['One?', 'Two?'], show_thinking=False, stream=stream)
  answers.add(1, '</think>second', is_last=True)
  answers.add(0, '</think>fir')
  assert stream.getvalue() == 'One?\nfir'
  answers.add(0, 'st', is_last=True)
  assert stream.getvalue() == 'One?\nfirst\n\nTwo?\nsecond\n'


def test_a_heading_waits_for_its_answer():
  stream = io.StringIO()
  answers = screen.Answers(
      ['One?', 'Two?'], show_thinking=False, stream=stream)
  answers.add(1, '</think>second', is_last=True)
  assert stream.getvalue() == ''

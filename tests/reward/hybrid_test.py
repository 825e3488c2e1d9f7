import hypothesis
import pytest
from hypothesis import strategies as st

from longjax import types
from longjax.reward import hybrid
from tests.reward import examples

META = {
    'mrcr': {'required_prefix': 'k3Jd9'},
    'numeric': {'unit': 'million dollars'},
}


def example(kind, /, **fields):
  return examples.example(kind, **{'meta': META.get(kind, {})} | fields)


def reward(kind, response, *, think='required', **kwargs):
  return hybrid.score(example(kind, **kwargs), response, think=think).reward


@pytest.mark.parametrize('kind, answer', [
    ('mc', '(C).'),
    ('mc', 'the red house'),
    ('qa', '**Paris**.'),
    ('qa', 'the City of Light'),
    ('numeric', '$42.5'),
    ('numeric', '42,500,000'),
    ('count', '7.'),
    ('list', 'blue and red'),
])
def test_a_right_answer_after_thinking_scores_one(kind, answer):
  text = f'Let me see. The answer is 999.</think>The answer is {answer}'
  got = hybrid.score(example(kind), text)
  assert got.reward == 1.0
  assert got.rule == kind


# What earlier verifiers let pass.
@pytest.mark.parametrize('kind, answer', [
    ('qa', 'the'),  # Normalises to nothing, which is inside every gold.
    ('qa', ''),
    ('qa', '...'),
    ('qa', 'a'),
    ('qa', 'YES'),
    ('qa', '[[YES]]'),
    ('qa', 'unknown [[YES]] [[YES]]'),
    ('qa', 'Par'),
    ('qa', 'Rome ' * 40 + 'Paris'),
    ('numeric', '-42.5'),  # Sign.
    ('numeric', '(42.5)'),
    ('numeric', '425'),  # Powers of ten.
    ('numeric', '4.25'),
    ('numeric', '0.425'),
    ('numeric', '4250'),
    ('numeric', '42,500'),
    ('numeric', '85/2*1'),  # Nothing is evaluated.
    ('numeric', '40 + 2.5'),
    ('numeric', 'float("42.5")+0'),
    ('numeric', '[[YES]]'),
    ('numeric', 'the'),
    ('numeric', '42.5 or 43.5'),
    ('count', '-7'),
    ('count', '70'),
    ('count', '0.7'),
    ('count', '6 or 7'),
    ('count', 'len([1]*7)'),
    ('count', '[[YES]]'),
    ('mc', 'B'),
    ('mc', 'C or D'),
    ('mc', 'A, B, C, D'),
    ('mc', 'the'),
    ('mc', '[[YES]]'),
    ('list', 'red'),
    ('list', 'red, blue, green'),
    ('list', 'red, red, blue'),
    ('list', 'the'),
])
def test_an_adversarial_answer_scores_zero(kind, answer):
  assert reward(kind, f'Hm.</think>The answer is {answer}') == 0.0


def test_the_eval_injection_has_no_effect(tmp_path):
  target = tmp_path / 'touched'
  attack = f'__import__("pathlib").Path({str(target)!r}).touch() or 42.5'
  for kind in hybrid.KINDS:
    reward(kind, f'</think>The answer is {attack}')
  assert not target.exists()


@pytest.mark.parametrize('text, rule', [
    ('The answer is Paris.', 'think'),
    ('</think>Paris', 'no_answer'),
    ('The answer is Paris.</think>', 'no_answer'),
    ('</think>The answer is', 'no_answer'),
    ('', 'think'),
])
def test_no_tag_and_no_cue_score_zero_and_say_so(text, rule):
  got = hybrid.score(example('qa'), text)
  assert (got.reward, got.rule, got.answer) == (0.0, rule, '')


def test_thinking_is_not_needed_where_none_is_asked():
  assert reward('qa', 'The answer is Paris.', think='none') == 1.0
  assert reward('qa', 'x</think>The answer is Paris.', think='none') == 1.0


def test_strict_thinking_needs_exactly_one_tag():
  twice = 'a</think>b</think>The answer is Paris.'
  assert reward('qa', twice) == 1.0
  assert reward('qa', twice, think='strict') == 0.0
  assert reward(
      'qa', 'a</think>The answer is Paris.', think='strict') == 1.0


def test_an_answer_in_the_thinking_does_not_count():
  assert reward('qa', 'The answer is Paris.</think>The answer is Rome.') == 0


def test_a_response_cut_off_by_its_cap_scores_zero():
  got = hybrid.score(
      example('qa'), '</think>The answer is Paris', is_finished=False)
  assert (got.reward, got.rule) == (0.0, 'unfinished')


def test_mrcr_grades_the_whole_text_after_thinking():
  text = 'Recall.</think>\n\nk3Jd9The river keeps the names of stones.'
  assert reward('mrcr', text) == 1.0
  part = reward('mrcr', '</think>k3Jd9The river keeps')
  assert 0.0 < part < 1.0
  assert reward('mrcr', '</think>The river keeps the names of stones.') == 0.0
  assert reward('mrcr', '</think>') == 0.0


def test_mrcr_takes_the_most_similar_of_several_golds():
  golds = ('Something else.', *examples.GOLDS['mrcr'])
  text = '</think>k3Jd9The river keeps the names of stones.'
  assert reward('mrcr', text, answers=golds) == 1.0


def test_lists_are_ordered_only_if_the_example_says_so():
  text = '</think>The answer is blue, red.'
  assert reward('list', text) == 1.0
  assert reward('list', text, meta={'ordered': 'true'}) == 0.0


def test_the_question_and_unit_reach_the_numeric_rule():
  text = '</think>The answer is 0.25'
  kwargs = dict(answers=('25',), meta={})
  assert reward('numeric', text, **kwargs) == 0.0
  assert reward(
      'numeric', text, question='What percent are oaks?', **kwargs) == 1.0


def test_the_graded_answer_is_reported():
  got = hybrid.score(example('qa'), '</think>The answer is **Rome**.')
  assert (got.answer, got.rule) == ('Rome', 'qa')


@pytest.mark.parametrize('kwargs, word', [
    (dict(kind='essay'), "kind='essay'"), (dict(answers=()), 'answers')])
def test_an_example_that_cannot_be_graded_is_named(kwargs, word):
  with pytest.raises(types.UserError, match=word) as error:
    hybrid.score(example('qa', **kwargs), 'text')
  assert 'test-1' in str(error.value)


PIECES = st.sampled_from([
    '</think>', 'The answer is ', 'the', '(C)', 'C', '42.5', '-', '7', '%',
    ' million', 'Paris', 'red', ', ', ' and ', '\n', 'k3Jd9', '/', '0', '(',
    ')', 'e', '=', '.', '$', '[[YES]]', '’', '½', '²', '٣', 'x 10^', '*'])


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(
    st.one_of(
        st.text(max_size=40).map(lambda t: '</think>The answer is ' + t),
        st.lists(PIECES, max_size=14).map(''.join),
        st.lists(PIECES, max_size=8).map(
            lambda p: '</think>The answer is ' + ''.join(p)),
        st.text(max_size=40)),
    st.sampled_from(hybrid.KINDS),
    st.sampled_from(['required', 'none', 'strict']))
def test_no_text_raises_or_leaves_the_unit_interval(text, kind, think):
  assert 0.0 <= reward(kind, text, think=think) <= 1.0


@pytest.mark.parametrize('filler', [
    ' ', ',', ';', '(', '5 ', '5,', '.', '-', 'and ', "'", '1', '/', '= ',
    'the answer is ', 'a', '1.'])
@pytest.mark.parametrize('kind', ['mc', 'qa', 'numeric', 'list'])
def test_long_degenerate_answers_take_linear_time(kind, filler, benchmark_s):
  text = '</think>The answer is x' + filler * (60_000 // len(filler)) + '!'
  assert benchmark_s(lambda: reward(kind, text)) < 2.0


@pytest.fixture
def benchmark_s():
  """Processor seconds of a call: other processes do not count."""
  import time

  def measure(call):
    start = time.process_time()
    call()
    return time.process_time() - start
  return measure

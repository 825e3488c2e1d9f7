import dataclasses
import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longjax.evals import reading, scores


@pytest.mark.parametrize('spans, shown', [
    ([], 'abcdef'),
    ([(1, 3)], 'a<mark>bc</mark>def'),
    ([(0, 6)], '<mark>abcdef</mark>'),
    ([(0, 5), (1, 3)], '<mark>abcde</mark>f'),  # Nested.
    ([(1, 3), (2, 5)], 'a<mark>bcde</mark>f'),  # Overlapping.
    ([(3, 5), (1, 3)], 'a<mark>bc</mark><mark>de</mark>f'),  # Adjacent.
    ([(1, 3), (1, 3)], 'a<mark>bc</mark>def'),
    ([(4, 99), (-5, 1)], '<mark>a</mark>bcd<mark>ef</mark>'),
    ([(3, 3), (5, 2), (9, 12)], 'abcdef')])
def test_highlights(spans, shown):
  assert reading.highlight('abcdef', spans) == shown


def test_offsets_count_characters_before_escaping():
  assert reading.highlight('<&>"\U0001f600x', [(3, 5)]) == (
      '&lt;&amp;&gt;<mark>&quot;\U0001f600</mark>x')


@given(
    text=st.text(max_size=30),
    spans=st.lists(st.tuples(st.integers(-2, 32), st.integers(-2, 32))))
def test_a_highlight_changes_no_text_and_marks_just_the_union(text, spans):
  shown = reading.highlight(text, spans)
  parts = re.split(r'(<mark>.*?</mark>)', shown, flags=re.DOTALL)
  plain, is_marked = '', []
  for part in parts:
    marked = part.startswith('<mark>')
    content = html.unescape(part[6:-7] if marked else part)
    plain += content
    is_marked += [marked] * len(content)
  assert plain == text
  assert is_marked == [
      any(s <= i < e for s, e in spans) for i in range(len(text))]


@given(
    length=st.integers(0, 8000),
    spans=st.lists(
        st.tuples(st.integers(0, 7999), st.integers(1, 50)), max_size=4))
def test_a_long_text_keeps_its_evidence(length, spans):
  text = ''.join(chr(97 + i * 7 % 26) for i in range(length))
  spans = [(s, min(s + n, length)) for s, n in spans if s < length]
  short, moved = reading.shorten(text, spans, max_chars=3000)
  assert sorted(short[s:e] for s, e in moved) == sorted(
      text[s:e] for s, e in spans)
  if length <= 3000:
    assert short == text
  gaps = [int(n.replace(',', '')) for n in re.findall(r'… ([\d,]+) ch', short)]
  notes = sum(
      len(f'\n[… {n:,} characters left out …]\n') for n in gaps)
  assert len(short) - notes + sum(gaps) == length


def _group(step, task='mc', rewards=(1.0, 0.0), **changes):
  sample = {
      'thinking': 't', 'response': 'r', 'answer': 'a', 'rule': 'exact',
      'advantage': -0.5, 'length': 3, 'entropy': 0.1, 'is_finished': True,
      'is_kept': True}
  return {
      'step': step, 'stage': 'rl', 'id': f'{task}-{step}', 'task': task,
      'kind': 'qa', 'prompt': 'p', 'question': 'q', 'instruction': '',
      'gold': ['a'], 'documents': [],
      'samples': [{**sample, 'reward': r} for r in rewards], **changes}


def test_few_rollouts_are_all_shown_and_many_are_spread_over_the_run():
  groups = [_group(s, t) for s in range(100) for t in ('mc', 'qa')]
  assert reading.choose(groups[:8], max_groups=8) == groups[:8]
  chosen = reading.choose(groups, max_groups=11)
  assert [g['step'] for g in chosen] == [0, 0, 25, 25, 50, 50, 74, 74, 99, 99]
  crowded = [_group(s, str(i)) for s in range(3) for i in range(50)]
  chosen = reading.choose(crowded, max_groups=10)
  assert [g['step'] for g in chosen] == [0] * 5 + [2] * 5
  one_step = [_group(7, str(i)) for i in range(50)]
  assert len(reading.choose(one_step, max_groups=10)) == 10


@pytest.mark.parametrize('rewards, outcome', [
    ((1.0, 1.0), 'all'), ((0.0, 0.0), 'none'), ((1.0, 0.0), 'mixed'),
    ((0.4, 0.4), 'mixed')])
def test_a_group_can_be_found_by_its_outcome(rewards, outcome):
  shown = reading.rollouts([_group(1, rewards=rewards)], max_groups=5)
  assert f'data-outcome="{outcome}"' in shown


def test_a_held_out_answer_is_split_where_the_grader_splits_it():
  record = scores.Record(
      id='1', task='mc', context_length=64, prompt_length=60, depth=None,
      sample=0, question='?', gold=('b',), evidence=(),
      response='one</think>two</think>three', response_length=9,
      is_finished=True, answer='three', rule='exact', reward=0.0)
  evaluation = {'name': '0_base', 'records': [dataclasses.asdict(record)]}
  shown = reading.answers([evaluation], per_task=1)
  assert '<p class="written thinking">one&lt;/think&gt;two</p>' in shown
  assert '<p class="written">three</p>' in shown


def test_what_happened_to_a_response_is_said():
  group = _group(1, rewards=(0.25,))
  group['samples'][0].update(is_kept=False, is_finished=False, answer='')
  shown = reading.rollouts([group], max_groups=5)
  for words in ('masked by AEPO', 'cut off', 'no answer found', '0.25',
                'advantage −0.50', '3 tokens', 'entropy 0.10'):
    assert words in shown
  assert 'masked by AEPO' not in reading.rollouts([_group(1)], max_groups=5)

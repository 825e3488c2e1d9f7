"""Tests for longjax.synthesis.pretraining."""

import collections
import re

import pytest

from longjax import types
from longjax.data import tokenizer as tokenizer_lib
from longjax.synthesis import pipeline, pretraining

ROW_LEN = 512
MANY = 240


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  split = pipeline.SplitConfig(
      name='tokenizer', names='train', num_per_task=40)
  texts = pipeline.corpus(split, config=pipeline.SynthConfig(), seed=0)
  return tokenizer_lib.train(
      texts, vocab_size=700, directory=tmp_path_factory.mktemp('tokenizer'))


def groups(tokenizer, fraction, *, row_len=ROW_LEN, seed=3, **sizes):
  config = pretraining.PretrainingConfig(stream_fraction=fraction, **sizes)
  return pretraining.groups(
      tokenizer, config=config, row_len=row_len, seed=seed)


@pytest.fixture(scope='module')
def streams(tokenizer):
  made = groups(tokenizer, 1.0)
  return [made[i] for i in range(MANY)]


@pytest.fixture(scope='module')
def pages(tokenizer):
  made = groups(tokenizer, 0.0)
  return [made[i] for i in range(MANY)]


def plain(group):
  return (list(group.prompt),
          [(list(b.extra_prompt), list(b.response)) for b in group.branches])


def is_page(group, tokenizer):
  return group.prompt[0] == tokenizer.special('<|im_start|>')


def is_repeat(group):
  return len(group.branches) == 1 and not group.branches[0].extra_prompt


def places(sequence, part):
  """Where a part stands in a sequence."""
  size = len(part)
  return [i for i in range(len(sequence) - size + 1)
          if sequence[i:i + size] == part]


def test_element_i_is_a_function_of_seed_and_i(tokenizer):
  one, two = (groups(tokenizer, 0.5) for _ in range(2))
  forward = {i: plain(one[i]) for i in range(12)}
  assert {i: plain(two[i]) for i in reversed(range(12))} == forward
  other = groups(tokenizer, 0.5, seed=4)
  assert all(plain(other[i]) != forward[i] for i in range(12))
  assert len({str(g) for g in forward.values()}) == 12
  # Far more than any run reads.
  assert plain(one[10**9]) == plain(two[10**9])


@pytest.mark.parametrize('fraction', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('row_len', [64, 300])
def test_groups_fit_into_a_row_and_train_on_something(
    tokenizer, fraction, row_len):
  made = groups(tokenizer, fraction, row_len=row_len)
  for i in range(40):
    assert made[i].num_tokens <= row_len
    assert made[i].branches
    assert all(len(b.response) for b in made[i].branches)


def test_lengths_are_spread_between_the_bounds(tokenizer):
  made = groups(tokenizer, 1.0, min_len=64, row_len=256)
  sizes = [made[i].num_tokens for i in range(200)]
  assert max(sizes) <= 256
  # Log-uniform: about half lie below the geometric mean, 128.
  assert 60 <= sum(size <= 128 for size in sizes) <= 140
  assert max(sizes) > 220


def test_the_share_of_streams_is_what_was_asked_for(tokenizer, streams, pages):
  assert not any(is_page(g, tokenizer) for g in streams)
  # The smallest pages of a task may be longer than a drawn length, not than
  # this row.
  assert all(is_page(g, tokenizer) for g in pages)
  repeats = sum(map(is_repeat, streams))
  assert 0.3 * MANY < repeats < 0.7 * MANY


def test_a_repeat_continues_its_period(streams):
  for group in filter(is_repeat, streams):
    prompt, response = list(group.prompt), list(group.branches[0].response)
    sequence = prompt + response
    # The prompt is one period and its first token again.
    period = len(prompt) - 1
    assert prompt[-1] == prompt[0]
    assert period >= 4
    for t in range(len(prompt), len(sequence)):
      assert sequence[t] == sequence[t - period]
    assert len(response) >= period - 2


def test_a_record_asked_for_stands_in_the_context_once(streams):
  num_asked = num_ambiguous = 0
  for group in streams:
    if is_repeat(group):
      continue
    prompt = list(group.prompt)
    for branch in group.branches:
      cue, response = list(branch.extra_prompt), list(branch.response)
      assert len(cue) == 2
      found = places(prompt, cue)
      answers = [prompt[i + 2:i + 2 + len(response)] for i in found]
      assert response in answers
      num_asked += 1
      num_ambiguous += any(answer != response for answer in answers)
    asked = [tuple(b.extra_prompt) for b in group.branches]
    assert len(set(asked)) == len(asked)
  assert num_asked > 200
  # Random tokens may form a cue by chance.
  assert num_ambiguous < 0.02 * num_asked


def text_branches(group, tokenizer):
  context = tokenizer.decode(group.prompt)
  for branch in group.branches:
    cue = tokenizer.decode(branch.extra_prompt)
    yield context, cue, tokenizer.decode(branch.response)


def asked_in(cue):
  """The question of a cue in either form, None if it is none."""
  question = cue.replace('<|im_end|>', '').replace('<|im_start|>', '')
  question = question.replace('<think>', '').removesuffix('assistant\n')
  question = question.strip()
  patterns = (
      r'\w+ is the (?P<relation>\w+) of (?P<of>\w+(?: for \w+)?)\?',
      r'How many (?P<thing>\w+) does (?P<holder>\w+) hold\?',
      r'Follow key (?P<key>\w+)\.')
  for pattern in patterns:
    if match := re.fullmatch(pattern, question):
      return {k: re.escape(v) for k, v in match.groupdict().items()}
  return None


def statements(context, asked):
  """All sentences of the context that answer, found without our code."""
  if 'relation' in asked:
    pattern = rf'The {asked["relation"]} of {asked["of"]} is \w+\.'
  elif 'thing' in asked:
    pattern = rf'\b{asked["holder"]} holds \d+ {asked["thing"]}\.'
  else:
    pattern = rf'Key {asked["key"]} [^.?]*[.?]'
  return re.findall(pattern, context)


# What a reasoning adds to its quotes.
COMPUTED = re.compile(
    r'So far \d+\.|[\d +-]+ = -?\d+\.|\w+ is \([A-Z]\)\.')


def check_worked(context, cue, response):
  """Quotes stand in the context; a walk's facts have one value each."""
  reasoning = response.removesuffix('</think>').strip()
  for sentence in re.findall(r'[^.?]+[.?]', reasoning):
    quote = re.sub(r'^(First|Second|Third|Fourth): ', '', sentence.strip())
    assert COMPUTED.fullmatch(quote) or quote in context, (quote, context)
  walk = re.search(r'\w+ is the (\w+) of the (\w+) of (\w+)\?', cue)
  if walk and 'code of' not in cue:
    last, first, start = walk.groups()
    (middle,) = set(re.findall(rf'The {first} of {start} is (\w+)\.', context))
    (end,) = set(re.findall(rf'The {last} of {middle} is (\w+)\.', context))
    assert reasoning.endswith(f'The {last} of {middle} is {end}.')
    return 'walk'
  return 'worked'


def test_what_a_page_trains_is_determined_by_the_page(tokenizer, pages):
  kinds = collections.Counter()
  for group in pages:
    for context, cue, response in text_branches(group, tokenizer):
      sum_match = re.fullmatch(r'\s*([\d+ -]+) =', cue)
      asked = asked_in(cue)
      if sum_match:
        kinds['sum'] += 1
        terms = sum_match[1].split()
        want = int(terms[0]) + sum(
            int(n) if sign == '+' else -int(n)
            for sign, n in zip(terms[1::2], terms[2::2]))
        assert response == f' {want}.'
      elif asked:
        kinds[next(iter(asked))] += 1
        (statement,) = set(statements(context, asked))
        assert response.strip().removesuffix('</think>') == statement
      elif '?' in cue or 'Repeat the' in cue:
        kinds[check_worked(context, cue, response)] += 1
      else:
        kinds['cloze'] += 1
        found = [m.start() for m in re.finditer(
            re.escape(cue.strip() + ' '), context)]
        assert len(found) == 1, (cue, context)
        assert context[found[0]:].startswith(cue.strip() + response)
  assert min(kinds[k] for k in (
      'sum', 'cloze', 'relation', 'thing', 'key', 'walk',
      'worked')) >= 5, kinds


def test_nothing_but_responses_is_trained_on_and_none_is_long(
    tokenizer, pages):
  for group in pages:
    assert max(len(b.response) for b in group.branches) < ROW_LEN // 2
    assert len(group.prompt) > 10


@pytest.mark.parametrize('changes', [
    {'stream_fraction': 1.5}, {'min_len': 8}])
def test_impossible_mixtures_are_refused(changes):
  with pytest.raises(types.UserError, match='text'):
    pretraining.PretrainingConfig(**changes)

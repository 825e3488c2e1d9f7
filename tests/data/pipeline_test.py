import collections
import json

import grain
import jax
import numpy as np
import pytest

from longjax import rows, types
from longjax.data import chat, packing, pipeline, prompts
from longjax.data import tokenizer as tokenizer_lib

WORDS = 'The old harbour of Bergen sold timber to Ada and 17 ships. '


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return tokenizer_lib.train(
      [WORDS * 20, 'user assistant question answer is'], vocab_size=360,
      directory=tmp_path_factory.mktemp('tokenizer'))


def make_examples(num_contexts, questions_each=1):
  return [
      types.TaskExample(
          id=f'{c}-{q}', task='reading', kind='qa',
          documents=(types.Document(
              title=f'D{c}', text=WORDS * (1 + c * 5 % 3)),),
          question=f'What is {c} {q}?', answers=(f'{c}.{q}',),
          reasoning=f'It says {c}.{q}')
      for c in range(num_contexts) for q in range(questions_each)
  ]


def make_config(**changes):
  return pipeline.SftDataConfig(
      **(dict(num_rows=3, row_len=160, reasoning_fraction=0.5, seed=5)
         | changes))


def sequences(batch):
  """Each trained response with all that it sees: {trajectory: (ids, ids)}.

  Written from the visibility rule, one trained place at a time.
  """
  result = {}
  for r in range(batch.tokens.shape[0]):
    meta = [np.asarray(x[r]) for x in (
        batch.meta.group, batch.meta.branch, batch.meta.position)]
    for t in np.flatnonzero(batch.loss_mask[r]):
      seen = np.array([
          meta[0][s] == meta[0][t] and meta[1][s] in (0, meta[1][t])
          and meta[2][s] <= meta[2][t] for s in range(batch.tokens.shape[1])])
      assert meta[0][t] >= 0
      read = batch.tokens[r][seen][np.argsort(meta[2][seen])].tolist()
      number = int(batch.trajectory[r, t])
      index = int(batch.response_index[r, t])
      prompt, response = result.setdefault(number, ([], []))
      if index == 0:
        prompt.extend(read)
      assert read == prompt + response
      assert len(response) == index
      response.append(int(batch.targets[r, t]))
  return result


def take(iterator, num):
  return [next(iterator) for _ in range(num)]


def assert_equal_batches(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def test_every_response_follows_its_own_prompt(tokenizer):
  examples = make_examples(8, 3)
  by_prompt = {
      tuple(chat.render_prompt(e, tokenizer)): e for e in examples}
  config = make_config(lookahead=1)
  iterator = iter(pipeline.sft_batches(examples, tokenizer, config=config))
  seen = collections.Counter()
  for batch in take(iterator, 12):
    found = sequences(batch)
    assert sorted(found) == list(range(len(found)))
    for prompt, response in found.values():
      example = by_prompt[tuple(prompt)]
      assert response in [
          prompts.demonstration(example, tokenizer, with_reasoning=w)
          for w in (False, True)]
      seen[example.id] += 1
    assert batch.tokens.shape == (3, 160)
  assert set(seen) == {e.id for e in examples}
  # One epoch may be under way, and one group may wait.
  assert max(seen.values()) - min(seen.values()) <= 2


def test_nothing_but_responses_is_trained(tokenizer):
  examples = make_examples(8)
  iterator = iter(
      pipeline.sft_batches(examples, tokenizer, config=make_config()))
  for batch in take(iterator, 4):
    assert not batch.targets[~batch.loss_mask].any()
    assert not (batch.loss_mask & (batch.meta.group < 0)).any()
    num_trained = sum(len(r) for _, r in sequences(batch).values())
    assert batch.loss_mask.sum() == num_trained


@pytest.mark.parametrize('fraction', [0.0, 0.35, 1.0])
def test_the_share_of_reasoning_is_kept(tokenizer, fraction):
  iterator = iter(pipeline.sft_batches(
      make_examples(9), tokenizer,
      config=make_config(reasoning_fraction=fraction)))
  first = np.concatenate([
      b.targets[b.loss_mask & (b.response_index == 0)]
      for b in take(iterator, 60)])
  share = np.mean(first != tokenizer.special('</think>'))
  # Four standard errors of a share.
  error = 4 * np.sqrt(fraction * (1 - fraction) / len(first))
  assert abs(share - fraction) <= error


def test_epochs_and_seeds_change_the_order(tokenizer):
  def first(seed):
    iterator = iter(pipeline.sft_batches(
        make_examples(9), tokenizer, config=make_config(seed=seed)))
    return [b.tokens.tolist() for b in take(iterator, 6)]

  assert first(1) == first(1)
  assert first(1) != first(2)
  assert len({str(tokens) for tokens in first(1)}) == 6


@pytest.mark.parametrize('num_before', [0, 1, 2, 7, 20])
def test_a_restored_iterator_continues_bit_for_bit(tokenizer, num_before):
  config = make_config()

  def fresh():
    return iter(pipeline.sft_batches(
        make_examples(7, 3), tokenizer, config=config))

  original = fresh()
  take(original, num_before)
  state = json.dumps(original.get_state())
  expected = take(original, 9)
  restored = fresh()
  restored.set_state(json.loads(state))
  for a, b in zip(expected, take(restored, 9), strict=True):
    assert_equal_batches(a, b)
  assert restored.get_state() == original.get_state()
  # Also into an iterator that has already gone elsewhere.
  restored.set_state(json.loads(state))
  assert_equal_batches(next(restored), expected[0])


def test_states_stay_small(tokenizer):
  iterator = iter(pipeline.sft_batches(
      make_examples(30), tokenizer, config=make_config(lookahead=8)))
  for _ in range(40):
    next(iterator)
    assert len(iterator.get_state()['waiting']) == 8


def test_nothing_waits_forever():
  # The short group never fits beside a long one.
  sizes = [150, 20] + [150] * 500
  groups = grain.MapDataset.source(sizes).map(
      lambda n: rows.Group(prompt=[1] * (n - 1), branches=[
          rows.Branch(response=[2, 3], trajectory=0)]))
  iterator = iter(packing.pack_groups(
      groups, num_rows=1, row_len=160, lookahead=4))
  for _ in range(20):
    batch = next(iterator)
    if (batch.meta.group >= 0).sum() == 20:
      return
  pytest.fail('the short group was never packed')


def test_rows_are_well_filled(tokenizer):
  iterator = iter(pipeline.sft_batches(
      make_examples(60), tokenizer,
      config=make_config(num_rows=8, row_len=256)))
  shares = [np.mean(b.meta.group < 0) for b in take(iterator, 20)]
  assert np.mean(shares) < 0.1


def test_an_example_longer_than_a_row_is_named(tokenizer):
  iterator = iter(pipeline.sft_batches(
      make_examples(1), tokenizer, config=make_config(row_len=20)))
  with pytest.raises(types.UserError, match=r"'0-0' takes .* row_len=20"):
    next(iterator)


def test_no_examples_are_refused(tokenizer):
  with pytest.raises(types.UserError, match='no examples'):
    pipeline.sft_batches([], tokenizer, config=make_config())


def test_a_state_of_other_sizes_is_refused(tokenizer):
  examples = make_examples(5)
  state = iter(pipeline.sft_batches(
      examples, tokenizer, config=make_config())).get_state()
  other = iter(pipeline.sft_batches(
      examples, tokenizer, config=make_config(num_rows=4)))
  with pytest.raises(types.UserError, match=r'was \[3, 160, 16\].*\[4, 160'):
    other.set_state(state)


@pytest.mark.parametrize('changes, problem', [
    (dict(num_rows=0), 'num_rows=0'),
    (dict(row_len=-1), 'row_len=-1'),
    (dict(lookahead=0), 'lookahead=0'),
    (dict(reasoning_fraction=1.5), 'reasoning_fraction=1.5'),
    (dict(seed=-1), 'seed=-1'),
])
def test_impossible_configurations_are_refused(changes, problem):
  with pytest.raises(types.UserError, match=problem):
    make_config(**changes)

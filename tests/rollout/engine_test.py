"""Tests for longjax.rollout.engine."""

import functools

import jax
import numpy as np
import pytest

from longjax import types
from longjax.model import compute
from longjax.rollout import decode, engine
from tests import tiny_model

MAX_LEN = 6
SAMPLER = decode.SamplerConfig(max_response_len=MAX_LEN)


@functools.cache
def make(prompt_buckets=(8, 16), prompts_per_batch=4, **mesh):
  """An engine; one for all tests that ask for the same."""
  return engine.Engine(
      model=tiny_model.MODEL, sampler=SAMPLER, stop_ids=(5, 17, 40),
      engine=engine.EngineConfig(
          prompt_buckets=prompt_buckets,
          prompts_per_batch=prompts_per_batch),
      rules=tiny_model.rules(**mesh),
      compute=compute.Compute(attention='reference'))


def sample(made, prompts, seed=0):
  return made.sample(
      tiny_model.params(), prompts, jax.random.key(seed), num_samples=2)


def assert_same(got, want):
  for name in ('tokens', 'lengths', 'is_finished'):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
  np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
  np.testing.assert_allclose(got.entropy, want.entropy, rtol=0, atol=1e-5)


def test_results_stand_in_the_order_of_the_prompts_whatever_their_bucket():
  # Both buckets, and more prompts of the first than one batch takes.
  prompts = tiny_model.prompts([16, 3, 9, 8, 1, 12, 5, 6, 2])
  together = sample(make(), prompts)
  assert together.tokens.shape == (9, 2, MAX_LEN)
  assert (together.lengths > 0).all()
  for i, prompt in enumerate(prompts):
    alone = sample(make(), [prompt])
    assert_same(alone, jax.tree.map(lambda x, i=i: x[i:i + 1], together))


def test_a_bucket_changes_nothing():
  prompts = tiny_model.prompts([5, 2, 8])
  assert_same(sample(make(prompt_buckets=(16,)), prompts),
              sample(make(), prompts))


def test_results_are_host_arrays_of_their_own():
  rollouts = sample(make(), tiny_model.prompts([3]))
  for field in jax.tree.leaves(rollouts):
    assert isinstance(field, np.ndarray)
    assert field.flags.writeable


def test_steady_state_compiles_nothing():
  made = engine.Engine(
      model=tiny_model.MODEL, sampler=SAMPLER, stop_ids=(5,),
      engine=engine.EngineConfig(prompt_buckets=(8,), prompts_per_batch=4),
      rules=tiny_model.rules(), compute=compute.Compute(attention='reference'))
  assert made.num_programs() == 0
  for i, lengths in enumerate([[3], [8, 2], [1, 1, 4, 5, 6, 7], [8] * 4]):
    sample(made, tiny_model.prompts(lengths, seed=i), seed=i)
    assert made.num_programs() == 1


def test_prompts_are_laid_out_with_the_last_token_apart():
  prompts = tiny_model.prompts([3, 1])
  batch = engine.pad(prompts, num_prompts=3, prompt_len=5)
  np.testing.assert_array_equal(
      batch.tokens, [[*prompts[0].tokens[:2], 0, 0, 0], [0] * 5, [0] * 5])
  np.testing.assert_array_equal(
      batch.last_token, [prompts[0].tokens[2], prompts[1].tokens[0], 0])
  np.testing.assert_array_equal(batch.lengths, [3, 1, 0])
  np.testing.assert_array_equal(batch.numbers, [1000, 1001, 0])


def test_a_prompt_longer_than_every_bucket_is_named():
  with pytest.raises(
      types.UserError,
      match=r'prompt 1 has 17 tokens.*engine.prompt_buckets=\(8, 16\)'):
    sample(make(), tiny_model.prompts([3, 17]))


def test_no_prompts_are_refused():
  with pytest.raises(ValueError, match='no prompt'):
    sample(make(), [])


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused():
  with pytest.raises(
      types.UserError, match=r'prompts_per_batch=4 does not divide over the '
      r'8 data shards.*use a multiple of 8'):
    make(data=2, fsdp=4)


@pytest.mark.parametrize('buckets', [(), (8, 8), (16, 8), (1, 4)])
def test_impossible_buckets_are_refused(buckets):
  with pytest.raises(types.UserError, match='engine.prompt_buckets='):
    engine.EngineConfig(prompt_buckets=buckets, prompts_per_batch=1)


def test_an_empty_batch_is_refused():
  with pytest.raises(types.UserError, match='engine.prompts_per_batch=0'):
    engine.EngineConfig(prompt_buckets=(8,), prompts_per_batch=0)


class SpellingTokenizer:
  """Spells ids."""

  def decode(self, ids):
    return ' '.join(map(str, ids))


def test_the_text_of_a_response_has_no_stop_token_and_no_padding():
  rollouts = types.Rollouts(
      tokens=np.int32([[[7, 8, 5, 0], [7, 8, 9, 6]]]),
      lengths=np.int32([[3, 4]]), logprobs=np.zeros((1, 2, 4), np.float32),
      entropy=np.zeros((1, 2, 4), np.float32),
      entropy_t1=np.zeros((1, 2, 4), np.float32),
      is_finished=np.array([[True, False]]))
  texts = [
      engine.response_text(SpellingTokenizer(), rollouts, 0, g)
      for g in range(2)]
  assert texts == ['7 8', '7 8 9 6']

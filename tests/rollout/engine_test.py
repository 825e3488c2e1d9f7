"""Tests for longjax.rollout.engine."""

import functools

import jax
import numpy as np
import pytest

from longjax import types
from longjax.model import compute
from longjax.parallel import rules as rules_lib
from longjax.rollout import decode, engine
from tests import tiny_model

MAX_LEN = 6
SAMPLER = decode.SamplerConfig(max_response_len=MAX_LEN)


@functools.cache
def make(prompt_buckets=(8, 16), prompts_at_once=4, **mesh):
  """An engine; one for all tests that ask for the same."""
  return engine.Engine(
      model=tiny_model.MODEL, sampler=SAMPLER, stop_ids=(5, 17, 40),
      engine=engine.EngineConfig(
          prompt_buckets=prompt_buckets,
          prompts_at_once=prompts_at_once),
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
  # Both buckets, and more prompts of the first than there are lanes.
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


def test_what_is_written_after_forgetting_is_what_a_new_session_writes():
  prompts = tiny_model.prompts([16, 16, 9])
  keys = engine.prompt_keys(jax.random.key(0), prompts)
  session = make().session(tiny_model.params())
  for _ in range(2):
    session.sample(prompts[:2], keys[:2], num_samples=1)
  num_reused = session.stats.reused_tokens
  assert num_reused
  session.forget()
  got = session.sample(prompts, keys, num_samples=2)
  assert session.stats.reused_tokens == num_reused
  want = make().session(tiny_model.params()).sample(
      prompts, keys, num_samples=2)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_call_that_is_cut_does_not_begin_the_next_bucket():
  prompts = tiny_model.prompts([3, 16])
  asked = []
  session = make().session(tiny_model.params())
  got = session.sample(
      prompts, engine.prompt_keys(jax.random.key(0), prompts), num_samples=2,
      should_cut=lambda rollouts: asked.append(rollouts.lengths.copy()) or True)
  assert len(asked) == 1
  np.testing.assert_array_equal(got.lengths, asked[0])
  assert got.lengths[0].any() and not got.lengths[1].any()


def ends(prompts, **kwargs):
  """Rollouts, and the order in which their samples are said to have ended."""
  session = make().session(tiny_model.params())
  told = []

  def on_end(rollouts, p, g):
    told.append((p, g))
    length = rollouts.lengths[p, g]
    assert rollouts.is_finished[p, g] or length == MAX_LEN
    assert rollouts.tokens[p, g, :length].all()

  return session.sample(
      prompts, engine.prompt_keys(jax.random.key(0), prompts), num_samples=2,
      on_end=on_end, **kwargs), told


def test_the_end_of_every_sample_is_told_once_and_before_later_ones_begin():
  prompts = tiny_model.prompts([3, 16, 5, 2, 9, 1, 4])
  whole, told = ends(prompts)
  assert sorted(told) == list(np.ndindex(7, 2))
  # The second bucket is begun when the first is done.
  assert {p for p, _ in told[-4:]} == {1, 4}
  # A call that is cut tells of those that ended, the next one of all.
  cut, first = ends(
      prompts, should_cut=lambda rollouts: rollouts.is_finished.any())
  ended = cut.is_finished | (cut.lengths == MAX_LEN)
  assert 0 < len(first) < 14
  assert sorted(first) == list(map(tuple, np.argwhere(ended).tolist()))
  again, then = ends(prompts, begun=cut)
  assert then[:len(first)] == sorted(first)
  assert sorted(then) == sorted(told)
  assert_same(again, whole)


@pytest.mark.parametrize('bucket, chunk_len, want', [
    # A chunk of whole blocks; a lane of whole chunks.
    (2000, 512, (512, 2048)), (1153, 512, (384, 1152)), (2, 512, (1, 1)),
    (100, 512, (99, 99)), (17, 4, (4, 16)), (18, 4, (4, 20))])
def test_lanes_are_as_long_as_the_chunks_that_fill_them(
    bucket, chunk_len, want):
  config = engine.EngineConfig(
      prompt_buckets=(bucket,), prompts_at_once=1, chunk_len=chunk_len)
  made = engine.programs(
      config, bucket, config=tiny_model.MODEL, sampler=SAMPLER, stop_ids=(5,),
      compute=compute.Compute(),
      rules=rules_lib.for_sampler(tiny_model.rules(), 1))
  assert (made.chunk_len, made.lane_len) == want


def test_chunks_and_rings_divide_over_the_devices_that_share_a_prompt():
  config = engine.EngineConfig(
      prompt_buckets=(24,), prompts_at_once=2, chunk_len=6)
  made = engine.programs(
      config, 24, config=tiny_model.MODEL, sampler=SAMPLER, stop_ids=(5,),
      compute=compute.Compute(),
      rules=rules_lib.for_sampler(tiny_model.rules(fsdp=2, seq=4), 2))
  assert (made.chunk_len, made.lane_len, made.num_places) == (8, 24, 8)


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
      types.UserError, match=r'prompts_at_once=4 does not divide over the '
      r'8 data shards.*use a multiple of 8'):
    make(data=2, fsdp=4)


def test_slots_that_do_not_divide_over_the_mesh_are_refused():
  config = engine.EngineConfig(
      prompt_buckets=(8,), prompts_at_once=8, samples_per_prompt=2,
      samples_at_once=12)
  with pytest.raises(
      types.UserError, match=r'sampler.samples_at_once=12 does not divide '
      r'over the 8 data shards.*use a multiple of 8'):
    engine.check(config, tiny_model.rules(data=8), name='sampler')


@pytest.mark.parametrize('buckets', [(), (8, 8), (16, 8), (1, 4)])
def test_impossible_buckets_are_refused(buckets):
  with pytest.raises(types.UserError, match='engine.prompt_buckets='):
    engine.EngineConfig(prompt_buckets=buckets, prompts_at_once=1)


@pytest.mark.parametrize('field, value', [
    ('prompts_at_once', 0), ('samples_per_prompt', 0),
    ('samples_at_once', -1), ('chunk_len', 0)])
def test_an_engine_without_room_is_refused(field, value):
  with pytest.raises(types.UserError, match=f'engine.{field}={value}'):
    engine.EngineConfig(
        **dict(prompt_buckets=(8,), prompts_at_once=1) | {field: value})


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

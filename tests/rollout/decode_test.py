"""Tests for longjax.rollout.decode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import rows, types
from longjax.model import compute, head, parameters, transformer
from longjax.rl import batch
from longjax.rollout import decode, engine
from longjax.train import step
from tests import tiny_model

NUM_SAMPLES, MAX_LEN, PROMPT_LEN = 3, 10, 16
COMPUTE = compute.Compute(attention='reference')
STOP_IDS = (5, 17, 40, 41, 42, 60, 77, 90)
# Ragged: a single token, a full bucket, two equal prompts but for the number.
LENGTHS = [4, 1, 16, 9, 2, 12, 7, 7]
PROMPTS = tiny_model.prompts(LENGTHS)
PROMPTS[7] = types.Prompt(
    example=PROMPTS[6].example, tokens=PROMPTS[6].tokens, number=77)
SAMPLERS = {
    'truncated': decode.SamplerConfig(
        temperature=0.7, top_p=0.95, max_response_len=MAX_LEN),
    'plain': decode.SamplerConfig(max_response_len=MAX_LEN),
    'greedy': decode.SamplerConfig(
        temperature=0.0, max_response_len=MAX_LEN),
}
MESHES = {'one': {}, 'data=8': dict(data=8),
          'data=2,fsdp=4': dict(data=2, fsdp=4),
          'fsdp=2,seq=4': dict(fsdp=2, seq=4),
          'seq=4,tensor=2': dict(seq=4, tensor=2)}


@functools.cache
def make(sampler='plain', mesh='one', prompts_at_once=8, bucket=PROMPT_LEN,
         **engine_config):
  """An engine; one for all tests that ask for the same."""
  return engine.Engine(
      model=tiny_model.MODEL, sampler=SAMPLERS[sampler], stop_ids=STOP_IDS,
      engine=engine.EngineConfig(
          prompt_buckets=(bucket,), prompts_at_once=prompts_at_once,
          **{'samples_per_prompt': NUM_SAMPLES} | engine_config),
      rules=tiny_model.rules(**MESHES[mesh]), compute=COMPUTE)


def generate(prompts, *, mesh='one', num_samples=NUM_SAMPLES, seed=0, **how):
  """Rollouts of some prompts."""
  params = tiny_model.params()
  if mesh != 'one':
    params = jax.device_put(
        params, tiny_model.rules(**MESHES[mesh]).tree_shardings(
            parameters.axes(tiny_model.MODEL), params))
  return make(mesh=mesh, **how).sample(
      params, prompts, jax.random.key(seed), num_samples=num_samples)


@functools.cache
def sampled(sampler='plain'):
  return generate(PROMPTS, sampler=sampler)


def take(rollouts, indices):
  return jax.tree.map(lambda x: x[np.asarray(indices)], rollouts)


def assert_same(got, want):
  """The same tokens, and scores up to the order of sums."""
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.lengths, want.lengths)
  np.testing.assert_array_equal(got.is_finished, want.is_finished)
  np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
  np.testing.assert_allclose(got.entropy, want.entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize('sampler', ['truncated', 'plain'])
def test_scores_are_those_of_the_trainer(sampler):
  rollouts = sampled(sampler)
  assert len(set(rollouts.lengths.flat)) > 4  # Ragged responses too.
  packed = tiny_model.packed(PROMPTS, rollouts, row_len=48, num_rows=8)
  score = step.make_score(
      config=tiny_model.MODEL, rules=tiny_model.rules(),
      compute=compute.Compute(), temperature=SAMPLERS[sampler].temperature)
  scores = jax.device_get(score(tiny_model.params(), packed))
  for name in ('logprobs', 'entropy', 'entropy_t1'):
    trained = batch.unpack(
        [getattr(scores, name)], [packed], max_response_len=MAX_LEN,
        num_responses=len(PROMPTS) * NUM_SAMPLES)
    np.testing.assert_allclose(
        getattr(rollouts, name).reshape(-1, MAX_LEN), trained, rtol=0,
        atol=1e-5, err_msg=name)


def test_greedy_tokens_are_those_of_running_the_whole_sequence_each_time():
  rollouts = sampled('greedy')
  np.testing.assert_array_equal(  # The samples of a prompt agree.
      rollouts.tokens, rollouts.tokens[:, :1].repeat(NUM_SAMPLES, axis=1))

  @jax.jit
  def next_token(tokens, length):
    position = jnp.arange(tokens.shape[0])
    meta = rows.TokenMeta(
        group=jnp.where(position < length, 0, -1),
        branch=jnp.zeros_like(position), position=position)
    hidden = transformer.hidden_states(
        tiny_model.params(), tokens[None],
        jax.tree.map(lambda x: x[None], meta), config=tiny_model.MODEL,
        rules=tiny_model.rules(), compute=COMPUTE).states
    logits = head.logits(
        hidden[0, length - 1], parameters.head_weights(tiny_model.params()))
    return jnp.argmax(logits)

  for p, prompt in enumerate(PROMPTS[:6]):
    tokens, length = np.zeros(PROMPT_LEN + MAX_LEN, np.int32), LENGTHS[p]
    tokens[:length] = prompt.tokens
    want = []
    while len(want) < MAX_LEN and not (want and want[-1] in STOP_IDS):
      want.append(int(next_token(tokens, length)))
      tokens[length], length = want[-1], length + 1
    assert rollouts.lengths[p, 0] == len(want)
    np.testing.assert_array_equal(rollouts.tokens[p, 0, :len(want)], want)


@pytest.mark.parametrize('sampler', ['truncated', 'plain', 'greedy'])
def test_a_response_ends_with_the_first_stop_token_or_at_the_cap(sampler):
  rollouts = sampled(sampler)
  if sampler == 'plain':
    assert 0 < rollouts.is_finished.sum() < rollouts.is_finished.size
  for i in np.ndindex(*rollouts.lengths.shape):
    length = rollouts.lengths[i]
    response = rollouts.tokens[i][:length].tolist()
    assert 1 <= length <= MAX_LEN
    assert not set(response[:-1]) & set(STOP_IDS)
    assert rollouts.is_finished[i] == (response[-1] in STOP_IDS)
    assert rollouts.is_finished[i] or length == MAX_LEN
    # A finished sample writes nothing more.
    for name in ('tokens', 'logprobs', 'entropy'):
      assert not getattr(rollouts, name)[i][length:].any()
    assert (rollouts.entropy[i][:length] > 0).all()
    assert (rollouts.logprobs[i][:length] < 0).all()


def test_a_sample_does_not_depend_on_its_batch():
  want = sampled()
  # Alone, in another order, and beside other prompts.
  for p in (0, 1, 2):
    assert_same(take(generate([PROMPTS[p]]), [0]), take(want, [p]))
  order = [5, 0, 3, 7, 1, 2, 6, 4]
  assert_same(generate([PROMPTS[p] for p in order]), take(want, order))
  others = tiny_model.prompts([3, 5, 16, 1], seed=9)
  beside = generate([*others, PROMPTS[3], PROMPTS[5]])
  assert_same(take(beside, [4, 5]), take(want, [3, 5]))


def test_a_sample_does_not_depend_on_padding_or_on_the_shape_of_its_batch():
  want = take(sampled(), [1, 3])
  got = generate(
      [PROMPTS[1], PROMPTS[3]], prompts_at_once=2, bucket=24, num_samples=5)
  assert_same(jax.tree.map(lambda x: x[:, :NUM_SAMPLES], got), want)


@pytest.mark.parametrize('how', [
    dict(prompts_at_once=2, samples_at_once=4),
    dict(prompts_at_once=8, samples_at_once=2, chunk_len=4),
    dict(prompts_at_once=1, samples_per_prompt=1, chunk_len=5),
    dict(prompts_at_once=3, samples_per_prompt=2, samples_at_once=3,
         chunk_len=1),
], ids=str)
def test_a_sample_does_not_depend_on_whose_place_it_took(how):
  assert_same(generate(PROMPTS, **how), sampled())


def test_prompts_samples_and_seeds_draw_differently():
  rollouts = sampled()
  # One prompt under two numbers; its samples; another seed.
  assert (rollouts.tokens[6] != rollouts.tokens[7]).any()
  for p in range(8):
    responses = {tuple(r) for r in rollouts.tokens[p].tolist()}
    assert len(responses) == NUM_SAMPLES
  other = generate(PROMPTS, seed=1)
  assert (other.tokens != rollouts.tokens).any(axis=2).mean() > 0.9
  assert_same(generate(PROMPTS), rollouts)


def test_noise_differs_between_prompts_samples_and_places():
  # Where every token is equally likely, only the noise decides.
  params = tiny_model.params()
  params['head'] = np.zeros_like(params['head'])
  made = make().sample(
      params, PROMPTS, jax.random.key(0), num_samples=NUM_SAMPLES)
  long = made.tokens[made.lengths > 3].tolist()
  assert len(long) > 12
  assert len({tuple(response[:3]) for response in long}) == len(long)
  # No token of a response is bound to the one before it.
  drawn = made.tokens[made.tokens > 0]
  assert len(set(drawn.tolist())) > 0.7 * tiny_model.MODEL.vocab_size
  assert sum(r[0] == r[1] == r[2] for r in long) == 0


@pytest.mark.parametrize('mesh', list(MESHES)[1:])
def test_eight_devices_write_what_one_writes(mesh):
  assert_same(generate(PROMPTS, mesh=mesh, chunk_len=4), sampled())
  # There too, samples take each other's places.
  made = generate(PROMPTS * 3, mesh=mesh, chunk_len=4)
  assert_same(made, jax.tree.map(
      lambda x: np.concatenate([x] * 3), sampled()))


def test_fewer_prompts_than_devices_are_written_by_all_of_them():
  # Four prompts over eight devices: those along `seq` share each prompt.
  made = generate(PROMPTS[:4], mesh='fsdp=2,seq=4', prompts_at_once=4)
  assert_same(made, jax.tree.map(lambda x: x[:4], sampled()))
  # A length that does not divide over them is filled up.
  made = generate(
      PROMPTS[:4], mesh='fsdp=2,seq=4', prompts_at_once=4, bucket=19)
  assert_same(made, jax.tree.map(lambda x: x[:4], sampled()))


def test_keys_of_prompts_are_distinct_and_their_own():
  numbered = [
      types.Prompt(example=PROMPTS[0].example, tokens=(1,), number=n)
      for n in (3, 2**31, 3)]
  keys = engine.prompt_keys(jax.random.key(0), numbered)
  np.testing.assert_array_equal(keys[0], keys[2])
  assert (keys[0] != keys[1]).any()
  assert (keys != engine.prompt_keys(jax.random.key(1), numbered)).any()


@pytest.mark.parametrize('least', [4, MAX_LEN - 1])
def test_no_response_stops_before_it_is_long_enough(least):
  free = sampled()
  assert (free.lengths < least).any()
  made = engine.Engine(
      model=tiny_model.MODEL, stop_ids=STOP_IDS, compute=COMPUTE,
      sampler=decode.SamplerConfig(
          max_response_len=MAX_LEN, min_response_len=least),
      engine=make().config, rules=tiny_model.rules()).sample(
          tiny_model.params(), PROMPTS, jax.random.key(0),
          num_samples=NUM_SAMPLES)
  assert made.lengths.min() == least
  # Until then, what would have been drawn is drawn, and its scores hold.
  for i in np.ndindex(*free.lengths.shape):
    same = min(free.lengths[i] - 1, made.lengths[i])
    np.testing.assert_array_equal(
        made.tokens[i][:same], free.tokens[i][:same])
    np.testing.assert_allclose(
        made.logprobs[i][:same], free.logprobs[i][:same], rtol=0, atol=1e-6)
  assert made.is_finished.any()


def test_responses_may_have_caps_of_their_own():
  caps = np.random.default_rng(0).integers(1, MAX_LEN + 1, (8, NUM_SAMPLES))
  made = make(prompts_at_once=2, samples_at_once=4)
  session = made.session(tiny_model.params())
  got = session.sample(
      PROMPTS, engine.prompt_keys(jax.random.key(0), PROMPTS),
      num_samples=NUM_SAMPLES, max_lens=caps)
  np.testing.assert_array_equal(
      got.lengths, np.minimum(caps, sampled().lengths))
  for i in np.ndindex(*caps.shape):
    length = got.lengths[i]
    np.testing.assert_array_equal(
        got.tokens[i][:length], sampled().tokens[i][:length])


@pytest.mark.parametrize('field, value, message', [
    ('temperature', -0.1, 'sampler.temperature=-0.1'),
    ('top_p', 0.0, 'sampler.top_p=0.0'),
    ('top_p', 1.1, 'sampler.top_p=1.1'),
    ('max_response_len', 0, 'sampler.max_response_len=0'),
    ('top_k', -1, 'sampler.top_k=-1'),
    ('min_response_len', 65, 'sampler.min_response_len=65'),
])
def test_impossible_samplers_are_refused(field, value, message):
  with pytest.raises(types.UserError, match=message):
    decode.SamplerConfig(**{field: value})

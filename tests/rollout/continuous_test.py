"""Tests for longjax.rollout.continuous, through `engine.Session`."""

import dataclasses
import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from longjax import types
from longjax.model import architecture, compute, parameters
from longjax.parallel import rules as rules_lib
from longjax.rl import batch
from longjax.rollout import continuous, decode, engine
from longjax.train import step
from tests import tiny_model
from tests.rollout import pretended

NUM_SAMPLES, MAX_LEN, BUCKET = 3, 10, 16
COMPUTE = compute.Compute(attention='reference')
STOP_IDS = (5, 17, 40, 41, 42)
PROMPTS = tiny_model.prompts([4, 1, 16, 9, 2, 12])
MOE = dataclasses.replace(
    tiny_model.MODEL, ffn_dim=16,
    moe=architecture.MoeConfig(num_experts=8, num_active=3))
MODELS = {'dense': tiny_model.MODEL, 'moe': MOE}
# Lanes, fewer than prompts; on the second mesh four devices share each.
MESHES = {'one': ({}, 3), 'fsdp=2,seq=4': (dict(fsdp=2, seq=4), 4),
          'data=8': (dict(data=8), 8)}


@pytest.fixture(autouse=True)
def short_calls(monkeypatch):
  """Few tokens a call, so that there are many."""
  monkeypatch.setattr(engine, '_MAX_STEPS', 3)
  monkeypatch.setattr(engine, '_STREAM_STEPS', 2)


@functools.cache
def make(model='dense', mesh='one', bucket=BUCKET, chunk_len=4, num_lanes=0):
  """An engine; one for all tests that ask for the same."""
  sizes, lanes = MESHES[mesh]
  return engine.Engine(
      model=MODELS[model], stop_ids=STOP_IDS, compute=COMPUTE,
      sampler=decode.SamplerConfig(max_response_len=MAX_LEN),
      engine=engine.EngineConfig(
          prompt_buckets=(bucket,), prompts_at_once=num_lanes or lanes,
          samples_per_prompt=NUM_SAMPLES, samples_at_once=8,
          chunk_len=chunk_len),
      rules=tiny_model.rules(**sizes), record_experts=model == 'moe')


@functools.cache
def placed_params(model='dense', mesh='one', seed=0):
  params = tiny_model.params(seed, MODELS[model])
  rules = tiny_model.rules(**MESHES[mesh][0])
  return jax.device_put(params, rules.tree_shardings(
      parameters.axes(MODELS[model]), params))


def session(model='dense', mesh='one', seed=0, **how):
  return make(model, mesh, **how).session(placed_params(model, mesh, seed))


def draw(made, prompts=PROMPTS, seed=0, num_samples=NUM_SAMPLES, **how):
  """Samples of a session."""
  return made.sample(
      prompts, engine.prompt_keys(jax.random.key(seed), prompts),
      num_samples=num_samples, **how)


def assert_same(got, want):
  """The same tokens, and scores up to the order of sums."""
  for name in ('tokens', 'lengths', 'is_finished', 'expert_ids'):
    np.testing.assert_array_equal(
        getattr(got, name), getattr(want, name), err_msg=name)
  for name in ('logprobs', 'entropy', 'entropy_t1'):
    np.testing.assert_allclose(
        getattr(got, name), getattr(want, name), rtol=0, atol=1e-5,
        err_msg=name)


def prompts_of(texts):
  """Prompts of these tokens."""
  example = PROMPTS[0].example
  return [types.Prompt(example=example, tokens=tuple(text), number=i)
          for i, text in enumerate(texts)]


class Texts:
  """What `ContinuousBatch` hands out, put together and looked at."""

  def __init__(self, prompts, lengths):
    self.prompts = prompts
    self.lengths = lengths
    self.num_done = np.zeros(lengths.shape, int)
    self.is_stopped = np.zeros(lengths.shape, bool)

  def add(self, piece, caps):
    at = piece.prompt, piece.sample
    assert not self.is_stopped[at]
    assert piece.first == self.num_done[at]
    new = slice(piece.first, piece.first + piece.tokens.size)
    assert new.stop > new.start
    text = pretended.response(*at, self.lengths[at])
    np.testing.assert_array_equal(piece.tokens, text[new])
    np.testing.assert_array_equal(piece.logprobs, -0.5 * text[new])
    np.testing.assert_array_equal(piece.entropy, 0.25 * text[new])
    np.testing.assert_array_equal(piece.entropy_t1, 0.125 * text[new])
    prompt = self.prompts[piece.prompt]
    np.testing.assert_array_equal(
        piece.expert_ids[:, 0, 0], np.array([prompt[-1], *text])[new])
    if piece.first:
      assert piece.prompt_expert_ids is None
    elif len(prompt) > 1:
      np.testing.assert_array_equal(
          piece.prompt_expert_ids[:len(prompt) - 1, 0, 0], prompt[:-1])
    self.num_done[at] = new.stop
    self.is_stopped[at] = piece.is_stopped
    assert piece.is_stopped == (new.stop == self.lengths[at])
    assert piece.is_last == (new.stop == min(self.lengths[at], caps[at]))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_every_sample_reads_and_writes_its_own_whatever_is_cut(seed):
  rng = np.random.default_rng(seed)
  num_prompts, num_samples = rng.integers(1, 8), rng.integers(1, 5)
  num_shards, chunk_len, lane_len = rng.integers(1, 4), rng.integers(1, 4), 12
  lengths = rng.integers(1, 9, (num_prompts, num_samples))
  prompts = []
  for _ in range(num_prompts):  # Many begin alike.
    prompts.append([1] * int(rng.integers(1, lane_len + 2)))
    prompts[-1][rng.integers(len(prompts[-1])):] = [int(rng.integers(2, 5))]
  # Most chunk lengths are refused by `engine.programs` for such lanes.
  lane_len = -(-lane_len // int(chunk_len)) * int(chunk_len)
  devices = pretended.Jitted(
      prompts=prompts, lengths=lengths, num_shards=int(num_shards),
      chunk_len=int(chunk_len), lane_len=lane_len,
      max_steps=int(rng.integers(1, 5)))
  stats = continuous.Stats()

  def batch():
    return continuous.ContinuousBatch(
        devices, {}, num_lanes=int(num_shards * sizes[0]),
        num_slots=int(num_shards * sizes[1]), num_seats=int(sizes[2]),
        stats=stats)

  sizes = rng.integers(1, 5, 3)
  made, texts, num_written = batch(), Texts(prompts, lengths), 0
  while not texts.is_stopped.all():
    # Caps of their own, below what some have already.
    caps = rng.integers(0, 2 * lengths.max(), lengths.shape)
    caps = np.where(texts.is_stopped, lengths, caps)
    requests = [
        pretended.request(p, prompt, caps[p].tolist(), texts.num_done[p])
        for p, prompt in enumerate(prompts)]
    running = made.run(requests, max_steps=devices.programs.max_steps)
    for pieces in running:
      for piece in pieces:
        texts.add(piece, caps)
        num_written += piece.tokens.size
      if not rng.integers(4):
        running.close()
    # Another session, with empty caches, or the same one.
    made = batch() if not rng.integers(3) else made
  assert num_written == stats.written_tokens == lengths.sum()
  assert stats.prompt_tokens - stats.reused_tokens == devices.num_read


def test_no_two_iterators_share_a_session():
  made = session()
  stream = made.generate(
      PROMPTS, engine.prompt_keys(jax.random.key(0), PROMPTS))
  next(stream)
  with pytest.raises(ValueError, match='exhaust it or close it'):
    draw(made)
  stream.close()
  assert_same(draw(made), draw(session()))


def test_tokens_are_handed_out_as_they_are_written():
  want = draw(session())
  stream = list(session().generate(
      PROMPTS, engine.prompt_keys(jax.random.key(0), PROMPTS),
      num_samples=NUM_SAMPLES))
  num_seen = np.zeros(want.lengths.shape, int)
  for token in stream:
    at = token.prompt, token.sample
    assert token.token == want.tokens[at][num_seen[at]]
    np.testing.assert_allclose(
        token.logprob, want.logprobs[at][num_seen[at]], rtol=0, atol=1e-5)
    num_seen[at] += 1
    assert token.is_last == (num_seen[at] == want.lengths[at])
    assert token.is_stop == (token.is_last and want.is_finished[at])
  np.testing.assert_array_equal(num_seen, want.lengths)
  # Not one sample after another: two tokens of each, then the next two.
  begun = {(token.prompt, token.sample) for token in stream[:2 * 8]}
  assert len(begun) >= 8


@pytest.mark.parametrize('mesh', MESHES)
def test_steady_state_compiles_nothing(mesh):
  made, params = make(mesh=mesh), placed_params(mesh=mesh)
  shared = tuple(range(50, 60))
  first = prompts_of([
      (*shared, 1), (*shared, 2), (*shared, 3, 4), (1,), (2, 3), *(
          prompt.tokens for prompt in PROMPTS)] * 2)

  def train_step(prompts, seed):
    policy = made.session(params)
    cut = draw(policy, prompts, seed=seed, should_cut=lambda rollouts: True)
    draw(policy, prompts, seed=seed, begun=cut)
    return policy.stats

  assert train_step(first, seed=0).reused_tokens > 0
  num_programs = made.num_programs()
  # Prepare, allocate, fill with one chunk and with many, copy, resume, write.
  assert num_programs <= 7
  for seed, lengths in enumerate([[3], [16] * 20, [1, 1, 7, 15], [2] * 5]):
    prompts = tiny_model.prompts(lengths, seed=seed)
    train_step(prompts, seed)
    train_step([*first[4:7], *prompts], seed)
    assert made.num_programs() == num_programs


def num_cuts(model, mesh):
  """How often `should_cut` is asked."""
  asked = []
  draw(session(model, mesh), should_cut=lambda _: asked.append(0))
  return len(asked)


def cut_after(made, num_calls, **how):
  """What there is after so many calls."""
  asked = []
  return draw(
      made, should_cut=lambda _: asked.append(0) or len(asked) == num_calls,
      **how)


def is_unfinished(rollouts):
  return ~rollouts.is_finished & (rollouts.lengths < MAX_LEN)


@functools.cache
def uncut(model='dense'):
  return draw(session(model))


@pytest.mark.parametrize('model, mesh', [
    ('dense', 'one'), ('moe', 'one'), ('dense', 'fsdp=2,seq=4'),
    ('dense', 'data=8')])
def test_a_call_that_was_cut_goes_on_as_if_it_had_not_been(model, mesh):
  want = uncut(model)
  last = num_cuts(model, mesh)
  assert last > 4
  num_resumed = 0
  for num_calls in range(1, last + 1):
    cut = cut_after(session(model, mesh), num_calls)
    given = jax.tree.map(np.copy, cut)
    num_resumed += (is_unfinished(cut) & (cut.lengths > 0)).sum()
    got = draw(session(model, mesh), begun=cut)
    assert_same(got, want)
    jax.tree.map(np.testing.assert_array_equal, cut, given)
    # Who had ended is not touched, to the last bit.
    kept = ~is_unfinished(cut)
    for name in ('tokens', 'lengths', 'logprobs', 'entropy', 'entropy_t1'):
      np.testing.assert_array_equal(
          getattr(got, name)[kept], getattr(cut, name)[kept])
  assert num_resumed > 10 and not is_unfinished(cut).any()


@pytest.mark.parametrize('model, mesh', [
    ('moe', 'one'), ('dense', 'fsdp=2,seq=4')])
def test_it_may_be_cut_after_every_call(model, mesh):
  # The same caches, and others.
  for sessions in ([session(model, mesh)], [
      session(model, mesh) for _ in range(2)]):
    rollouts, turns = None, 0
    while rollouts is None or is_unfinished(rollouts).any():
      rollouts = cut_after(
          sessions[turns % len(sessions)], 1, begun=rollouts)
      turns += 1
    assert turns > 4
    assert_same(rollouts, uncut(model))


def test_who_reached_a_cap_goes_on_when_it_is_raised():
  policy = session()
  short = draw(policy, max_lens=np.full((len(PROMPTS), NUM_SAMPLES), 4))
  assert short.lengths.max() == 4 and is_unfinished(short).any()
  assert_same(draw(policy, begun=short), uncut())


@pytest.mark.parametrize('model', MODELS)
def test_after_an_update_the_rest_is_written_by_the_new_parameters(model):
  old = cut_after(session(model), 3)
  new = draw(session(model, seed=1), begun=old)
  rows = tiny_model.repeated(PROMPTS, new, row_len=BUCKET + MAX_LEN)
  score = jax.jit(functools.partial(
      step.token_scores, config=MODELS[model], temperature=1.0,
      rules=tiny_model.rules(), compute=COMPUTE))
  scores = score(placed_params(model, seed=1), rows).head
  num_new = 0
  for name in ('tokens', 'logprobs', 'entropy', 'entropy_t1'):
    of_rows = None if name == 'tokens' else batch.unpack(
        [np.asarray(getattr(scores, name))], [rows],
        num_responses=new.lengths.size, max_response_len=MAX_LEN
    ).reshape(new.tokens.shape)
    for at in np.ndindex(*new.lengths.shape):
      first, length = old.lengths[at], new.lengths[at]
      got = getattr(new, name)[at]
      np.testing.assert_array_equal(
          got[:first], getattr(old, name)[at][:first])
      if of_rows is None:
        continue
      np.testing.assert_allclose(
          got[first:length], of_rows[at][first:length], rtol=0, atol=1e-5,
          err_msg=name)
      num_new += length - first
  assert num_new > 100
  assert (new.tokens != uncut(model).tokens).any()


def common_chunks(texts, chunk_len):
  """What of each text stands in one of those before it, in whole chunks.

  The last token is left out: it is read by the samples.
  """
  total = 0
  for i, text in enumerate(texts):
    most = 0
    for earlier in texts[:i]:
      n = 0
      while n < min(len(text), len(earlier)) - 1 and text[n] == earlier[n]:
        n += 1
      most = max(most, n // chunk_len * chunk_len)
    total += most
  return total


def long_session(chunk_len):
  """Lanes for all, of 63 tokens."""
  return session(bucket=64, chunk_len=chunk_len, num_lanes=8)


def test_questions_about_one_document_read_it_once():
  rng = np.random.default_rng(0)
  documents = rng.integers(1, 96, (2, 30)).tolist()
  texts = [
      documents[i][:length] + rng.integers(1, 96, num_asked).tolist()
      for i, length, num_asked in [
          (0, 30, 4), (1, 30, 7), (0, 30, 2), (0, 11, 5), (1, 30, 1),
          (1, 12, 3), (0, 30, 9)]]
  texts.append(texts[0])  # The same once more.
  prompts = prompts_of(texts)
  reusing, reading = long_session(4), long_session(63)
  assert_same(draw(reusing, prompts), draw(reading, prompts))
  assert reading.stats.reused_tokens == 0
  want = common_chunks(texts, 4)
  assert reusing.stats.reused_tokens == want > 100
  num_tokens = sum(len(text) - 1 for text in texts)
  assert reusing.stats.prompt_tokens == num_tokens
  # Asked again, everything is there but for what fills no chunk.
  draw(reusing, prompts)
  assert reusing.stats.reused_tokens == want + sum(
      (len(text) - 1) // 4 * 4 for text in texts)


def test_conversations_are_read_on_where_they_stand_and_take_no_more_memory():
  rng = np.random.default_rng(1)
  talks = rng.integers(1, 96, (4, 5)).tolist()
  policy, seen, num_bytes = long_session(4), [], set()
  for turn in range(4):
    prompts = prompts_of(talks)
    answers = draw(policy, prompts, seed=turn)
    assert_same(answers, draw(long_session(63), prompts, seed=turn))
    seen += [list(talk) for talk in talks]
    assert policy.stats.reused_tokens == common_chunks(seen, 4)
    for i, talk in enumerate(talks):
      talk += answers.tokens[i, 0, :answers.lengths[i, 0]].tolist()
      talk += rng.integers(1, 96, 3).tolist()
    num_bytes.add(sum(x.nbytes for x in jax.live_arrays()))
  assert policy.stats.metrics()['sampler/prefix_hits'] > 0.5
  assert len(num_bytes) == 1


def test_devices_that_share_a_lane_copy_it_in_their_parts():
  shared = list(range(50, 60))
  prompts = prompts_of(
      [[*shared, i, *range(1, 1 + i)] for i in range(5)] + [shared] * 3)
  policy = session(mesh='fsdp=2,seq=4')
  got = draw(policy, prompts)
  assert policy.stats.reused_tokens > 30
  assert_same(got, draw(long_session(63), prompts))


@functools.cache
def compiled_sizes(num_seats, dtype='float32'):
  """Bytes of caches and of the program that writes; four long lanes."""
  num_lanes, lane_len = 4, 512
  model = dataclasses.replace(
      tiny_model.MODEL, head_dim=64, num_heads=2, num_kv_heads=2)
  config = engine.EngineConfig(
      prompt_buckets=(lane_len + 1,), prompts_at_once=num_lanes,
      samples_per_prompt=num_seats)
  jitted = continuous.Jitted(engine.programs(
      config, lane_len + 1, config=model, stop_ids=(5,),
      sampler=decode.SamplerConfig(max_response_len=MAX_LEN),
      compute=compute.Compute(dtype=dtype),
      rules=rules_lib.for_sampler(tiny_model.rules(), num_lanes)))
  num_slots = num_lanes * num_seats
  allocate = jitted.allocate.lower(num_lanes, num_slots).compile()
  params = jax.eval_shape(
      jitted.programs.prepare, tiny_model.params(model=model))
  caches = jax.eval_shape(
      lambda: jitted.programs.allocate(num_lanes, num_slots))
  write = jitted.write.lower(
      params, *caches, np.int32(0),
      continuous._nobody(num_lanes, num_slots, num_seats), np.int32(1),
      np.int32(0)).compile()
  addresses = 8 * len(jax.tree.leaves(caches))
  a_token = 2 * 2 * 64 * jax.numpy.dtype(dtype).itemsize  # Of one layer.
  return dict(
      caches=allocate.memory_analysis().output_size_in_bytes - addresses,
      lanes=model.num_layers * a_token * num_lanes * lane_len,
      slots=model.num_layers * a_token * num_slots * MAX_LEN,
      in_place=write.memory_analysis().alias_size_in_bytes,
      temporary=write.memory_analysis().temp_size_in_bytes)


@pytest.mark.parametrize('num_seats, dtype', [
    (2, 'float32'), (8, 'float32'), (8, 'bfloat16')])
def test_a_prompt_is_held_once_and_each_sample_what_it_wrote(num_seats, dtype):
  sizes = compiled_sizes(num_seats, dtype)
  # 2 L K H (P S + M R) numbers.
  assert sizes['caches'] == sizes['lanes'] + sizes['slots']
  assert sizes['in_place'] == sizes['slots']


def test_more_samples_of_a_prompt_do_not_copy_it():
  few, many = (compiled_sizes(num_seats) for num_seats in (2, 8))
  more = many['temporary'] - few['temporary'] - (
      many['slots'] - few['slots'])
  # Six more copies of one layer's lanes would be three times all lanes.
  assert more < few['lanes'] / 4

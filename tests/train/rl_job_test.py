"""Tests for longjax.train.rl_job; `shared_prefix_test` has its gradients."""

import dataclasses
import functools
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import types
from longjax.data import turns
from longjax.model import architecture, compute
from longjax.rl import batch, entropy_control
from longjax.rl import loss as loss_lib
from longjax.rollout import decode
from longjax.train import graded as graded_lib
from longjax.train import (
    kept_rollouts,
    rl_job,
    rl_stage,
    run_state,
    sampling,
)
from longjax.train import optimizer as optimizer_lib
from tests import tiny_model

NUM_SAMPLES = 3


class LetterTokenizer:
  """A token a character; the vocabulary of `tiny_model` has room for it."""

  stop_ids = (2,)
  turns = turns.COMPACT

  def encode(self, text):
    return [8 + ord(c) % 80 for c in text]

  def encode_template(self, text):
    names = ('<|im_start|>', '<|im_end|>', '<think>', '</think>')
    return turns.encode(
        text, special={name: 1 + i for i, name in enumerate(names)},
        encode_text=self.encode)

  def decode(self, ids):
    return ' '.join(map(str, ids))

class Kept(list):
  """A rollout writer that remembers what it is given."""

  def write(self, global_step, stage, example, samples, **kwargs):
    self.append((global_step, stage, example.task, samples, kwargs))


EXAMPLES = [
    types.TaskExample(
        id=f'example {i}', task=('mc', 'qa')[i % 2], kind='qa',
        documents=(types.Document(title='', text='x' * (1 + i % 5)),),
        question='?', answers=('yes',))
    for i in range(20)]


class Grader:
  """Rewards an even first token, or nothing at all if it is stingy."""

  is_stingy = False

  def __call__(self, example, text, *, is_finished):
    is_even = bool(text) and int(text.split()[0]) % 2 == 0
    return types.Score(
        reward=float(is_even and not self.is_stingy), answer='', rule='test')


def stage(**overrides):
  return tiny_model.rl_stage(**dict(
      num_prompts=8, num_samples=NUM_SAMPLES, max_prompt_len=40,
      row_lens=(64, 96), rollouts_every=1,
      sampler=decode.SamplerConfig(temperature=0.9, max_response_len=6),
      loss=loss_lib.LossConfig()) | overrides)


def context(tokenizer=None, model=tiny_model.MODEL, **mesh):
  unused = dict.fromkeys(
      ('workdir', 'metrics', 'checkpointer', 'stop'))
  return run_state.Context(
      **unused, seed=0, rules=tiny_model.rules(**mesh),
      tokenizer=tokenizer or LetterTokenizer(), model=model,
      compute=compute.Compute(attention='reference'), checkpoint_every=1,
      max_skipped_in_a_row=3, rollouts=Kept())


@functools.cache
def job_of(name, **mesh):
  """A job and what it was made of; compiled once for all tests."""
  made = stage() if name == 'on_policy' else stage(
      num_minibatches=2, num_epochs=2, shuffle_rewards=True,
      loss=loss_lib.LossConfig(objective='off_policy', tis_cap=2.0),
      # Entropy is always above this band.
      aepo=entropy_control.AepoConfig(
          entropy_low=0.1, entropy_high=0.2, baseline_steps=9))
  where, grader = context(**mesh), Grader()
  return rl_job.RlJob(
      where, made, examples=EXAMPLES, score=grader), where, grader


def test_a_mixture_of_experts_trains_on_the_samplers_routes():
  model = dataclasses.replace(
      tiny_model.MODEL, ffn_dim=16,
      moe=architecture.MoeConfig(num_experts=4, num_active=2))
  where = dataclasses.replace(context(), model=model)
  job = rl_job.RlJob(
      where, stage(replay_experts=True), examples=EXAMPLES, score=Grader())
  state = run_state.fresh(
      tiny_model.params(model=model),
      optimizer_lib.make(stage().optimizer, num_steps=4), where)
  graded = job.rollout(state.train.params, 0)
  [packed] = job._minibatches(graded)
  assert all(part.expert_ids.shape[2:] == (model.num_layers, 2)
             for part in packed.micro_batches)
  for i in range(2):
    result = job.step(state, i, i + 1)
    state, values = result.state, jax.device_get(dict(result.values))
    assert values['gap/logprob_max'] < 1e-4
    assert 1.0 <= values['moe/max_load'] <= 4.0
    assert 0.0 <= values['moe/idle'] < 1.0
  with pytest.raises(types.UserError, match='replay_experts=True needs'):
    rl_stage.check(stage(replay_experts=True), context())


def fresh(where):
  optimizer = optimizer_lib.make(stage().optimizer, num_steps=4)
  return run_state.fresh(tiny_model.params(), optimizer, where)


def num_programs(job):
  return {
      'sample': job.engine.num_programs(), 'plan': batch.plan._cache_size(),
      'score': job._score_rows._cache_size(),
      'gradient': job._update.accumulate._cache_size(),
      'apply': job._update.apply._cache_size()}


@pytest.mark.parametrize('mesh', ['', 'data=2,fsdp=4'])
def test_after_the_first_step_nothing_is_compiled(mesh):
  job, where, _ = job_of(
      'on_policy', **(dict(data=2, fsdp=4) if mesh else {}))
  state, plans = fresh(where), None
  for i in range(4):
    result = job.step(state, i, i + 1)
    state = result.state
    values = jax.device_get(dict(result.values))
    plans = plans or batch.plan._cache_size()
    made = num_programs(job)
    # One a row length that occurred, however many rows there were.
    num_lens = made['gradient']
    assert num_lens <= len(stage().row_lens)
    assert made == dict(
        # Of the sampler: prepare, allocate, fill and write.
        sample=4, score=num_lens, gradient=num_lens, apply=1, plan=plans)
    # The sampler and the trainer agree, so ratios of the first update are 1.
    assert values['gap/logprob_max'] < 1e-4
    assert values['grad_norm'] > 0.0 and values['skipped'] == 0
    assert 0.0 < values['reward/mean'] < 1.0
    assert 0.0 <= values['padding'] < 1.0
    assert values['padding/repeated_prefix'] == 0.0
    assert not values['aepo/skipped_steps']
    # Both tasks have four prompts a batch.
    np.testing.assert_allclose(
        (values['entropy_by_task/mc'] + values['entropy_by_task/qa']) / 2,
        values['entropy/seq_mean'], rtol=1e-5)
  assert int(state.train.step) == 4
  # One prompt's responses a step were kept to read, tasks taking turns.
  assert [kept[:3] for kept in where.rollouts] == [
      (i + 1, 'rl', ('mc', 'qa')[i % 2]) for i in range(4)]
  assert all(len(kept[3]) == NUM_SAMPLES for kept in where.rollouts)


def test_a_step_repeats_itself():
  job, where, _ = job_of('on_policy')
  outcomes = []
  for _ in range(2):
    result = job.step(fresh(where), 5, 6)
    outcomes.append(jax.device_get((result.state, dict(result.values))))
  jax.tree.map(np.testing.assert_array_equal, *outcomes)


def test_off_policy_updates_run_over_minibatches_and_epochs():
  job, where, _ = job_of('off_policy')
  result = job.step(fresh(where), 0, 1)
  assert int(result.state.train.step) == 4
  # The last update's policy is no longer the one that sampled.
  assert abs(float(result.values['ratio/mean']) - 1.0) > 1e-5
  graded = job.rollout(result.state.train.params, 0)
  seen = [
      set().union(*(set(part.trajectory[part.loss_mask])
                    for part in packed.micro_batches))
      for packed in job._minibatches(graded)]
  assert seen == [set(range(12)), set(range(12, 24))]


class Spy:
  """An update that notes what it is given."""

  def __init__(self, update):
    self.update, self.extras, self.applied = update, [], []

  def __call__(self, state, micro_batches, extras, is_applied):
    self.extras.append(extras)
    self.applied.append(bool(is_applied))
    return self.update(state, micro_batches, extras, is_applied)


@pytest.mark.parametrize('source', ['sampler', 'trainer_forward'])
def test_the_samplers_scores_replace_a_pass_and_aepo_still_decides_first(
    source):
  where, grader = context(), Grader()
  job = rl_job.RlJob(
      where, stage(
          num_minibatches=2, num_epochs=2, entropy_source=source,
          loss=loss_lib.LossConfig(objective='off_policy'),
          # Entropy is always above this band.
          aepo=entropy_control.AepoConfig(
              entropy_low=0.1, entropy_high=0.2, baseline_steps=9)),
      examples=EXAMPLES, score=grader)
  job._update = spy = Spy(job._update)
  graded = graded_lib.to_train(
      job.rollout(fresh(where).train.params, 0), job._stage, seed=0, step=0)
  result = job.step(fresh(where), 0, 1)
  is_scored = source == 'trainer_forward'
  assert bool(job._score_rows._cache_size()) == is_scored

  # All updates of the batch measure themselves by the policy that sampled.
  sampled = graded.sampled.rollouts.logprobs.reshape(24, -1)
  for extras in spy.extras:
    np.testing.assert_allclose(extras['old_logprobs'], sampled, atol=1e-4)
    assert np.array_equal(extras['old_logprobs'], sampled) != is_scored
  rollouts = graded.sampled.rollouts
  want = rollouts.entropy.sum(axis=2) / rollouts.lengths
  np.testing.assert_allclose(
      result.values['entropy/seq_mean'], want.mean(), rtol=1e-4)

  # This batch's entropy decided this batch's updates: no failure is learnt.
  assert int(result.state.aepo.mode) == entropy_control.Mode.POS
  weights = np.asarray(spy.extras[0]['token_weights'])
  fails = graded.rewards == 0.0
  assert fails.any() and not weights[fails].any() and weights[~fails].any()
  grader.is_stingy = True
  job.step(fresh(where), 0, 1)
  assert spy.applied[-4:] == [False] * 4


def test_what_an_older_policy_began_is_scored_whatever_the_config_says():
  where = context()
  job = rl_job.RlJob(
      where, stage(entropy_source='sampler'), examples=EXAMPLES,
      score=Grader())
  older = fresh(where).train.params
  newer = jax.tree.map(lambda x: 1.1 * x, older)
  graded = job.rollout(older, 0)
  packed = job._minibatches(graded)
  trusted = job._measure(newer, graded, packed)
  assert not job._score_rows._cache_size()
  stale = dataclasses.replace(graded, sampled=dataclasses.replace(
      graded.sampled, metrics={'partial/old_tokens': 0.25}))
  scored = job._measure(newer, stale, packed)
  for name, given, told in zip(
      ('entropy', 'entropy_t1', 'logprobs'), trusted, scored, strict=True):
    by_sampler = getattr(graded.sampled.rollouts, name).reshape(24, -1)
    np.testing.assert_array_equal(given, by_sampler)
    assert np.abs(told - by_sampler).max() > 1e-3
  # They are what the trainer's own pass says.
  for told, want in zip(job._measure(older, stale, packed), trusted):
    np.testing.assert_allclose(told, want, atol=1e-4)


def test_a_bad_update_is_told_even_if_the_next_is_good(monkeypatch):
  job, where, _ = job_of('off_policy')
  update, in_a_row = job._update, iter([0, 1, 2, 0])

  def spoilt(*args):
    train, values = update(*args)
    return train, values | {'skipped_in_a_row': jnp.int32(next(in_a_row))}

  monkeypatch.setattr(job, '_update', spoilt)
  values = job.step(fresh(where), 0, 1).values
  assert int(values['skipped_in_a_row']) == 2


def test_a_batch_without_a_positive_response_in_pos_mode_is_skipped():
  job, where, grader = job_of('off_policy')
  grader.is_stingy = True
  result = job.step(fresh(where), 0, 1)
  grader.is_stingy = False
  assert int(result.state.aepo.mode) == entropy_control.Mode.POS
  jax.tree.map(
      np.testing.assert_array_equal, jax.device_get(result.state.train.params),
      tiny_model.params())
  assert int(result.state.train.num_skipped) == 0
  assert result.values['aepo/skipped_steps']


def sampled(examples, texts=()):
  """Rollouts of any text to prompts of these examples."""
  return sampling.Sampled(
      prompts=[types.Prompt(example=e, tokens=(1, 2), number=0)
               for e in examples],
      example=np.arange(len(examples)),
      rollouts=tiny_model.rollouts(len(examples), NUM_SAMPLES, 6),
      texts=texts, groups=[])


def test_a_batch_without_the_task_whose_turn_it_is_shows_another():
  where = context()
  example = EXAMPLES[1]
  assert example.task == 'qa'  # The first turn is that of 'mc'.
  graded = graded_lib.Graded(
      sampled=sampled([example], texts=['a', 'b', 'c']),
      scores=[types.Score(reward=0.0, answer='', rule='test')] * NUM_SAMPLES,
      rewards=np.zeros(NUM_SAMPLES, np.float32))
  plan = python_types.SimpleNamespace(
      advantages=np.zeros(NUM_SAMPLES), keep=np.ones(NUM_SAMPLES, bool))
  kept_rollouts.write(
      where, graded, plan, asked=graded, name='rl', tasks=['mc', 'qa'], turn=0,
      global_step=1)
  assert [kept[:3] for kept in where.rollouts] == [(1, 'rl', 'qa')]


def test_dense_and_binary_rewards_of_a_task_have_deviations_of_their_own():
  examples = [
      dataclasses.replace(e, task='mixed', kind=('qa', 'mrcr')[i % 2])
      for i, e in enumerate(EXAMPLES)]
  job = rl_job.RlJob(context(), stage(), examples=examples, score=Grader())
  rng = np.random.default_rng(0)
  scale = np.repeat([1.0, 0.01], 3 * NUM_SAMPLES)
  rewards = (rng.random(6 * NUM_SAMPLES) * scale).astype(np.float32)
  chosen = [examples[i] for i in (0, 2, 4, 1, 3, 5)]
  graded = graded_lib.Graded(
      sampled=sampled(chosen), scores=[], rewards=rewards)
  entropy = np.ones((6 * NUM_SAMPLES, 6), np.float32)
  got = job.plan(entropy_control.init(), graded, entropy, entropy).advantages
  by_group = rewards.astype(np.float64).reshape(2, 3, NUM_SAMPLES)
  centered = by_group - by_group.mean(axis=2, keepdims=True)
  deviation = by_group.reshape(2, -1).std(axis=1, ddof=1)
  want = centered / (deviation[:, None, None] + 1e-6)
  np.testing.assert_allclose(got, want.reshape(-1), rtol=1e-4)


def test_prompts_sampled_in_parts_are_answered_alike():
  job, where, _ = job_of('on_policy')
  params = fresh(where).train.params
  parted = rl_job.RlJob(
      where, stage(prompts_at_once=2), examples=EXAMPLES, score=Grader())
  assert parted.rollout(params, 0).sampled.texts == job.rollout(
      params, 0).sampled.texts


def test_shuffled_rewards_are_the_same_rewards_elsewhere():
  job, where, _ = job_of('on_policy')
  plain = job.rollout(fresh(where).train.params, 0)
  shuffled = graded_lib.to_train(
      plain, stage(shuffle_rewards=True), seed=0, step=0)
  assert shuffled.sampled is plain.sampled
  assert [s.reward for s in shuffled.scores] == plain.rewards.tolist()
  assert (shuffled.rewards != plain.rewards).any()
  np.testing.assert_array_equal(
      np.sort(shuffled.rewards), np.sort(plain.rewards))


@pytest.mark.parametrize('overrides, message', [
    (dict(steps=0), 'rl.steps=0'),
    (dict(num_samples=1), 'num_samples=1'),
    (dict(num_minibatches=3), 'not a multiple of rl.num_minibatches=3'),
    (dict(rows_at_once=-1), 'rl.rows_at_once=-1 must be >= 0'),
    (dict(prompts_at_once=-1), 'rl.prompts_at_once=-1 must be >= 0'),
    (dict(row_lens=(16, 44)),
     r'rl.row_lens=\(16, 44\) cannot hold.*at least 45'),
    (dict(row_lens=(96, 64)), 'must be one or more lengths, increasing'),
    (dict(row_lens=(0, 96)), 'must be one or more lengths, increasing'),
    (dict(row_lens=()), 'must be one or more lengths, increasing'),
    (dict(sampler=decode.SamplerConfig(temperature=0.0, max_response_len=6)),
     'rl.sampler.temperature=0'),
    (dict(num_epochs=2), "rl.loss.objective='off_policy'"),
])
def test_impossible_stages_are_refused(overrides, message):
  with pytest.raises(types.UserError, match=message):
    stage(**overrides)


@pytest.mark.parametrize('overrides, message', [
    (dict(num_prompts=4), 'rl.num_prompts=4 does not divide over the 8 data'),
    (dict(prompts_at_once=4),
     'rl.prompts_at_once=4 does not divide over the 8 data'),
    (dict(rows_at_once=4),
     'rl.rows_at_once=4 does not divide over the 8 data.* multiple of 8'),
])
def test_batches_that_do_not_divide_over_the_mesh_are_refused(
    overrides, message):
  with pytest.raises(types.UserError, match=message):
    rl_stage.check(stage(**overrides), context(data=8))


def test_the_default_stage_is_the_recipes():
  made = {f.name: f.default for f in dataclasses.fields(rl_stage.RlStage)}
  assert (made['num_prompts'], made['num_samples']) == (128, 8)
  assert (made['num_minibatches'], made['num_epochs']) == (1, 1)

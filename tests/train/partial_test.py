"""Tests for longjax.train.partial, and of jobs that cut their steps short."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import rows, types
from longjax.data import prompt_stats
from longjax.model import compute, head, parameters, transformer
from longjax.rl import loss as loss_lib
from longjax.rollout import decode
from longjax.train import checkpoint, partial, rl_job, run_state
from longjax.train import optimizer as optimizer_lib
from tests import tiny_model
from tests.train import rl_job_test

MAX_LEN, NUM_PROMPTS, NUM_SAMPLES = 12, 4, 3


def stage(**overrides):
  return rl_job_test.stage(**dict(
      steps=9, num_prompts=NUM_PROMPTS, num_samples=NUM_SAMPLES,
      entropy_source='sampler', cut_tokens=24, samples_at_once=4,
      row_lens=(160,), loss=loss_lib.LossConfig(tis_cap=2.0),
      sampler=decode.SamplerConfig(
          temperature=0.9, max_response_len=MAX_LEN)) | overrides)


def job_of(**overrides):
  where, grader = rl_job_test.context(), rl_job_test.Grader()
  return rl_job.RlJob(
      where, stage(**overrides), examples=rl_job_test.EXAMPLES,
      score=grader), where


def fresh(where, **overrides):
  made = stage(**overrides)
  return run_state.fresh(
      tiny_model.params(), optimizer_lib.make(made.optimizer, num_steps=4),
      where, carried=made.carried())


def test_prompts_carried_over_come_first_and_are_not_drawn_again():
  carried = dataclasses.replace(
      partial.nothing(num_prompts=4, num_samples=2, max_response_len=3),
      num_drawn=np.asarray(5), example=np.int32([-1, 11, -1, 13]),
      born=np.int32([0, 2, 0, 1]))
  carried.rollouts.tokens[1], carried.rollouts.tokens[3] = 7, 8
  stream = [0, 0, 0, 0, 0, 13, 21, 11, 22, 23]
  drawn = partial.draw(carried, 3, stream.__getitem__)
  assert drawn.example.tolist() == [11, 13, 21, 22]
  assert drawn.born.tolist() == [2, 1, 3, 3]
  assert drawn.num_drawn == 9
  assert drawn.begun.tokens[:, 0, 0].tolist() == [7, 8, 0, 0]


def test_groups_are_trained_on_or_carried_over_as_a_whole():
  drawn = partial.Drawn(
      example=np.int32([5, 6, 7]), born=np.int32([1, 1, 2]), num_drawn=3)
  rollouts = tiny_model.rollouts(3, 2, 4)
  rollouts = dataclasses.replace(
      rollouts, lengths=np.int32([[2, 4], [3, 1], [4, 4]]),
      is_finished=np.array([[True, False], [False, True], [False, False]]))
  # A response at its cap has ended too.
  assert partial.is_complete(rollouts).tolist() == [True, False, True]
  trained, carried = partial.split(drawn, rollouts)
  assert trained.lengths.tolist() == [[2, 4], [0, 0], [4, 4]]
  assert carried.example.tolist() == [-1, 6, -1]
  assert carried.born.tolist() == [0, 1, 0]
  assert carried.rollouts.lengths.tolist() == [[0, 0], [3, 1], [0, 0]]
  for name in ('tokens', 'logprobs', 'entropy', 'entropy_t1', 'is_finished'):
    whole = getattr(rollouts, name)
    np.testing.assert_array_equal(
        getattr(carried.rollouts, name)[1], whole[1], err_msg=name)
    np.testing.assert_array_equal(
        getattr(trained, name)[[0, 2]], whole[[0, 2]], err_msg=name)
    assert not np.asarray(getattr(trained, name)[1]).any()


def test_with_one_policy_cut_responses_are_those_of_uncut_sampling():
  job, _ = job_of()
  whole, _ = job_of(cut_tokens=0)
  params, carried = tiny_model.params(), stage().carried()
  seen = {}
  for step in range(9):
    graded = job.rollout(params, step, carried)
    carried, lengths = graded.sampled.carried, graded.sampled.rollouts.lengths
    assert lengths.any(axis=1).sum() >= 1
    for p, prompt in enumerate(graded.sampled.prompts):
      if lengths[p].any():
        tokens = graded.sampled.rollouts.tokens[p].tolist()
        assert seen.setdefault(prompt.example.id, tokens) == tokens
  assert (carried.example >= 0).any()  # Something was cut.
  # The same prompts, drawn in the step in which each was born.
  graded = whole.rollout(params, 0)
  first = {p.example.id: t for p, t in zip(
      graded.sampled.prompts, graded.sampled.rollouts.tokens.tolist())}
  assert set(first) <= set(seen)
  for name, tokens in first.items():
    assert seen[name] == tokens


def test_old_tokens_keep_their_scores_and_new_ones_have_the_new_policys():
  job, _ = job_of()
  old, new = tiny_model.params(seed=0), tiny_model.params(seed=1)
  cut = job.rollout(old, 0, stage().carried()).sampled.carried
  held = np.flatnonzero(cut.example >= 0)
  begun = cut.rollouts.lengths[held]
  assert (begun > 0).any() and (begun < MAX_LEN).any()
  graded = job.rollout(new, 1, cut)
  both = [graded.sampled.rollouts, graded.sampled.carried.rollouts]
  num_new = 0
  for i, p in enumerate(held):
    now = next(r for r in both if r.lengths[i].any())
    prompt = graded.sampled.prompts[i]
    for g, first in np.ndenumerate(begun[i]):
      (g,) = g
      for name in ('tokens', 'logprobs', 'entropy'):
        np.testing.assert_array_equal(
            getattr(now, name)[i, g, :first],
            getattr(cut.rollouts, name)[p, g, :first])
      length = now.lengths[i, g]
      want = teacher_forced(
          new, prompt.tokens, now.tokens[i, g, :length])[first:]
      np.testing.assert_allclose(
          now.logprobs[i, g, first:length], want, rtol=0, atol=1e-5)
      num_new += len(want)
  assert num_new > 0
  stale = graded.sampled.metrics['partial/old_tokens']
  trained = graded.sampled.rollouts.lengths[:len(held)].any(axis=1)
  assert stale == pytest.approx(
      begun[trained].sum() / graded.sampled.rollouts.lengths.sum())


def teacher_forced(params, prompt, response):
  """Log-probabilities of a response by one pass over the plain sequence."""
  tokens = np.int32([[*prompt, *response]])
  position = np.arange(tokens.shape[1])[None]
  hidden = transformer.hidden_states(
      params, tokens, rows.TokenMeta(
          group=np.zeros_like(position), branch=np.zeros_like(position),
          position=position),
      config=tiny_model.MODEL, rules=tiny_model.rules(),
      compute=compute.Compute(attention='reference')).states[0]
  logits = head.logits(
      hidden[len(prompt) - 1:-1], parameters.head_weights(params))
  logprobs = jax.nn.log_softmax(logits / 0.9)
  return np.asarray(logprobs[jnp.arange(len(response)), response])


def test_a_run_resumed_between_two_steps_equals_one_that_was_not(tmp_path):
  job, where = job_of()
  state, states = fresh(where), []
  for step in range(4):
    state = job.step(state, step, step + 1).state
    states.append(jax.device_get(state))
  assert (states[1].carried.example >= 0).any()

  other, where = job_of()
  state = fresh(where)
  for step in range(2):
    state = other.step(state, step, step + 1).state
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(2, state, {'stage': 'rl'})
  abstract = run_state.abstract(
      optimizer_lib.make(stage().optimizer, num_steps=4), tiny_model.MODEL,
      where.rules, carried=stage().carried(),
      prompt_stats=prompt_stats.nothing(len(rl_job_test.EXAMPLES)))
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    state = checkpoints.restore_latest(
        lambda info: {'rl': abstract}[info['stage']]).tree
  resumed, _ = job_of()
  for step in range(2, 4):
    state = resumed.step(state, step, step + 1).state
  jax.tree.map(
      np.testing.assert_array_equal, jax.device_get(state), states[-1])


@pytest.mark.parametrize('overrides, message', [
    (dict(cut_tokens=-1), 'rl.cut_tokens=-1 must be >= 0'),
    (dict(cut_seconds=-1.0), 'rl.cut_seconds=-1.0 must be >= 0'),
    (dict(loss=loss_lib.LossConfig()), 'set rl.loss.tis_cap'),
    (dict(replay_experts=True), 'rl.replay_experts=True does not go with'),
    (dict(num_minibatches=2, loss=loss_lib.LossConfig(
        objective='off_policy', tis_cap=2.0)),
     'rl.num_minibatches=2 does not go with'),
])
def test_impossible_cuts_are_refused(overrides, message):
  with pytest.raises(types.UserError, match=message):
    stage(**overrides)


def test_the_clock_cuts_too():
  job, _ = job_of(cut_tokens=0, cut_seconds=1e-9)
  carried = job.rollout(
      tiny_model.params(), 0, stage().carried()).sampled.carried
  assert (carried.example >= 0).any()

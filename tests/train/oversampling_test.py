"""Jobs that sample more prompts than they train on, and remember them all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import types
from longjax.parallel import multihost
from longjax.rl import batch, entropy_control, overlong
from longjax.rl import loss as loss_lib
from longjax.train import checkpoint, rl_job, run_state, step
from longjax.train import optimizer as optimizer_lib
from tests import tiny_model
from tests.train import graded_test, rl_job_test

NUM_PROMPTS, NUM_SAMPLES, NUM_EXAMPLES = 4, 3, len(rl_job_test.EXAMPLES)
OPTIMIZER = optimizer_lib.make(rl_job_test.stage().optimizer, num_steps=4)


class Grader:
  """Rewards even first tokens, of every third example only."""

  is_stingy = False

  def __call__(self, example, text, *, is_finished):
    is_open = int(example.id.split()[1]) % 3 == 0 and not self.is_stingy
    return types.Score(
        reward=float(is_open and int(text.split()[0]) % 2 == 0), answer='',
        rule='test')


@functools.cache
def made():
  """A job, compiled once for all tests, and what it was made of."""
  where, grader = rl_job_test.context(), Grader()
  stage = rl_job_test.stage(
      num_prompts=NUM_PROMPTS, oversample=2, entropy_source='sampler',
      row_lens=(96,))
  return rl_job.RlJob(
      where, stage, examples=rl_job_test.EXAMPLES, score=grader), where, grader


def fresh(where):
  return run_state.fresh(tiny_model.params(), OPTIMIZER, where)


@dataclasses.dataclass
class Watched:
  """A job's rollouts and what its updates are given."""

  update: step.Update
  asked: list = dataclasses.field(default_factory=list)
  rows: list = dataclasses.field(default_factory=list)
  extras: list = dataclasses.field(default_factory=list)
  applied: list = dataclasses.field(default_factory=list)


@pytest.fixture
def watched(monkeypatch):
  job, *_ = made()
  rollout, update = job.rollout, job._update
  seen = Watched(update)

  def watched_rollout(*args):
    seen.asked.append(rollout(*args))
    return seen.asked[-1]

  def watched_update(state, micro_batches, extras, is_applied):
    seen.rows.append(micro_batches)
    seen.extras.append(extras)
    seen.applied.append(bool(is_applied))
    return update(state, micro_batches, extras, is_applied)

  monkeypatch.setattr(job, 'rollout', watched_rollout)
  monkeypatch.setattr(job, '_update', watched_update)
  return seen


def varying(asked):
  """Groups whose rewards differ."""
  return [q for q, rewards in enumerate(
      asked.rewards.reshape(-1, NUM_SAMPLES)) if len(set(rewards)) > 1]


def responses(micro_batches):
  """The responses that stand in rows."""
  found = {}
  for part in micro_batches:
    for token, n, i in zip(
        part.targets[part.loss_mask], part.trajectory[part.loss_mask],
        part.response_index[part.loss_mask], strict=True):
      found.setdefault(int(n), {})[int(i)] = int(token)
  return sorted([of[i] for i in range(len(of))] for of in found.values())


def gradient(update, micro_batches, extras):
  """The sum over micro-batches, by the job's own programs."""
  given = multihost.put(extras, update.rules.sharding())
  params, total = tiny_model.params(), None
  for part in micro_batches:
    part = step.put_rows(part, update.rules)
    if total is None:
      total = update.start(params, part, given)
    total = update.accumulate(params, total, part, given)
  return jax.device_get(total.gradients)


def alone(asked, chosen):
  """Rows and extras as if nothing but these groups had been sampled."""
  sampled = asked.sampled
  rollouts = jax.tree.map(lambda x: x[chosen], sampled.rollouts)
  packed = batch.pack(
      [sampled.prompts[q] for q in chosen], rollouts, row_lens=(96,),
      num_rows=1)
  rewards = asked.rewards.astype(np.float64).reshape(-1, NUM_SAMPLES)[chosen]
  # Fewer than eight rewards of a task: the deviation of the whole batch.
  advantages = (rewards - rewards.mean(axis=1, keepdims=True)) / (
      rewards.std(ddof=1) + 1e-6)
  lengths = rollouts.lengths
  mask = np.arange(rollouts.tokens.shape[2]) < lengths[..., None]

  def padded(x):
    rows = np.float32(x).reshape(-1, *x.shape[2:])
    missing = NUM_PROMPTS * NUM_SAMPLES - len(rows)
    return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))

  return packed.micro_batches, {
      'advantages': padded(advantages),
      'token_weights': padded(mask / lengths.sum()),
      'sampler_logprobs': padded(rollouts.logprobs)}


def test_a_filler_has_no_weight_and_the_gradient_is_that_of_the_others_alone(
    watched):
  job, where, _ = made()
  values = job.step(fresh(where), 0, 1).values
  [asked], [rows], [extras] = watched.asked, watched.rows, watched.extras
  chosen = varying(asked)
  assert 0 < len(chosen) < NUM_PROMPTS
  assert len(asked.sampled.prompts) == 2 * NUM_PROMPTS
  of_chosen = [
      asked.sampled.rollouts.tokens[
          q, g, :asked.sampled.rollouts.lengths[q, g]].tolist()
      for q in chosen for g in range(NUM_SAMPLES)]
  assert responses(rows) == sorted(of_chosen)
  weights = np.asarray(extras['token_weights'])
  assert (weights.any(axis=1).sum()) == len(of_chosen)
  np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
  got = gradient(watched.update, rows, extras)
  assert max(np.abs(x).max() for x in jax.tree.leaves(got)) > 1e-3
  tiny_model.assert_trees_close(
      got, gradient(watched.update, *alone(asked, chosen)), tolerance=1e-5)
  np.testing.assert_allclose(values['reward/mean'], asked.rewards.mean())
  assert values['dynamic/filled'] == 1 - len(chosen) / NUM_PROMPTS


def test_a_step_without_a_group_that_differs_changes_nothing(watched):
  job, where, grader = made()
  grader.is_stingy = True
  result = job.step(fresh(where), 0, 1)
  grader.is_stingy = False
  assert watched.applied == [False]
  values = jax.device_get(dict(result.values))
  assert all(np.isfinite(v) or k == 'aepo/high' for k, v in values.items())
  assert values['reward/mean'] == 0.0 and values['dynamic/unsolved'] == 1.0
  jax.tree.map(
      np.testing.assert_array_equal, jax.device_get(result.state.train.params),
      tiny_model.params())
  # Nor is it an entropy to be measured by.
  assert not result.state.aepo.baseline.count
  # What was sampled is remembered and shown all the same.
  _, _, _, shown, _ = where.rollouts[-1]
  assert len(shown) == NUM_SAMPLES and not any(
      s.is_kept or s.advantage or s.score.reward for s in shown)
  assert result.state.prompt_stats.visits.sum() == 2 * NUM_PROMPTS


def by_hand(rollouts):
  """Visits, means, deviations, lengths and shares cut off, in float64."""
  table = {}
  for asked in rollouts:
    sampled = asked.sampled
    for q, example in enumerate(sampled.example.tolist()):
      rewards = asked.rewards.astype(np.float64).reshape(
          -1, NUM_SAMPLES)[q]
      visits, mean, *_ = table.get(example, (0, rewards.mean()))
      table[example] = (
          visits + 1, (mean + rewards.mean()) / 2, rewards.std(ddof=1),
          sampled.rollouts.lengths[q].mean(),
          1 - sampled.rollouts.is_finished[q].mean())
  return table


def test_prompt_stats_count_all_that_was_sampled_and_survive_a_restart(
    watched, tmp_path):
  job, where, _ = made()
  state = fresh(where)
  assert state.prompt_stats is None
  for i in range(4):
    result = job.step(state, i, i + 1)
    state = result.state
    if i == 1:
      with checkpoint.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(2, state, {})
      stats = jax.tree.map(np.copy, state.prompt_stats)
  whole = jax.device_get(state)
  want = by_hand(watched.asked)
  assert max(visits for visits, *_ in want.values()) == 2
  got = state.prompt_stats
  assert np.flatnonzero(got.visits).tolist() == sorted(want)
  for example, (visits, *numbers) in want.items():
    assert got.visits[example] == visits
    np.testing.assert_allclose(
        [getattr(got, name)[example]
         for name in ('mean', 'std', 'length', 'truncated')],
        numbers, rtol=1e-6, atol=1e-7)
  assert result.values['prompts/visited'] == len(want) / NUM_EXAMPLES

  abstract = run_state.abstract(
      OPTIMIZER, tiny_model.MODEL, where.rules, prompt_stats=dataclasses.
      replace(stats, **{f.name: np.zeros_like(getattr(stats, f.name))
                        for f in dataclasses.fields(stats)}))
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    state = checkpoints.restore_latest(abstract).tree
  jax.tree.map(np.testing.assert_array_equal, state.prompt_stats, stats)
  for i in range(2, 4):
    state = job.step(state, i, i + 1).state
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), whole)


@pytest.mark.parametrize('norm', ['batch_tokens', 'seq_mean'])
def test_truncated_responses_have_advantages_but_no_gradient(norm):
  graded = graded_test.of(4)
  rollouts = graded.sampled.rollouts
  cut = ~graded.is_finished
  assert cut.any() and not cut.all()

  def plan(mode):
    job = rl_job.RlJob(
        rl_job_test.context(), rl_job_test.stage(
            num_prompts=4, num_samples=NUM_SAMPLES,
            loss=loss_lib.LossConfig(loss_norm=norm),
            overlong=overlong.OverlongConfig(mode=mode)),
        examples=[p.example for p in graded.sampled.prompts], score=Grader())
    entropy = np.asarray(rollouts.entropy).reshape(len(cut), -1)
    return jax.device_get(job.plan(
        entropy_control.init(), graded, entropy, entropy))

  plain, masked = plan('off'), plan('mask_truncated')
  np.testing.assert_array_equal(masked.advantages, plain.advantages)
  assert masked.advantages[cut].all()
  np.testing.assert_array_equal(masked.keep, ~cut)
  # The others' weights are as if it were there.
  np.testing.assert_array_equal(
      masked.token_weights,
      np.where(cut[:, None], 0.0, plain.token_weights))
  assert masked.is_applied.all() and plain.token_weights[cut].any()


def test_a_mini_batch_without_a_response_is_not_applied():
  asked = graded_test.of(4)
  lengths = asked.lengths.copy()
  lengths[:6] = 0
  made = batch.plan(
      entropy_control.init(), rewards=jnp.asarray(asked.rewards),
      lengths=jnp.asarray(lengths), group_ids=jnp.repeat(jnp.arange(4), 3),
      stat_ids=jnp.zeros(12, jnp.int32), entropy=jnp.ones((12, 8)),
      entropy_t1=jnp.ones((12, 8)), num_groups=4, num_stats=1,
      num_minibatches=2, advantage_config=rl_job_test.stage().advantage,
      aepo_config=rl_job_test.stage().aepo,
      clip_config=rl_job_test.stage().clip, loss_norm='batch_tokens')
  assert made.is_applied.tolist() == [False, True]

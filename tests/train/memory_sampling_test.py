"""Trajectories of many turns: one reward, rows that share parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import rows, types
from longjax.agents import memory
from longjax.data import tokenizer as tokenizer_lib
from longjax.rl import entropy_control
from longjax.rl import loss as loss_lib
from longjax.rollout import decode
from longjax.train import memory_sampling, rl_job, run_state
from longjax.train import optimizer as optimizer_lib
from longjax.train import state as state_lib
from tests import tiny_model
from tests.train import rl_job_test

NUM_PROMPTS, NUM_SAMPLES, MAX_LEN = 4, 3, 6
TOKENIZER = tokenizer_lib.load('configs/tiny_base')
MODEL = dataclasses.replace(
    tiny_model.MODEL, vocab_size=TOKENIZER.vocab_size)
CONFIG = memory.MemoryConfig(
    part_len=20, memory_len=8, plan_len=4, wording='short')

# Of one to four parts.
EXAMPLES = [
    types.TaskExample(
        id=f'example {i}', task=('mc', 'qa')[i % 2], kind='qa',
        documents=tuple(
            types.Document(title='', text=f'The mayor of {name} is Ada. ' * 2)
            for name in ('Oslo', 'Rome', 'Bern')[:1 + i % 3]),
        question='Who?', answers=('Ada',))
    for i in range(8)]


class Grader:
  """Rewards answers whose first token is even."""

  def __call__(self, example, text, *, is_finished):
    first = TOKENIZER.encode(text)[:1]
    return types.Score(
        reward=float(bool(first) and first[0] % 2 == 0), answer='',
        rule='test')


def stage(**overrides):
  return tiny_model.rl_stage(**dict(
      num_prompts=NUM_PROMPTS, num_samples=NUM_SAMPLES, max_prompt_len=110,
      row_lens=(160, 320), rollouts_every=1, memory=CONFIG, max_parts=4,
      sampler=decode.SamplerConfig(temperature=0.9, max_response_len=MAX_LEN),
      loss=loss_lib.LossConfig()) | overrides)


def job(where=None, **overrides):
  return rl_job.RlJob(
      where or context(), stage(**overrides), examples=EXAMPLES,
      score=Grader())


@functools.cache
def context(**mesh):
  return rl_job_test.context(TOKENIZER, MODEL, **mesh)


@functools.cache
def params():
  return tiny_model.params(model=MODEL)


@functools.cache
def one_step():
  made = job()
  return made, made.rollout(params(), 0)


def of_trajectory(graded, n):
  p, g = divmod(n, NUM_SAMPLES)
  return [t for t in graded.sampled.turns
          if (t.prompt.query, t.prompt.sample) == (p, g)]


def test_a_trajectory_is_what_one_reader_wrote_turn_after_turn():
  _, graded = one_step()
  rollouts = graded.sampled.rollouts
  assert rollouts.tokens.shape == (NUM_PROMPTS, NUM_SAMPLES, 5 * MAX_LEN)
  num_turns = []
  for n in range(NUM_PROMPTS * NUM_SAMPLES):
    turns = of_trajectory(graded, n)
    written = [i for turn in turns for i in turn.response.tokens]
    p, g = divmod(n, NUM_SAMPLES)
    assert rollouts.tokens[p, g, :rollouts.lengths[p, g]].tolist() == written
    assert not rollouts.tokens[p, g, len(written):].any()
    assert [t.is_last for t in turns] == [False] * (len(turns) - 1) + [True]
    num_turns.append(len(turns))
  assert len(set(num_turns)) > 1  # Documents of different lengths.


def test_sampler_and_trainer_agree_over_rows_that_share_parts():
  made, graded = one_step()
  packed = made._minibatches(graded)
  _, _, logprobs = made._measure(params(), graded, packed)
  want = np.asarray(graded.sampled.rollouts.logprobs).reshape(logprobs.shape)
  np.testing.assert_allclose(logprobs, want, atol=2e-5)
  assert np.abs(want).max() > 1.0


def alone(graded):
  """Every turn in a row of its own, its prompt written out."""
  flat = []
  for n in range(NUM_PROMPTS * NUM_SAMPLES):
    first = 0
    for turn in of_trajectory(graded, n):
      flat.append([rows.Group(prompt=turn.prompt.tokens, branches=[
          rows.Branch(response=turn.response.tokens, trajectory=n,
                      first_index=first)])])
      first += len(turn.response.tokens)
  return rows.write(flat, row_len=160)


def gradient(made, batches, extras):
  total = None
  for batch in batches:
    (value, _), grads = jax.jit(jax.value_and_grad(
        functools.partial(
            rl_job.loss, stage=made._stage, context=made._context),
        has_aux=True))(params(), jax.tree.map(jnp.asarray, batch), extras)
    here = value, grads
    total = here if total is None else jax.tree.map(jnp.add, total, here)
  return total


def test_shared_parts_give_the_loss_and_gradient_of_turns_on_their_own():
  made, graded = one_step()
  [packed] = made._minibatches(graded)
  _, entropy, _ = made._measure(params(), graded, [packed])
  plan = made.plan(entropy_control.init(), graded, entropy, entropy)
  extras = {
      'advantages': plan.advantages, 'token_weights': plan.token_weights,
      'sampler_logprobs': graded.sampled.rollouts.logprobs.reshape(
          entropy.shape)}
  assert np.asarray(plan.advantages).any()
  shared = gradient(made, packed.micro_batches, extras)
  whole = alone(graded)
  repeated = gradient(made, [whole], extras)
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
      shared, repeated)
  # The parts are what is shared.
  num_whole = int((whole.meta.group >= 0).sum())
  assert packed.num_needed < 0.8 * num_whole


@pytest.mark.parametrize('norm', ['batch_tokens', 'seq_mean', 'const'])
def test_every_token_of_a_trajectory_has_its_advantage(norm):
  made = job(loss=loss_lib.LossConfig(loss_norm=norm))
  graded = one_step()[1]
  rollouts = graded.sampled.rollouts
  lengths = rollouts.lengths.reshape(-1)
  rewards = np.random.default_rng(0).random(lengths.size).astype(np.float32)
  graded = dataclasses.replace(graded, rewards=rewards)
  entropy = np.asarray(rollouts.entropy).reshape(lengths.size, -1)
  plan = made.plan(entropy_control.init(), graded, entropy, entropy)
  # One entry a trajectory, however many turns it has.
  groups = rewards.astype(np.float64).reshape(NUM_PROMPTS, NUM_SAMPLES)
  centered = groups - groups.mean(axis=1, keepdims=True)
  # Fewer than eight rewards of a task: the deviation of all.
  want = centered.reshape(-1) / (rewards.astype(np.float64).std(ddof=1) + 1e-6)
  np.testing.assert_allclose(plan.advantages, want, rtol=1e-4)
  mask = np.arange(entropy.shape[1]) < lengths[:, None]
  denominator = {
      'batch_tokens': np.full(lengths.size, lengths.sum()),
      'seq_mean': lengths * lengths.size,
      'const': np.full(lengths.size, lengths.size * entropy.shape[1])}[norm]
  np.testing.assert_allclose(
      plan.token_weights, mask / denominator[:, None], rtol=1e-5)


def test_aepo_masks_whole_trajectories_by_the_entropy_of_all_their_turns():
  made = job(aepo=entropy_control.AepoConfig(
      entropy_low=0.1, entropy_high=0.2, baseline_steps=9))
  graded = one_step()[1]
  rollouts = graded.sampled.rollouts
  entropy = np.asarray(rollouts.entropy).reshape(NUM_PROMPTS * NUM_SAMPLES, -1)
  rewards = np.float32(np.arange(entropy.shape[0]) % 2)
  plan = made.plan(
      entropy_control.init(), dataclasses.replace(graded, rewards=rewards),
      entropy, entropy)
  lengths = rollouts.lengths.reshape(-1)
  np.testing.assert_allclose(
      plan.metrics['entropy/seq_mean'],
      (entropy.sum(axis=1) / lengths).mean(), rtol=1e-5)
  assert int(plan.aepo.mode) == entropy_control.Mode.POS
  kept = np.asarray(plan.keep)
  assert kept.any() and not kept[rewards == 0.0].any()
  assert ((np.asarray(plan.token_weights) > 0).sum(axis=1)
          == lengths * kept).all()


def test_a_step_trains_and_compiles_nothing_new_the_second_time():
  where = context()
  made = job()
  state = run_state.fresh(
      params(), optimizer_lib.make(stage().optimizer, num_steps=4), where)
  programs = None
  for i in range(3):
    result = made.step(state, i, i + 1)
    values = jax.device_get(dict(result.values))
    assert values['gap/logprob_max'] < 1e-4
    assert values['memory/turns'] > 1.0
    assert 0.0 <= values['memory/parse_failures'] <= 1.0
    state = result.state
    now = made.engine.num_programs()
    assert programs is None or now == programs
    programs = now
  assert [kept[0] for kept in where.rollouts] == [1, 2, 3]
  for *_, samples, kept in where.rollouts:
    read = [''.join(turn.part for turn in sample.turns) for sample in samples]
    assert read == read[:1] * NUM_SAMPLES
    assert 'The mayor of' in read[0] and read[0][:20] in kept['prompt_text']
    assert all(turn.memory for sample in samples for turn in sample.turns)
  before = params()
  assert any(np.abs(a - b).max() > 0 for a, b in zip(
      jax.tree.leaves(before), jax.tree.leaves(
          jax.device_get(state.train.params))))


def test_the_same_step_is_sampled_again_alike_on_another_mesh():
  graded = one_step()[1]
  other = job(context(data=2, fsdp=2, tensor=2))
  again = other.rollout(
      jax.device_put(params(), state_lib.param_shardings(
          MODEL, other._context.rules)), 0)
  assert again.sampled.texts == graded.sampled.texts
  np.testing.assert_array_equal(
      again.sampled.rollouts.tokens, graded.sampled.rollouts.tokens)


def test_mistakes_are_told():
  long = dataclasses.replace(
      EXAMPLES[0], id='long', documents=EXAMPLES[2].documents * 4)
  made = rl_job.RlJob(
      context(), stage(num_prompts=1), examples=[long], score=Grader())
  with pytest.raises(
      types.UserError, match=r"'long' has \d+ parts.*rl.max_parts=4"):
    made.rollout(params(), 0)
  made = job(max_prompt_len=100)
  with pytest.raises(
      types.UserError, match='up to 1.. tokens, rl.max_prompt_len=100'):
    made.rollout(params(), 0)
  with pytest.raises(types.UserError, match='replay_experts=True does not go'):
    stage(replay_experts=True)
  with pytest.raises(types.UserError, match='rl.memory=.*does not go with'):
    stage(cut_tokens=5, loss=loss_lib.LossConfig(tis_cap=2.0))


def test_metrics_of_no_turn_are_none():
  assert memory_sampling.metrics([]) == {}

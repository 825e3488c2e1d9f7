"""Tests for longjax.rl.batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax.rl import advantage, batch, clipping, entropy_control, loss
from tests import tiny_model

NUM_PROMPTS, NUM_SAMPLES, MAX_LEN = 6, 4, 5
NUM_RESPONSES = NUM_PROMPTS * NUM_SAMPLES
GROUP_IDS = np.repeat(np.arange(NUM_PROMPTS), NUM_SAMPLES).astype(np.int32)
TASK_IDS = np.repeat([0, 1, 0, 1, 0, 2], NUM_SAMPLES).astype(np.int32)
BAND = entropy_control.AepoConfig(entropy_low=0.5, entropy_high=1.0)
TOKEN_HIGH = clipping.NegativeClipConfig(
    method='token_high', token_fraction=0.4)


def graded(seed=0):
  """Rewards, lengths, entropies; a unanimous group and two of padding."""
  rng = np.random.default_rng(seed)
  rewards = rng.integers(0, 3, NUM_RESPONSES) / 2.0
  rewards[4:8] = 1.0
  lengths = rng.integers(1, MAX_LEN + 1, NUM_RESPONSES)
  lengths[-2:] = 0
  entropy = rng.uniform(0.6, 2.0, (NUM_RESPONSES, MAX_LEN))
  entropy_t1 = 1.3 * entropy
  # What lies past the end must not count.
  past = np.arange(MAX_LEN) >= lengths[:, None]
  entropy[past], entropy_t1[past] = 50.0, 70.0
  return dict(
      rewards=np.float32(rewards), lengths=np.int32(lengths),
      entropy=np.float32(entropy), entropy_t1=np.float32(entropy_t1))


def composed(made, mode, *, method='off', token_fraction=0.4,
             norm='batch_tokens', aepo_norm='all'):
  """Advantages, AEPO and weights in float64, one response at a time."""
  rewards, entropy = (
      made[k].astype(np.float64) for k in ('rewards', 'entropy'))
  lengths = made['lengths']
  valid = [i for i in range(NUM_RESPONSES) if lengths[i]]
  advantages = np.zeros(NUM_RESPONSES)
  for i in valid:
    group = rewards[[j for j in valid if GROUP_IDS[j] == GROUP_IDS[i]]]
    task = rewards[[j for j in valid if TASK_IDS[j] == TASK_IDS[i]]]
    if len(task) < 8:
      task = rewards[valid]
    if group.std() > 0:
      advantages[i] = (rewards[i] - group.mean()) / (task.std(ddof=1) + 1e-6)

  by_response = [entropy[i, :lengths[i]].mean() for i in valid]
  batch_entropy = np.mean(by_response)
  keep = np.zeros(NUM_RESPONSES, bool)
  for i in valid:
    keep[i] = mode == 'full' or (advantages[i] > 0 and rewards[i] > 0)

  threshold = np.inf
  if method == 'token_high':
    negative = np.concatenate(
        [entropy[i, :lengths[i]] for i in valid if advantages[i] < 0])
    threshold = np.quantile(negative, 1.0 - token_fraction)
  counted = [i for i in valid if aepo_norm == 'all' or keep[i]]
  weights = np.zeros((NUM_RESPONSES, MAX_LEN))
  for i in valid:
    for t in range(lengths[i]):
      if not keep[i] or (advantages[i] < 0 and entropy[i, t] > threshold):
        continue
      if norm == 'batch_tokens':
        weights[i, t] = 1.0 / sum(lengths[j] for j in counted)
      else:
        weights[i, t] = 1.0 / (len(counted) * lengths[i])
  return advantages, keep, weights, batch_entropy


def plan(made, aepo=None, *, aepo_config=BAND,
         clip_config=clipping.NegativeClipConfig(), loss_norm='batch_tokens',
         num_minibatches=1):
  return jax.device_get(batch.plan(
      aepo or entropy_control.init(), **made, group_ids=GROUP_IDS,
      stat_ids=TASK_IDS, num_groups=NUM_PROMPTS, num_stats=3,
      advantage_config=advantage.AdvantageConfig(), aepo_config=aepo_config,
      clip_config=clip_config, loss_norm=loss_norm,
      num_minibatches=num_minibatches))


def test_pos_mode_is_the_composition_of_the_recipes_formulas():
  made = graded()
  got = plan(made)  # Its entropy is above the band.
  advantages, keep, weights, entropy = composed(made, 'pos')
  assert entropy > 1.0 and got.aepo.mode == entropy_control.Mode.POS
  assert 0 < keep.sum() < NUM_RESPONSES
  np.testing.assert_allclose(got.advantages, advantages, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got.keep, keep)
  np.testing.assert_allclose(got.token_weights, weights, rtol=1e-6)
  assert got.is_applied
  metrics = got.metrics
  np.testing.assert_allclose(
      metrics['entropy/seq_mean'], entropy, rtol=1e-6)
  np.testing.assert_allclose(
      metrics['entropy/token_mean_t1'], 1.3 * metrics['entropy/token_mean'],
      rtol=1e-6)
  np.testing.assert_allclose(
      metrics['aepo/kept'], keep.sum() / (NUM_RESPONSES - 2), rtol=1e-6)
  np.testing.assert_allclose(
      metrics['advantage/positive_total'], advantages[keep].sum(), rtol=1e-5)
  assert metrics['advantage/negative_total'] == 0.0
  assert (metrics['aepo/low'], metrics['aepo/high']) == (0.5, 1.0)
  assert metrics['aepo/num_switches'] == 1
  # Of the last group two responses are padding; one more leaves a singleton.
  assert metrics['advantage/singleton_groups'] == 0
  made['lengths'][-3] = 0
  assert plan(made).metrics['advantage/singleton_groups'] == 1


@pytest.mark.parametrize('loss_norm', ['batch_tokens', 'seq_mean'])
def test_full_mode_with_clipping_is_the_composition_too(loss_norm):
  made = graded(1)
  got = plan(
      made, aepo_config=entropy_control.AepoConfig(enabled=False),
      clip_config=TOKEN_HIGH, loss_norm=loss_norm)
  advantages, keep, weights, _ = composed(
      made, 'full', method='token_high', norm=loss_norm)
  assert ((weights == 0) & (np.arange(MAX_LEN) < made['lengths'][:, None])
         ).any()  # Some tokens are clipped.
  np.testing.assert_allclose(got.advantages, advantages, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got.keep, keep)
  np.testing.assert_allclose(got.token_weights, weights, rtol=1e-6)


def test_denominators_of_the_kept_are_larger_weights():
  made = graded()
  config = entropy_control.AepoConfig(
      entropy_low=0.5, entropy_high=1.0, aepo_norm='kept')
  got = plan(made, aepo_config=config)
  _, _, weights, _ = composed(made, 'pos', aepo_norm='kept')
  np.testing.assert_allclose(got.token_weights, weights, rtol=1e-6)
  np.testing.assert_allclose(got.token_weights.sum(), 1.0, rtol=1e-6)


def test_the_decision_of_a_batch_applies_to_that_batch_and_is_remembered():
  made = graded()
  first = plan(made)
  assert first.aepo.mode == entropy_control.Mode.POS
  # Between the thresholds the mode stays; below the band it is released.
  between = made | {'entropy': made['entropy'] * np.float32(0.6)}
  assert 0.5 < composed(between, 'pos')[3] < 1.0
  assert not plan(between, first.aepo).keep.all()
  assert plan(between).keep[:-2].all()
  below = made | {'entropy': made['entropy'] * np.float32(0.3)}
  released = plan(below, first.aepo)
  assert released.aepo.mode == entropy_control.Mode.FULL
  assert released.keep[:-2].all()


def test_a_batch_of_which_nothing_is_kept_is_not_applied():
  made = graded() | {'rewards': np.zeros(NUM_RESPONSES, np.float32)}
  got = plan(made)
  assert got.aepo.mode == entropy_control.Mode.POS
  assert not got.is_applied and not got.token_weights.any()
  # In FULL mode the same batch is applied: moments decay as they always do.
  assert plan(
      made, aepo_config=entropy_control.AepoConfig(enabled=False)).is_applied


def test_a_mini_batch_of_which_nothing_is_kept_is_not_applied():
  made = graded()
  made['rewards'][NUM_RESPONSES // 3:] = 0.0
  got = plan(made, num_minibatches=3)
  assert got.aepo.mode == entropy_control.Mode.POS
  np.testing.assert_array_equal(got.is_applied, [True, False, False])
  np.testing.assert_array_equal(
      got.is_applied,
      got.token_weights.reshape(3, -1).any(axis=1))


def test_padding_responses_have_no_weight_and_change_nothing():
  made = graded()
  loud = {k: v.copy() for k, v in made.items()}
  loud['rewards'][-2:] = 100.0
  loud['entropy'][-2:] = np.nan
  loud['entropy_t1'][-2:] = np.nan
  jax.tree.map(np.testing.assert_array_equal, plan(loud), plan(made))
  assert not plan(made).token_weights[-2:].any()


def test_a_longer_cap_on_responses_changes_nothing():
  made = graded()
  wider = made | {
      k: np.pad(made[k], ((0, 0), (0, 7))) for k in ('entropy', 'entropy_t1')}
  got, want = plan(wider), plan(made)
  np.testing.assert_array_equal(got.keep, want.keep)
  np.testing.assert_allclose(
      got.token_weights, np.pad(want.token_weights, ((0, 0), (0, 7))))


def test_unpack_undoes_pack():
  prompts = tiny_model.prompts([3, 12, 1, 7, 2])
  rollouts = tiny_model.rollouts(5, 3, 8)
  # Rows of two lengths; the last prompts have fewer responses, or none.
  rollouts.lengths[3, 1:] = rollouts.lengths[4] = 0
  packed = batch.pack(
      prompts, rollouts, row_lens=(16, 24), num_rows=2).micro_batches
  assert {part.tokens.shape for part in packed} == {(2, 16), (2, 24)}
  shape = dict(num_responses=15, max_response_len=8)
  mask = np.arange(8) < rollouts.lengths.reshape(15, 1)
  np.testing.assert_array_equal(
      batch.unpack([part.targets for part in packed], packed, **shape),
      rollouts.tokens.reshape(15, 8) * mask)
  np.testing.assert_array_equal(
      batch.unpack([part.loss_mask for part in packed], packed, **shape), mask)
  # And back: values by response reach the tokens they belong to.
  by_response = np.where(mask, np.arange(120.0).reshape(15, 8), 0.0)
  on_rows = [
      by_response[part.trajectory, part.response_index] for part in packed]
  np.testing.assert_array_equal(
      batch.unpack(on_rows, packed, **shape), by_response)


def test_the_prompts_of_a_batch_are_stored_once():
  prompts = tiny_model.prompts([9, 5])
  rollouts = tiny_model.rollouts(2, 3, 4)
  packed = tiny_model.packed(prompts, rollouts, row_len=64, num_rows=1)
  # All but the last token of a prompt, and what each response reads.
  assert (packed.meta.group >= 0).sum() == 8 + 4 + rollouts.lengths.sum()
  assert packed.loss_mask.sum() == rollouts.lengths.sum()


def test_a_group_longer_than_a_row_repeats_its_prompt_which_is_waste():
  prompts, rollouts = tiny_model.prompts([9, 5]), tiny_model.rollouts(2, 3, 4)
  rollouts = rollouts.replace(lengths=np.int32([[4, 4, 4], [2, 0, 3]]))
  made = batch.pack(prompts, rollouts, row_lens=(8, 16), num_rows=1)
  # 8 + 4 + 4 in a row, 8 + 4 in another, which has no room for 4 + 2 + 3.
  assert [part.tokens.shape for part in made.micro_batches] == [
      (1, 16), (1, 16), (1, 16)]
  used = sum((part.meta.group >= 0).sum() for part in made.micro_batches)
  assert (used, made.num_needed, made.num_repeated) == (37, 29, 8)
  metrics = batch.padding([made])
  np.testing.assert_allclose(metrics['padding'], 1 - 29 / 48)
  np.testing.assert_allclose(metrics['padding/repeated_prefix'], 8 / 48)
  # Of two optimizer batches, places are counted, not shares averaged.
  small = batch.pack(prompts[1:], rollouts.replace(
      tokens=rollouts.tokens[1:], lengths=rollouts.lengths[1:]),
      row_lens=(9,), num_rows=1)
  np.testing.assert_allclose(
      batch.padding([made, small])['padding'], 1 - (29 + 9) / (48 + 9))


def test_a_batch_without_a_response_is_a_micro_batch_of_padding():
  prompts, rollouts = tiny_model.prompts([9, 5]), tiny_model.rollouts(2, 3, 4)
  made = batch.pack(
      prompts, rollouts.replace(lengths=np.zeros((2, 3), np.int32)),
      row_lens=(16, 24), num_rows=4)
  [part] = made.micro_batches
  assert part.tokens.shape == (4, 16)
  assert (part.meta.group == -1).all() and not part.loss_mask.any()
  assert made.num_needed == made.num_repeated == 0


def test_plan_compiles_once():
  before = batch.plan._cache_size()
  state = entropy_control.init()
  for seed in range(4):
    made = graded(seed)
    state = batch.plan(
        state, **{k: jnp.asarray(v) for k, v in made.items()},
        group_ids=GROUP_IDS, stat_ids=TASK_IDS, num_groups=NUM_PROMPTS,
        num_stats=3, advantage_config=advantage.AdvantageConfig(epsilon=1e-5),
        aepo_config=BAND, clip_config=clipping.NegativeClipConfig(),
        loss_norm=loss.NORMS[0]).aepo
  assert batch.plan._cache_size() == before + 1


def test_each_minibatch_has_a_denominator_of_its_own():
  made = graded()
  whole, halves = plan(made), plan(made, num_minibatches=2)
  np.testing.assert_array_equal(halves.advantages, whole.advantages)
  lengths = made['lengths'].reshape(2, -1)
  for half, weights in enumerate(halves.token_weights.reshape(
      2, -1, MAX_LEN)):
    on = weights[weights > 0]
    assert len(on)
    np.testing.assert_allclose(on, 1.0 / lengths[half].sum(), rtol=1e-6)

"""A prompt computed once for its responses trains as if it were repeated.

Losses, gradients and an optimizer step do not depend on how a batch is laid
out: shared or repeated prompts, packing, padding, micro-batches, devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longjax import rows
from longjax.model import compute as compute_lib
from longjax.train import optimizer as optimizer_lib
from longjax.train import rl_job, sft_job, state, step
from tests import tiny_model

NUM_SAMPLES, MAX_LEN, ROW_LEN = 3, 8, 48
# Ragged, one of a single token; about two groups share a row.
PROMPTS = tiny_model.prompts([3, 12, 1, 7, 2, 15, 9, 4, 11, 5, 8, 6])
ROLLOUTS = tiny_model.rollouts(len(PROMPTS), NUM_SAMPLES, MAX_LEN)
STAGE = tiny_model.rl_stage()
EXTRAS = {
    'rl': tiny_model.extras(ROLLOUTS),
    'sft': {'num_tokens': jnp.float32(ROLLOUTS.lengths.sum())},
}
# One program serves rows of every layout.
NUM_ROWS = len(PROMPTS) * NUM_SAMPLES
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-2, 0.1, 0.05


def shared(num_rows=NUM_ROWS):
  """Every prompt once, several groups a row."""
  packed = tiny_model.packed(
      PROMPTS, ROLLOUTS, row_len=ROW_LEN, num_rows=num_rows)
  assert packed.meta.group.max() >= 1
  return packed


def repeated():
  """Every response in a row of its own, behind its own copy of the prompt."""
  return tiny_model.repeated(PROMPTS, ROLLOUTS, row_len=ROW_LEN)


def loss_of(kind, **how):
  """The loss the job trains with."""
  context = tiny_model.context(**how)
  if kind == 'rl':
    return functools.partial(rl_job.loss, stage=STAGE, context=context)
  return functools.partial(sft_job.loss, context=context)


@functools.cache
def gradient_program(kind='rl', **compute):
  loss = loss_of(
      kind, made=tiny_model.rules(), **compute)
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def want(kind='rl'):
  """Loss, metrics and gradients of the repeated prompts."""
  return gradient_program(kind)(
      tiny_model.params(), repeated(), EXTRAS[kind])


def assert_same(got, want):
  (got_loss, got_metrics), got_gradients = got
  (want_loss, want_metrics), want_gradients = want
  np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
  tiny_model.assert_trees_close(got_gradients, want_gradients)
  got_summary = got_metrics.summary()
  for name, value in want_metrics.summary().items():
    np.testing.assert_allclose(
        got_summary[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_comparison_is_not_empty():
  (loss, metrics), gradients = want()
  assert abs(loss) > 1e-3
  assert all(np.abs(g).max() > 1e-5 for g in jax.tree.leaves(gradients))
  summary = metrics.summary()
  for name in ('clip_high', 'clip_low', 'clip_dual', 'tis_capped'):
    assert 0.0 < summary[f'ratio/{name}'] < 1.0, name


def test_the_loss_is_the_recipes_formula_response_by_response():
  flat = repeated()
  score = step.make_score(
      config=tiny_model.MODEL, rules=tiny_model.rules(),
      compute=compute_lib.Compute(attention='reference'),
      temperature=STAGE.sampler.temperature)
  logprobs = np.asarray(
      score(tiny_model.params(), flat).logprobs, np.float64)
  given, total, config = EXTRAS['rl'], 0.0, STAGE.loss
  for n in range(NUM_ROWS):  # Row n holds response n.
    advantage = float(given['advantages'][n])
    for t, lp in enumerate(logprobs[n, flat.loss_mask[n]]):
      old = float(given['old_logprobs'][n, t])
      ratio = np.exp(lp - old)
      gain = min(ratio * advantage, advantage * np.clip(
          ratio, 1 - config.eps_low, 1 + config.eps_high))
      if advantage < 0:
        gain = max(gain, config.dual_clip * advantage)
      importance = np.exp(old - float(given['sampler_logprobs'][n, t]))
      total -= (given['token_weights'][n, t] * gain
                * min(importance, config.tis_cap))
  (loss, _), _ = want()
  np.testing.assert_allclose(loss, total, rtol=1e-5)


@pytest.mark.parametrize('kind', ['rl', 'sft'])
def test_shared_prompts_equal_repeated_prompts(kind):
  got = gradient_program(kind)(tiny_model.params(), shared(), EXTRAS[kind])
  assert_same(got, want(kind))


def test_blockwise_attention_with_recomputed_blocks_does_too():
  program = gradient_program(attention='blockwise', remat='block')
  for packed in (shared(), repeated()):
    got = program(tiny_model.params(), packed, EXTRAS['rl'])
    assert_same(got, want())


def test_packing_and_padding_change_nothing():
  # Another order of groups and of responses, and three groups a row at most.
  groups = [
      rows.Group(prompt=PROMPTS[p].tokens, branches=[
          rows.Branch(
              response=ROLLOUTS.tokens[p, g, :ROLLOUTS.lengths[p, g]].tolist(),
              trajectory=p * NUM_SAMPLES + g)
          for g in (2, 0, 1)])
      for p in (5, 1, 8, 0, 2, 3, 4, 11, 7, 6, 9, 10)]
  packed = [rows.pack(groups[i:i + 3], row_len=ROW_LEN, num_rows=9)
            for i in range(0, len(groups), 3)]
  packed = jax.tree.map(lambda *xs: np.concatenate(xs), *packed)
  # What padding holds must not matter either.
  is_padding = packed.meta.group < 0
  packed.tokens[is_padding] = 17
  packed.targets[~packed.loss_mask] = 5
  packed.meta.position[is_padding] = 3
  got = gradient_program('rl')(tiny_model.params(), packed, EXTRAS['rl'])
  assert_same(got, want())


def adamw_step(params, gradients):
  """Parameters and moments after a first step, in float64."""
  norm = np.sqrt(sum(
      np.sum(np.square(g, dtype=np.float64))
      for g in jax.tree.leaves(gradients)))
  assert norm > CLIP_NORM  # The clipping acts.

  def one(path, p, g):
    g = np.asarray(g, np.float64) * CLIP_NORM / norm
    decay = 0.0 if path[-1].key.endswith('norm') else WEIGHT_DECAY
    moved = LEARNING_RATE * (g / (np.abs(g) + 1e-8) + decay * p)
    return p - moved, 0.1 * g, 0.001 * g**2

  made = jax.tree_util.tree_map_with_path(one, params, gradients)
  new, mu, nu = (
      jax.tree.map(lambda t, i=i: t[i], made,
                   is_leaf=lambda x: isinstance(x, tuple))
      for i in range(3))
  return norm, new, mu, nu


@pytest.mark.parametrize('kind, mesh, rows_at_once', [
    ('rl', dict(data=8), 16),
    ('rl', dict(data=2, fsdp=4), 8),
    ('rl', dict(fsdp=8), 16),
    ('rl', {}, 1),
    ('sft', dict(data=2, fsdp=4), 16),
])
def test_devices_and_micro_batches_take_the_same_step(
    kind, mesh, rows_at_once):
  rules = tiny_model.rules(**mesh)
  optimizer = optimizer_lib.make(
      optimizer_lib.OptimizerConfig(
          learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
          clip_norm=CLIP_NORM),
      num_steps=3)
  update = step.make_update(
      loss_of(kind, made=rules), optimizer, config=tiny_model.MODEL,
      rules=rules)
  start = state.create(
      tiny_model.params(), tiny_model.MODEL, optimizer, rules)
  after, metrics = jax.device_get(update(
      start, rows.split(shared(16), rows_at_once), EXTRAS[kind], True))

  (loss, want_metrics), gradients = want(kind)
  norm, new, mu, nu = adamw_step(tiny_model.params(), gradients)
  expected = want_metrics.summary() | {
      'loss': loss, 'grad_norm': norm, 'skipped': 0, 'skipped_in_a_row': 0}
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(
        metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
  adam = optax.tree_utils.tree_get(after.opt_state, 'ScaleByAdamState')
  tiny_model.assert_trees_close(adam.mu, mu)
  # Squares of gradients, whose relative error is twice that of a gradient.
  tiny_model.assert_trees_close(*jax.tree.map(np.sqrt, (adam.nu, nu)))
  # Adam divides each gradient by its own size, so only where that is well
  # above rounding does the step say anything.
  clear = jax.tree.map(lambda g: np.abs(g) > 1e-3 * np.abs(g).max(), mu)
  assert all(c.mean() > 0.3 for c in jax.tree.leaves(clear))
  tiny_model.assert_trees_close(
      jax.tree.map(np.where, clear, after.params, new), new)

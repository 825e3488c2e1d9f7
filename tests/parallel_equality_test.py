"""Any mesh takes the step of a single device: loss, gradients, parameters.

Rows are packed groups with shared prefixes; networks are dense and mixtures of
experts. Every mesh axis alone, and combinations of them, on eight devices.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from longjax.model import architecture
from longjax.rl import batch
from longjax.train import optimizer as optimizer_lib
from longjax.train import rl_job, state, step
from tests import tiny_model

DENSE = dataclasses.replace(
    tiny_model.MODEL, num_heads=8, num_kv_heads=4, qkv_bias=True)
MOE = dataclasses.replace(
    tiny_model.MODEL, num_heads=8, num_kv_heads=2, ffn_dim=16,
    moe=architecture.MoeConfig(num_experts=8, num_active=3))
MODELS = {'dense': DENSE, 'moe': MOE}
ALONE = [dict(data=8), dict(fsdp=8), dict(seq=8), dict(tensor=8),
         dict(expert=8)]
TOGETHER = [
    dict(data=2, fsdp=4), dict(fsdp=2, seq=4), dict(seq=2, tensor=4),
    dict(seq=4, expert=2), dict(data=2, seq=2, tensor=2),
    dict(fsdp=2, seq=2, expert=2), dict(tensor=2, expert=4)]

NUM_SAMPLES, MAX_LEN, ROW_LEN = 3, 8, 64
PROMPTS = tiny_model.prompts([3, 12, 1, 7, 2, 15, 9, 4, 11, 5, 8, 6])
ROLLOUTS = tiny_model.rollouts(len(PROMPTS), NUM_SAMPLES, MAX_LEN)
EXTRAS = tiny_model.extras(ROLLOUTS)
STAGE = tiny_model.rl_stage()
# Clipping and Adam's normalisation make a step depend on every gradient.
OPTIMIZER = optimizer_lib.make(
    optimizer_lib.OptimizerConfig(learning_rate=1e-2, clip_norm=0.05),
    num_steps=3)


@functools.cache
def rows():
  packed = batch.pack(PROMPTS, ROLLOUTS, row_len=ROW_LEN, row_multiple=8)
  assert packed.tokens.shape == (8, ROW_LEN)
  assert packed.meta.group.max() >= 1 and packed.meta.branch.max() == 3
  return packed


@functools.cache
def outcome(kind, mesh, rows_at_once=0, **compute):
  """State and metrics after one step."""
  model, rules = MODELS[kind], tiny_model.rules(**dict(mesh))
  loss = functools.partial(
      rl_job.loss, stage=STAGE,
      context=tiny_model.context(rules, model, **compute))
  update = step.make_update(
      loss, OPTIMIZER, config=model, rules=rules,
      rows_at_once=rows_at_once)
  start = state.create(
      tiny_model.params(model=model), model, OPTIMIZER, rules)
  return jax.device_get(
      update(start, step.put_rows(rows(), rules), EXTRAS, True))


def assert_same_step(got, want, tolerance=1e-5):
  (got, got_metrics), (want, want_metrics) = got, want
  assert got_metrics.keys() == want_metrics.keys()
  for name, value in want_metrics.items():
    np.testing.assert_allclose(
        got_metrics[name], value, rtol=tolerance, atol=1e-6, err_msg=name)
  moments = [
      optax.tree_utils.tree_get(after.opt_state, 'ScaleByAdamState')
      for after in (got, want)]
  # The first moment after one step is a tenth of the clipped gradient.
  tiny_model.assert_trees_close(
      moments[0].mu, moments[1].mu, tolerance=tolerance)
  # Adam divides each gradient by its own size, so only where that is well
  # above rounding does the step say anything.
  clear = jax.tree.map(
      lambda g: np.abs(g) > 1e-3 * np.abs(g).max(), moments[1].mu)
  assert all(c.mean() > 0.2 for c in jax.tree.leaves(clear))
  tiny_model.assert_trees_close(
      jax.tree.map(np.where, clear, got.params, want.params), want.params,
      tolerance=tolerance)


def key(mesh):
  return tuple(mesh.items())


def name(value):
  if isinstance(value, dict):
    return ','.join(f'{k}={v}' for k, v in value.items())
  return str(value)


@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('mesh', ALONE + TOGETHER, ids=name)
def test_every_mesh_takes_the_step_of_one_device(kind, mesh):
  want = outcome(kind, ())
  assert_same_step(outcome(kind, key(mesh), attention='blockwise'), want)


@pytest.mark.parametrize('kind, mesh', [
    ('dense', dict(seq=8)), ('moe', dict(fsdp=2, seq=2, expert=2))], ids=name)
def test_the_ring_does_too(kind, mesh):
  got = outcome(
      kind, key(mesh), attention='blockwise', context_parallel='ring')
  assert_same_step(got, outcome(kind, ()))


@pytest.mark.parametrize('kind, remat', [
    ('dense', 'block'), ('dense', 'attention'), ('dense', 'offload'),
    ('moe', 'attention')])
def test_recomputation_and_micro_batches_change_nothing(kind, remat):
  got = outcome(
      kind, key(dict(fsdp=2, seq=2, tensor=2)), rows_at_once=4,
      attention='blockwise', context_parallel='ring', remat=remat)
  assert_same_step(got, outcome(kind, ()))


@pytest.mark.parametrize('kind', MODELS)
def test_bfloat16_on_a_mesh_is_as_near_to_float32_as_on_one_device(kind):
  mesh = key(dict(fsdp=2, seq=2, expert=2))

  def gap(got):
    """Largest error of a gradient, in units of the largest in its array."""
    got, want = (
        optax.tree_utils.tree_get(x[0].opt_state, 'ScaleByAdamState').mu
        for x in (got, outcome(kind, ())))
    return max(
        np.abs(g - w).max() / np.abs(w).max()
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)))

  alone, spread = (
      outcome(kind, m, attention='blockwise', dtype='bfloat16')
      for m in ((), mesh))
  assert all(
      x.dtype == np.float32 for x in jax.tree.leaves(spread[0].params))
  assert 1e-4 < gap(alone)
  assert gap(spread) < 2.0 * gap(alone)

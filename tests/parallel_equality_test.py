"""Any mesh takes the step of repeated prompts on a single device.

The loss, the gradients and the parameters after a step, with packed groups
whose prompts are shared, in micro-batches of several row lengths, one of the
groups too long for a row. Networks are dense and mixtures of experts. Every
mesh axis alone, and combinations of them, on eight devices.
"""

import dataclasses
import functools
import itertools

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

NUM_SAMPLES, MAX_LEN, ROW_LENS = 3, 8, (16, 24)
PROMPTS = tiny_model.prompts([3, 12, 1, 7, 2, 15, 9, 4, 1, 2])
ROLLOUTS = tiny_model.rollouts(len(PROMPTS), NUM_SAMPLES, MAX_LEN)
EXTRAS = tiny_model.extras(ROLLOUTS)
STAGE = tiny_model.rl_stage()
# Clipping and Adam's normalisation make a step depend on every gradient.
OPTIMIZER = optimizer_lib.make(
    optimizer_lib.OptimizerConfig(learning_rate=1e-2, clip_norm=0.05),
    num_steps=3)


@functools.cache
def rows_of(layout):
  """Micro-batches: of shared prompts, but for 'repeated'."""
  if layout == 'repeated':  # A row for each response and its prompt.
    return [tiny_model.repeated(PROMPTS, ROLLOUTS, row_len=ROW_LENS[-1])]
  row_lens, num_rows = {
      'lengths': (ROW_LENS, 8), 'length': (ROW_LENS[-1:], 8),
      'few rows': (ROW_LENS[-1:], 2)}[layout]
  return batch.pack(
      PROMPTS, ROLLOUTS, row_lens=row_lens, num_rows=num_rows).micro_batches


@functools.cache
def outcome(kind, mesh, layout, **compute):
  """State and metrics after one step."""
  model, rules = MODELS[kind], tiny_model.rules(**dict(mesh))
  loss = functools.partial(
      rl_job.loss, stage=STAGE,
      context=tiny_model.context(rules, model, **compute))
  update = step.make_update(loss, OPTIMIZER, config=model, rules=rules)
  start = state.create(
      tiny_model.params(model=model), model, OPTIMIZER, rules)
  return jax.device_get(update(start, rows_of(layout), EXTRAS, True))


@functools.cache
def want(kind):
  """The step of repeated prompts on one device."""
  state, metrics = outcome(kind, (), 'repeated')
  # Experts see a repeated prompt as often as it stands there.
  of_experts = {
      name: value for name, value in outcome(kind, (), 'length')[1].items()
      if name.startswith('moe/')}
  return state, metrics | of_experts


def first_moment(state):
  """Of Adam; after one step it is a tenth of the clipped gradient."""
  return optax.tree_utils.tree_get(state.opt_state, 'ScaleByAdamState').mu


def assert_same_step(got, want, tolerance=1e-5):
  (got, got_metrics), (want, want_metrics) = got, want
  assert got_metrics.keys() == want_metrics.keys()
  for name, value in want_metrics.items():
    np.testing.assert_allclose(
        got_metrics[name], value, rtol=tolerance, atol=1e-6, err_msg=name)
  gradients = first_moment(want)
  tiny_model.assert_trees_close(
      first_moment(got), gradients, tolerance=tolerance)
  # Adam divides each gradient by its own size, so only where that is well
  # above rounding does the step say anything.
  clear = jax.tree.map(
      lambda g: np.abs(g) > 1e-3 * np.abs(g).max(), gradients)
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


def stands_in(micro_batches):
  """For each prompt, the rows its responses stand in."""
  found = [set() for _ in PROMPTS]
  for i, part in enumerate(micro_batches):
    for row, mask in enumerate(part.loss_mask):
      for n in np.unique(part.trajectory[row, mask]):
        found[n // NUM_SAMPLES].add((i, row))
  return found


@pytest.mark.parametrize('layout, num_lens, num_parts', [
    ('lengths', 2, 2), ('length', 1, 2), ('few rows', 1, 6)])
def test_groups_share_rows_and_one_is_split(layout, num_lens, num_parts):
  made = rows_of(layout)
  assert len(made) == num_parts
  assert len({part.tokens.shape for part in made}) == num_lens
  rows = stands_in(made)
  assert max(map(len, rows)) > 1 and min(map(len, rows)) == 1
  assert any(a & b for a, b in itertools.combinations(rows, 2))


def test_there_is_a_gradient_into_the_prefix():
  prefixes, others = (
      {int(t) for part in rows_of('lengths')
       for t in part.tokens[(part.meta.group >= 0) & is_wanted(part)]}
      for is_wanted in (
          lambda part: part.meta.branch == 0,
          lambda part: part.meta.branch > 0))
  only_read_there = sorted(prefixes - others)
  assert len(only_read_there) > 10
  mu = first_moment(want('dense')[0])['embedding']
  assert (np.abs(mu[only_read_there]).max(axis=1) > 0).all()


@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('mesh, layout', [
    *((mesh, 'lengths') for mesh in ({}, *ALONE)),
    *((mesh, 'length') for mesh in TOGETHER)], ids=name)
def test_every_mesh_takes_the_step_of_repeated_prompts(kind, mesh, layout):
  got = outcome(kind, key(mesh), layout, attention='blockwise')
  assert_same_step(got, want(kind))


@pytest.mark.parametrize('kind, mesh', [
    ('dense', dict(seq=8)), ('moe', dict(fsdp=2, seq=2, expert=2))], ids=name)
def test_the_ring_does_too(kind, mesh):
  got = outcome(
      kind, key(mesh), 'length', attention='blockwise',
      context_parallel='ring')
  assert_same_step(got, want(kind))


@pytest.mark.parametrize('kind, remat', [
    ('dense', 'block'), ('dense', 'attention'), ('dense', 'offload'),
    ('moe', 'attention')])
def test_recomputation_and_micro_batches_change_nothing(kind, remat):
  got = outcome(
      kind, key(dict(fsdp=2, seq=2, tensor=2)), 'few rows',
      attention='blockwise', context_parallel='ring', remat=remat)
  assert_same_step(got, want(kind))


@pytest.mark.parametrize('kind', MODELS)
def test_bfloat16_on_a_mesh_is_as_near_to_float32_as_on_one_device(kind):
  mesh = key(dict(fsdp=2, seq=2, expert=2))

  def gap(got):
    """Largest error of a gradient, in units of the largest in its array."""
    of_got, of_want = (
        jax.tree.leaves(first_moment(x[0])) for x in (got, want(kind)))
    return max(np.abs(g - w).max() / np.abs(w).max()
               for g, w in zip(of_got, of_want))

  alone, spread = (
      outcome(kind, m, 'length', attention='blockwise', dtype='bfloat16')
      for m in ((), mesh))
  assert all(
      x.dtype == np.float32 for x in jax.tree.leaves(spread[0].params))
  assert 1e-4 < gap(alone)
  assert gap(spread) < 2.0 * gap(alone)

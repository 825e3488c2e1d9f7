"""The sampler of a mixture of experts, and its routing in the trainer."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from longjax.model import architecture, compute
from longjax.rl import batch
from longjax.rollout import decode, engine
from longjax.train import step
from tests import tiny_model

MODEL = dataclasses.replace(
    tiny_model.MODEL, ffn_dim=16,
    moe=architecture.MoeConfig(num_experts=8, num_active=3))
COMPUTE = compute.Compute(attention='reference')
PROMPTS = tiny_model.prompts([4, 1, 16, 9, 2, 12, 7, 7])
MAX_LEN = 6


@functools.cache
def sampled(mesh=()):
  made = engine.Engine(
      model=MODEL, stop_ids=(5, 17, 40, 41), compute=COMPUTE,
      sampler=decode.SamplerConfig(max_response_len=MAX_LEN),
      engine=engine.EngineConfig(
          prompt_buckets=(16,), prompts_at_once=8, samples_per_prompt=2),
      rules=tiny_model.rules(**dict(mesh)), record_experts=True)
  return made.sample(
      tiny_model.params(model=MODEL), PROMPTS, jax.random.key(0),
      num_samples=2)


@functools.cache
def packed():
  return tiny_model.packed(PROMPTS, sampled(), row_len=40, num_rows=8)


@functools.cache
def scorer(mesh, compute):
  return jax.jit(functools.partial(
      step.token_scores, config=MODEL, temperature=1.0,
      rules=tiny_model.rules(**dict(mesh)), compute=compute))


def scores(rows, params, mesh=(), compute=COMPUTE):
  return jax.device_get(scorer(mesh, compute)(params, rows))


@pytest.mark.parametrize('mesh', [
    dict(expert=8), dict(seq=4, expert=2), dict(fsdp=2, tensor=2, data=2)],
    ids=str)
def test_a_mesh_writes_and_routes_the_same(mesh):
  got, want = sampled(tuple(mesh.items())), sampled()
  for name in ('tokens', 'lengths', 'expert_ids'):
    np.testing.assert_array_equal(
        getattr(got, name), getattr(want, name), err_msg=name)
  for p, prompt in enumerate(PROMPTS):  # Padding may go anywhere.
    read = slice(len(prompt.tokens) - 1)
    np.testing.assert_array_equal(
        got.prompt_expert_ids[p, read], want.prompt_expert_ids[p, read])
  np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=0, atol=1e-5)


def test_the_trainer_routes_as_the_sampler_did():
  rows = packed()
  assert rows.expert_ids.dtype == np.uint8
  choosing = dataclasses.replace(rows, expert_ids=None)
  got = scores(choosing, tiny_model.params(model=MODEL))
  routed = np.moveaxis(got.routing.expert_ids, 0, 2)
  is_token = rows.meta.group >= 0
  np.testing.assert_array_equal(routed[is_token], rows.expert_ids[is_token])
  by_response = batch.unpack(
      [got.head.logprobs], [rows], num_responses=16,
      max_response_len=MAX_LEN)
  np.testing.assert_allclose(
      by_response, sampled().logprobs.reshape(16, MAX_LEN), rtol=0, atol=1e-5)


@pytest.mark.parametrize('mesh', [(), (('seq', 4), ('expert', 2))], ids=str)
def test_replayed_experts_are_kept_when_the_router_would_choose_others(mesh):
  rows, params = packed(), tiny_model.params(model=MODEL)
  layers = params['layers'] | {
      'router': np.roll(params['layers']['router'], 1, axis=2)}
  moved = params | {'layers': layers}
  is_token = rows.meta.group >= 0

  def routed(rows):
    ids = scores(rows, moved, mesh).routing.expert_ids
    return np.moveaxis(ids, 0, 2)

  own = routed(dataclasses.replace(rows, expert_ids=None))
  if not mesh:  # There, tokens stand in another order.
    assert (own[is_token] != rows.expert_ids[is_token]).mean() > 0.5
    np.testing.assert_array_equal(
        routed(rows)[is_token], rows.expert_ids[is_token])
  want = scores(rows, moved).head.logprobs
  np.testing.assert_allclose(
      scores(rows, moved, mesh).head.logprobs, want, rtol=0, atol=1e-5)
  ignored = scores(
      dataclasses.replace(rows, expert_ids=None), moved).head.logprobs
  assert np.abs(ignored - want).max() > 1e-2


def test_bfloat16_disagrees_less_when_experts_are_replayed():
  rows, params = packed(), tiny_model.params(model=MODEL)
  exact = scores(rows, params).head.logprobs

  def gap(rows):
    got = scores(rows, params, compute=compute.Compute(
        attention='reference', dtype='bfloat16')).head.logprobs
    return np.abs(got - exact)[rows.loss_mask].mean()

  assert 0.0 < gap(rows) < gap(dataclasses.replace(rows, expert_ids=None))

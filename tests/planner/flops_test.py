"""Operation counts against brute force and against jax's own programs."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import rows
from longjax.model import (
    architecture,
    compute,
    flash_attention,
    head,
    parameters,
    transformer,
)
from longjax.planner import flops
from tests import tiny_model

DENSE = architecture.ModelConfig(
    vocab_size=160, embed_dim=48, ffn_dim=80, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=16)
EXPERTS = architecture.ModelConfig(
    vocab_size=160, embed_dim=48, ffn_dim=24, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16,
    moe=architecture.MoeConfig(num_experts=6, num_active=2))


@pytest.mark.parametrize('num_prefix, branches', [
    (5, (3, 1, 4)), (0, (7,)), (9, ()), (1, (1,)), (30, (16,) * 8)])
def test_pairs_of_a_group_are_those_that_see_each_other(num_prefix, branches):
  size = num_prefix + sum(branches)
  meta = flops.row_meta([(num_prefix, branches)] * 2, row_len=2 * size + 3)
  seen = np.asarray(rows.visible(meta, meta)).sum()
  assert seen == 2 * flops.visible_pairs(num_prefix, branches)


def test_groups_are_laid_out_as_rows_are_written():
  def group(prompt_len, lens):
    return rows.Group(prompt=[1] * prompt_len, branches=[
        rows.Branch(response=[2] * n, trajectory=i)
        for i, n in enumerate(lens)])

  packed = rows.write([[group(6, (4, 2)), group(3, (1,))]], row_len=24)
  # The last prompt token stands at the head of each branch.
  made = flops.row_meta([(5, (4, 2)), (2, (1,))], row_len=24)
  jax.tree.map(np.testing.assert_array_equal, made, packed.meta)


@pytest.mark.parametrize('num_shards', [1, 4])
def test_executed_pairs_are_whole_blocks_of_those_that_meet(num_shards):
  num_prefix, branches, block_len = 200, (60, 60), 16
  meta = flops.row_meta([(num_prefix, branches)], row_len=384)
  seen = np.asarray(rows.visible(meta, meta))[0]
  blocks = seen.reshape(24, block_len, 24, block_len).any(axis=(1, 3))
  pairs, imbalance = flops.executed_pairs(
      meta, block_len=block_len, num_shards=num_shards)
  # Never fewer than needed; ranges let a few blocks more meet at borders.
  assert blocks.sum() * block_len**2 <= pairs
  assert pairs <= 1.1 * blocks.sum() * block_len**2
  assert pairs == block_len**2 * int(flash_attention.num_executed_blocks(
      meta, meta, block_len=block_len)[0])
  assert 1.0 <= imbalance <= (1.0 if num_shards == 1 else 1.1)


def products(jaxpr) -> float:
  """Operations of all matrix products of a program, scans unrolled."""
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      contracted = eqn.params['dimension_numbers'][0][0]
      total += 2 * np.prod(eqn.outvars[0].aval.shape) * np.prod(
          [eqn.invars[0].aval.shape[i] for i in contracted])
    elif eqn.primitive.name.startswith('ragged_dot'):
      # Each row of tokens meets one matrix, forward and backward.
      sizes = sorted(v.aval.shape for v in eqn.invars[:2])
      matrix = next(s for s in [*sizes, eqn.outvars[0].aval.shape]
                    if len(s) == 3)
      tokens = next(s for s in sizes if len(s) == 2)[0]
      total += 2 * tokens * matrix[1] * matrix[2]
    times = (
        eqn.params['length'] if eqn.primitive.name == 'scan' else 1)
    total += times * sum(
        map(products, jax.extend.core.jaxprs_in_params(eqn.params)))
  return total


def forward_and_loss(model, remat=compute.Remat.NONE):
  """Hidden states, and a scalar of the log-probabilities, as functions."""
  rules = tiny_model.rules()
  how = compute.Compute(attention='reference', remat=remat)

  def hidden(params, tokens, meta):
    return transformer.hidden_states(
        params, tokens, meta, config=model, rules=rules, compute=how).states

  def loss(params, tokens, meta):
    states = hidden(params, tokens, meta)
    return jnp.sum(head.logprobs_and_entropy(
        states, parameters.head_weights(params), tokens, tokens >= 0,
        rules=rules).logprobs)

  return hidden, loss


def arguments(model, num_rows, row_len):
  tokens = jax.ShapeDtypeStruct((num_rows, row_len), jnp.int32)
  return parameters.abstract(model), tokens, rows.TokenMeta(
      group=tokens, branch=tokens, position=tokens)


@pytest.mark.parametrize('model', [DENSE, EXPERTS], ids=['dense', 'experts'])
@pytest.mark.parametrize('remat', [compute.Remat.NONE, compute.Remat.BLOCK])
def test_counts_are_those_of_the_program(model, remat):
  args = arguments(model, 2, 40)
  hidden, loss = forward_and_loss(model, remat)
  # The reference backend computes every pair. Weighting the experts' outputs
  # is a product too, which we leave out.
  tolerance = 0.0 if model is DENSE else 0.01
  want = flops.forward(
      model, num_tokens=80, num_pairs=2 * 40**2, num_scored=0)
  got = products(jax.make_jaxpr(hidden)(*args).jaxpr)
  np.testing.assert_allclose(got, want.total, rtol=tolerance)

  once = flops.forward(
      model, num_tokens=80, num_pairs=2 * 40**2, num_scored=80)
  want = flops.executed_update(
      once, model, remat=remat, backward_matmuls=4, is_ring=False)
  got = products(jax.make_jaxpr(jax.grad(loss))(*args).jaxpr)
  np.testing.assert_allclose(got, want.total, rtol=2 * tolerance)
  if remat is compute.Remat.NONE:  # All that is spent but the head's logits.
    assert want.layers == flops.needed_update(once).layers
    assert want.attention == flops.needed_update(once).attention


def test_xla_counts_a_little_more_for_one_layer():
  # Of one layer XLA sees everything, elementwise operations too.
  model = architecture.ModelConfig(
      vocab_size=64, embed_dim=256, ffn_dim=512, num_layers=1, num_heads=4,
      num_kv_heads=2, head_dim=64)
  hidden, _ = forward_and_loss(model)
  cost = jax.jit(hidden).lower(
      *arguments(model, 1, 256)).compile().cost_analysis()
  ours = flops.forward(model, num_tokens=256, num_pairs=256**2, num_scored=0)
  assert 1.0 <= cost['flops'] / ours.total < 1.1


def test_parameters_are_counted_as_they_are():
  for model in (DENSE, EXPERTS):
    total = sum(
        np.prod(leaf.shape) for path, leaf in
        jax.tree_util.tree_leaves_with_path(parameters.abstract(model))
        if not path[-1].key.endswith('norm'))
    assert flops.num_parameters(model) == total
  qwen = architecture.ModelConfig(
      vocab_size=151936, embed_dim=2048, ffn_dim=768, num_layers=48,
      num_heads=32, num_kv_heads=4, head_dim=128,
      moe=architecture.MoeConfig(num_experts=128, num_active=8))
  # The model card says 30.5 and 3.3 with the embedding.
  assert round(flops.num_parameters(qwen) / 1e9, 1) == 30.5
  assert 3.3e9 < flops.num_active(qwen) + 151936 * 2048 < 3.4e9


def test_a_prompt_shared_by_eight_saves_what_the_design_says():
  # Architecture notes: 4.4 times at 120K + 8K, 1.8 times at 120K + 50K.
  qwen = architecture.ModelConfig(
      vocab_size=151936, embed_dim=2048, ffn_dim=768, num_layers=48,
      num_heads=32, num_kv_heads=4, head_dim=128,
      moe=architecture.MoeConfig(num_experts=128, num_active=8))

  def work(prompt, branches):
    return flops.forward(
        qwen, num_tokens=prompt + sum(branches), num_scored=sum(branches),
        num_pairs=flops.visible_pairs(prompt, branches)).total

  for prompt, response, factor in ((120e3, 8e3, 4.4), (120e3, 50e3, 1.8)):
    prompt, response = int(prompt), int(response)
    saved = 8 * work(prompt, (response,)) / work(prompt, (response,) * 8)
    assert abs(saved - factor) < 0.1

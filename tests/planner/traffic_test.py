"""Bytes by the analytic model against the collectives of traced programs."""

import collections

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import rows
from longjax.model import architecture, compute, parameters
from longjax.parallel import rules as rules_lib
from longjax.planner import topologies, traffic, transfer
from longjax.train import sft_job
from tests import tiny_model

DENSE = architecture.ModelConfig(
    vocab_size=160, embed_dim=32, ffn_dim=80, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=16)
EXPERTS = architecture.ModelConfig(
    vocab_size=160, embed_dim=32, ffn_dim=24, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16,
    moe=architecture.MoeConfig(num_experts=8, num_active=2))
NUM_ROWS, ROW_LEN = 8, 64


def sent(jaxpr, times=1) -> collections.Counter:
  """Bytes a device sends by each kind of collective; scans are unrolled."""
  total = collections.Counter()
  for eqn in jaxpr.eqns:
    name, axes = eqn.primitive.name, eqn.params.get('axis_name')
    if name in ('ppermute', 'all_gather', 'reduce_scatter', 'all_to_all'):
      larger = max(
          (v.aval for v in (*eqn.invars, *eqn.outvars)),
          key=lambda aval: aval.size)
      num_bytes = larger.size * larger.dtype.itemsize
      if name != 'ppermute':
        size = eqn.params.get('axis_size') or np.prod(
            [MESH_SIZES[a] for a in np.atleast_1d(axes)])
        num_bytes *= (size - 1) / size
      total[name] += times * num_bytes
    length = (
        eqn.params['length'] if eqn.primitive.name == 'scan' else 1)
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      total.update(sent(inner, times * length))
  return total


MESH_SIZES: dict[str, int] = {}


def traced(model, rules, **how):
  """Collectives that a loss and its gradient spell out."""
  MESH_SIZES.clear()
  MESH_SIZES.update(rules.mesh.shape)
  context = tiny_model.context(rules, model, **how)
  tokens = jax.ShapeDtypeStruct((NUM_ROWS, ROW_LEN), jnp.int32)
  batch = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(tokens.shape, x.dtype), rows.empty(1, 1))

  def loss(params, batch):
    return sft_job.loss(
        params, batch, {'num_tokens': 1.0}, context=context)[0]

  return sent(jax.make_jaxpr(jax.grad(loss))(
      parameters.abstract(model), batch).jaxpr)


def ours(model, rules, *, remat=compute.Remat.NONE, ring=True):
  found = collections.Counter()
  for one in traffic.of_rows(
      model, rules, num_rows=NUM_ROWS, row_len=ROW_LEN, ring=ring,
      dtype='bfloat16', passes=traffic.passes(remat), with_head=True):
    found[one.purpose] += one.num_bytes
  return found


@pytest.mark.parametrize('remat', [compute.Remat.NONE, compute.Remat.BLOCK])
def test_keys_travel_around_the_ring(remat):
  rules = tiny_model.rules(fsdp=2, seq=4)
  got = traced(DENSE, rules, attention='blockwise', context_parallel='ring',
               dtype='bfloat16', remat=remat)
  want = ours(DENSE, rules, remat=remat)
  # Whose keys they are travels too: 12 bytes a token beside 128.
  assert 1.0 <= got['ppermute'] / want['keys and values'] < 1.13


def test_keys_are_gathered_once_for_each_pass():
  rules = tiny_model.rules(fsdp=2, seq=4)
  got = traced(DENSE, rules, attention='blockwise',
               context_parallel='all_gather', dtype='bfloat16')
  want = ours(DENSE, rules, ring=False)
  gathered = want['keys and values'] + want['head']
  assert 1.0 <= got['all_gather'] / gathered < 1.15
  scattered = want['gradients of keys'] + want['gradient of head']
  np.testing.assert_allclose(got['reduce_scatter'], scattered)


@pytest.mark.parametrize('remat', [compute.Remat.NONE, compute.Remat.BLOCK])
def test_tokens_travel_to_experts_and_experts_are_gathered(remat):
  rules = tiny_model.rules(fsdp=4, expert=2)
  got = traced(EXPERTS, rules, attention='blockwise', dtype='bfloat16',
               remat=remat)
  want = ours(EXPERTS, rules, remat=remat)
  assert 0.9 < got['ppermute'] / want['tokens to experts'] < 1.1
  gathered = want['experts'] + want['head']
  assert 0.9 < got['all_gather'] / gathered < 1.1
  np.testing.assert_allclose(
      got['reduce_scatter'],
      want['gradients of experts'] + want['gradient of head'])
  np.testing.assert_allclose(got['all_to_all'], want['embeddings'], rtol=0.01)


def test_one_device_sends_nothing():
  assert not ours(EXPERTS, tiny_model.rules())


def test_a_ring_uses_half_the_links_of_a_gather():
  chip = topologies.chip('v5p:2x2x1')
  seconds = {
      kind: transfer.Transfer(
          purpose='', kind=kind, num_devices=8, num_bytes=1e9).seconds(chip)
      for kind in transfer.Kind}
  np.testing.assert_allclose(seconds[transfer.Kind.ONE_WAY], 0.01)
  np.testing.assert_allclose(seconds[transfer.Kind.BOTH_WAYS], 0.005)
  np.testing.assert_allclose(seconds[transfer.Kind.SCATTERED], 0.01)


def test_the_sampler_gathers_what_lies_in_pieces():
  rules = rules_lib.Rules(tiny_model.rules(fsdp=2, seq=2, expert=2).mesh)
  weights, experts = traffic.sampler_weights(EXPERTS, rules, dtype='bfloat16')
  per_expert = 2 * 8 * 3 * 32 * 24
  np.testing.assert_allclose(experts.num_bytes, per_expert * 2 / 2 * 3 / 4)
  assert weights.num_devices == 8

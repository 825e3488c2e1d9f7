"""Counts of needed work against loops over every token, pair and matrix."""

import dataclasses

import jax
import numpy as np
import pytest

from longjax import rows
from longjax.bench import suite, workload
from longjax.model import architecture, parameters
from longjax.rl import batch
from tests import tiny_model

MOE = dataclasses.replace(
    tiny_model.MODEL,
    moe=architecture.MoeConfig(num_experts=4, num_active=2))


def made(**facts):
  case = suite.Case(**dict(
      program='update', prompt_len=6, num_samples=3, response_len=5,
      shortest_response=2) | facts)
  return workload.make(
      case, num_prompts=2, vocab_size=tiny_model.MODEL.vocab_size, seed=1)


def packed(work):
  [part] = batch.pack(
      work.prompts, work.rollouts, row_lens=(256,),
      num_rows=1).micro_batches
  return part


def matrix_sizes(model):
  """Multiplications of one token with the layers, and with the head."""
  def of(path, leaf):
    name = path[-1].key
    if name.endswith('norm') or name == 'embedding':
      return 0
    if leaf.ndim == 4 and model.moe and name in ('gate', 'up', 'down'):
      return leaf.size // model.moe.num_experts * model.moe.num_active
    return leaf.size
  sizes = jax.tree_util.tree_map_with_path(of, parameters.abstract(model))
  return (sum(jax.tree.leaves(sizes['layers'])),
          model.embed_dim * model.vocab_size)


def brute_force(num_tokens, num_pairs, num_scored, model):
  in_layers, in_head = matrix_sizes(model)
  per_pair = 2 * 2 * model.num_layers * model.num_heads * model.head_dim
  return (2 * num_tokens * in_layers + per_pair * num_pairs
          + 2 * num_scored * in_head)


@pytest.mark.parametrize('model', [tiny_model.MODEL, MOE])
@pytest.mark.parametrize('is_shared', [True, False])
def test_operations_of_rows_are_those_of_every_visible_pair(is_shared, model):
  work = made() if is_shared else workload.unshared(made())
  part = packed(work)
  is_token = part.meta.group >= 0
  num_pairs = int(np.sum(rows.visible(part.meta, part.meta)))
  want = brute_force(
      int(is_token.sum()), num_pairs, int(part.loss_mask.sum()), model)
  assert workload.needed_flops('score', work, model).total == want
  assert workload.needed_flops('update', work, model).total == 3 * want


def test_operations_of_prefill_are_those_of_the_prompts():
  work = made()
  pairs = sum(t + 1 for _ in range(2) for t in range(5))
  assert workload.needed_flops('prefill', work, tiny_model.MODEL).total == (
      brute_force(2 * 5, pairs, 0, tiny_model.MODEL))
  assert workload.num_tokens('prefill', work) == 10


@pytest.mark.parametrize('is_shared', [True, False])
def test_decoding_counts_token_by_token(is_shared):
  shared = made()
  work = shared if is_shared else workload.unshared(shared)
  model = tiny_model.MODEL
  num_tokens = num_pairs = num_bytes = 0
  weights = sum(matrix_sizes(model))
  of_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
  for p, prompt in enumerate(work.prompts):
    for step in range(1, int(work.lengths[p].max()) + 1):
      writing = [n for n in work.lengths[p] if n >= step]
      num_tokens += len(writing)
      num_pairs += len(writing) * (len(prompt.tokens) - 1 + step)
      num_bytes += of_token * (
          len(prompt.tokens) - 1 + len(writing) * step)
  num_bytes += weights * int(work.lengths.max())
  assert workload.num_tokens('decode', work) == num_tokens
  assert workload.needed_flops('decode', work, model).total == brute_force(
      num_tokens, num_pairs, num_tokens, model)
  assert workload.decode_bytes(work, model, width=2) == 2 * num_bytes


def test_sharing_needs_less_of_the_same():
  shared = made()
  many = workload.unshared(shared)
  ratio = (workload.needed_flops('update', many, tiny_model.MODEL).total
           / workload.needed_flops('update', shared, tiny_model.MODEL).total)
  assert 1.0 < ratio < 3.0
  assert many.num_response_tokens == shared.num_response_tokens
  assert many.num_prompt_tokens == 3 * shared.num_prompt_tokens


def test_unshared_holds_the_same_responses_to_the_same_prompts():
  shared = made()
  many = workload.unshared(shared)
  for i, prompt in enumerate(many.prompts):
    p, g = divmod(i, 3)
    assert prompt.tokens == shared.prompts[p].tokens
    np.testing.assert_array_equal(
        many.rollouts.tokens[i, 0], shared.rollouts.tokens[p, g])
  assert len({prompt.number for prompt in many.prompts}) == 6


def test_distinct_prompts_share_no_beginning():
  many = workload.unshared(made(), are_distinct=True)
  assert len({prompt.tokens[0] for prompt in many.prompts[:3]}) == 3
  assert many.prompts[0].tokens[1:] == many.prompts[2].tokens[1:]


def test_lengths_are_as_asked():
  assert set(made(shortest_response=0).lengths.flat) == {5}
  lengths = made(num_samples=50).lengths
  assert set(lengths.flat) == {2, 3, 4, 5}
  tokens = np.asarray(made(num_samples=50).rollouts.tokens)
  np.testing.assert_array_equal((tokens > 0).sum(axis=2), lengths)

"""Tests for longjax.model.transformer; `huggingface_test` has the maths."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import rows
from longjax.model import compute as compute_lib
from longjax.model import parameters, transformer
from tests import tiny_model

MODEL = tiny_model.MODEL
RULES = tiny_model.rules()


def packed():
  """Two groups in one row, one of them with two branches, and padding."""
  rng = np.random.default_rng(0)

  def ids(n):
    return rng.integers(1, MODEL.vocab_size, n).tolist()

  groups = [
      rows.Group(prompt=ids(5), branches=[
          rows.Branch(response=ids(4), trajectory=0),
          rows.Branch(response=ids(3), trajectory=1)]),
      rows.Group(prompt=ids(4), branches=[
          rows.Branch(response=ids(2), trajectory=2)])]
  return rows.pack(groups, row_len=19)


@functools.cache
def hidden_program(backend='reference', remat='none'):
  compute = compute_lib.Compute(
      attention=backend, remat=compute_lib.Remat(remat))

  def states(params, tokens, meta):
    return transformer.hidden_states(
        params, tokens, meta, config=MODEL, rules=RULES,
        compute=compute).states

  return jax.jit(states)


@pytest.mark.parametrize('backend', ['reference', 'blockwise'])
def test_a_token_influences_exactly_those_that_see_it(backend):
  batch = packed()
  places = jnp.arange(batch.tokens.shape[1])[None]
  direction = np.float32(
      np.random.default_rng(1).normal(size=MODEL.embed_dim))

  @jax.jit
  @jax.jacrev
  def influence(embedded):
    # One embedding row a place, so that each place is a variable of its own.
    hidden = transformer.hidden_states(
        tiny_model.params() | {'embedding': embedded}, places, batch.meta,
        config=MODEL, rules=RULES,
        compute=compute_lib.Compute(attention=backend)).states
    return hidden[0] @ direction

  embedded = tiny_model.params()['embedding'][batch.tokens[0]]
  # bool[reader, read]
  got = np.abs(influence(embedded)).sum(axis=2) > 1e-7
  is_token = batch.meta.group[0] >= 0
  want = np.asarray(rows.visible(batch.meta, batch.meta))[0]
  np.testing.assert_array_equal(got[is_token], want[is_token])


def test_backends_and_recomputation_agree():
  batch = packed()
  is_token = batch.meta.group >= 0
  want = hidden_program()(tiny_model.params(), batch.tokens, batch.meta)
  got = hidden_program('blockwise', 'block')(
      tiny_model.params(), batch.tokens, batch.meta)
  np.testing.assert_allclose(
      got[is_token], want[is_token], rtol=0, atol=1e-5)


@functools.cache
def gradient_program(remat):
  """Compiled gradient of eight layers over a row of 1,024 tokens."""
  model = dataclasses.replace(MODEL, num_layers=8)
  compute = compute_lib.Compute(attention='blockwise', remat=remat)

  def total(params, tokens, meta):
    return jnp.sum(transformer.hidden_states(
        params, tokens, meta, config=model, rules=RULES,
        compute=compute).states ** 2)

  field = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
  return jax.jit(jax.grad(total)).lower(
      parameters.abstract(model), field,
      rows.TokenMeta(field, field, field)).compile()


def test_recomputation_saves_memory_and_spares_attention_if_asked():
  kinds = ('none', 'attention', 'block')
  programs = [gradient_program(compute_lib.Remat(kind)) for kind in kinds]
  none, attention, block = (
      p.memory_analysis().temp_size_in_bytes for p in programs)
  assert block < attention < none / 3
  # Attention's loops: forward, backward, and where it is computed again.
  none, attention, block = (p.as_text().count(' while(') for p in programs)
  assert none == attention < block


def test_fresh_parameters_keep_the_residual_stream_near_one():
  config = dataclasses.replace(MODEL, num_layers=6)
  init = jax.jit(functools.partial(parameters.init, config))
  params = init(jax.random.key(0))
  fan_in = {'query': 32, 'key': 32, 'value': 32, 'output': 32 * 12,
            'gate': 32, 'up': 32, 'down': 48 * 12}
  for name, fan in fan_in.items():
    np.testing.assert_allclose(
        params['layers'][name].std(), fan**-0.5, rtol=0.1, err_msg=name)
  np.testing.assert_array_equal(params['final_norm'], 1.0)
  # Layers differ, and so do seeds.
  assert (params['layers']['query'][0] != params['layers']['query'][1]).any()
  other = init(jax.random.key(1))
  assert (other['embedding'] != params['embedding']).any()


def test_tied_models_have_no_head_of_their_own():
  tied = dataclasses.replace(MODEL, tied_embeddings=True)
  assert 'head' not in parameters.axes(tied)
  shapes = parameters.abstract(tied)
  assert 'head' not in shapes
  params = {k: v for k, v in tiny_model.params().items() if k != 'head'}
  np.testing.assert_array_equal(
      parameters.head_weights(params), params['embedding'].T)


def test_rms_norm_is_its_formula():
  rng = np.random.default_rng(0)
  x, weight = rng.normal(size=(2, 3, 8)), rng.normal(size=8)
  want = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 0.5) * weight
  got = transformer.rms_norm(
      jnp.float32(x), jnp.float32(weight), epsilon=0.5)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_activations_follow_the_rules_of_the_mesh():
  rules = tiny_model.rules(data=2, fsdp=4)
  batch = jax.tree.map(lambda x: np.tile(x, (8, 1)), packed())
  hidden = jax.jit(functools.partial(
      transformer.hidden_states, config=MODEL, rules=rules,
      compute=compute_lib.Compute()))(
          tiny_model.params(),
          *jax.device_put((batch.tokens, batch.meta),
                          rules.sharding('batch', 'seq'))).states
  assert hidden.sharding.is_equivalent_to(
      rules.sharding('batch', 'seq', 'activation_embed'), 3)
  want = hidden_program()(tiny_model.params(), batch.tokens, batch.meta)
  np.testing.assert_allclose(hidden, want, rtol=0, atol=1e-5)

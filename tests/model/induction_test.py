"""The induction initialisation, before any training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import types
from longjax.model import architecture, induction, rope, transformer

CONFIG = architecture.ModelConfig(
    vocab_size=96, embed_dim=128, ffn_dim=32, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=32, rope_theta=1e6)


def fresh(config=CONFIG):
  return jax.jit(lambda key: transformer.init(config, key))(jax.random.key(0))


def weight_on_previous_token(params):
  """Attention weights of layer 0's first head one token back; f[T - 1]."""
  tokens = np.random.default_rng(0).permutation(CONFIG.vocab_size)[:48]
  layer = {name: x[0] for name, x in params['layers'].items()}
  angle = rope.angles(
      jnp.arange(48)[None], head_dim=CONFIG.head_dim, theta=CONFIG.rope_theta)
  seen = {}

  def attend(q, k, v):
    seen.update(q=np.asarray(q[0, :, 0]), k=np.asarray(k[0, :, 0]))
    return jnp.zeros_like(q), None

  transformer.block(
      layer, params['embedding'][tokens][None], angle, attend,
      epsilon=CONFIG.norm_epsilon)
  scores = seen['q'] @ seen['k'].T / CONFIG.head_dim**0.5
  scores[np.triu_indices(48, 1)] = -np.inf
  weights = np.exp(scores - scores.max(axis=1, keepdims=True))
  weights /= weights.sum(axis=1, keepdims=True)
  return np.diagonal(weights, -1)


def test_the_first_layer_looks_one_token_back_before_any_training():
  params = fresh()
  circuit = induction.initialise(params, CONFIG, seed=0)
  jax.tree.map(
      lambda a, b: np.testing.assert_equal(a.shape, b.shape), params, circuit)
  assert weight_on_previous_token(circuit).mean() > 0.5
  assert weight_on_previous_token(params).mean() < 0.2


def test_the_same_seed_gives_the_same_parameters():
  params = fresh()
  one, two, other = (
      induction.initialise(params, CONFIG, seed=seed) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, two)
  assert not np.array_equal(one['embedding'], other['embedding'])


@pytest.mark.parametrize('change', [{'num_layers': 1}, {'embed_dim': 64}])
def test_a_network_too_small_for_the_circuit_is_refused(change):
  config = dataclasses.replace(CONFIG, **change)
  with pytest.raises(types.UserError, match='initialisation=induction'):
    induction.initialise(fresh(config), config, seed=0)

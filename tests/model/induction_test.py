"""The induction initialisation, before any training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import types
from longjax.model import architecture, induction, parameters, transformer
from tests import tiny_model

CONFIG = architecture.ModelConfig(
    vocab_size=96, embed_dim=128, ffn_dim=32, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=32, rope_theta=1e6)


def fresh(config=CONFIG):
  return jax.jit(lambda key: parameters.init(config, key))(jax.random.key(0))


def attention_weights(params):
  """Of 24 distinct tokens said twice: f[layer, head, query, key]."""
  tokens = np.tile(
      np.random.default_rng(0).permutation(CONFIG.vocab_size)[:24], 2)
  position = jnp.arange(48)[None]
  angle = transformer.angles(position, CONFIG)
  collected = []

  def attend(q, k, v):
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))  # N / K heads share.
    scores = jnp.einsum('bqnh,bsnh->bnqs', q, k) / CONFIG.head_dim**0.5
    weights = jax.nn.softmax(
        jnp.where(jnp.tri(48, dtype=bool)[None, None], scores, -jnp.inf))
    collected.append(weights[0])
    return jnp.einsum('bnqs,bsnh->bqnh', weights, v), None

  x = params['embedding'][tokens][None]
  for i in range(CONFIG.num_layers):
    layer = {name: values[i] for name, values in params['layers'].items()}
    x, _, _ = transformer.block(
        layer, x, angle, attend, config=CONFIG, rules=tiny_model.rules())
  return np.asarray(collected)


def weight_on_previous_token(params):
  """Attention weights of layer 0's first head one token back; f[T - 1]."""
  return np.diagonal(attention_weights(params)[0, 0], -1)


def weight_on_what_followed(params):
  """Of layer 1's heads, where the current token stood before; f[N]."""
  query = np.arange(24, 47)
  return attention_weights(params)[1][:, query, query - 23].mean(axis=1)


def test_the_first_layer_looks_one_token_back_before_any_training():
  params = fresh()
  circuit = induction.initialise(params, CONFIG, seed=0)
  jax.tree.map(
      lambda a, b: np.testing.assert_equal(a.shape, b.shape), params, circuit)
  assert weight_on_previous_token(circuit).mean() > 0.5
  assert weight_on_previous_token(params).mean() < 0.2


def test_every_head_of_the_second_layer_leans_to_what_followed_before():
  circuit = induction.initialise(fresh(), CONFIG, seed=0)
  chance = np.mean(1.0 / np.arange(25, 48))
  assert weight_on_what_followed(circuit).min() > 2.0 * chance
  assert weight_on_what_followed(fresh()).max() < 2.0 * chance


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

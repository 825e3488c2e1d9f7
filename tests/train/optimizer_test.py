"""Tests for longjax.train.optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longjax import types
from longjax.train import optimizer as optimizer_lib
from tests import tiny_model


@pytest.mark.parametrize('schedule, warmup, expected', [
    ('constant', 0, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ('constant', 2, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ('cosine', 0, [0.1 + 0.45 * (1 + np.cos(np.pi * i / 4)) for i in range(5)]
     + [0.1]),
    ('cosine', 2, [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]),
])
def test_the_learning_rate_follows_its_schedule(schedule, warmup, expected):
  optimizer = optimizer_lib.make(
      optimizer_lib.OptimizerConfig(
          learning_rate=0.3, warmup_steps=warmup,
          schedule=optimizer_lib.Schedule(schedule)),
      num_steps=4)
  # Under a constant gradient Adam steps by the learning rate; 1 - 0.999^t in
  # float32 is good to four digits.
  params, gradients = {'query': jnp.ones(3)}, {'query': 0.1 * jnp.ones(3)}
  opt_state = optimizer.init(params)
  for want in expected:
    updates, opt_state = jax.jit(optimizer.update)(
        gradients, opt_state, params)
    np.testing.assert_allclose(
        -updates['query'], 0.3 * want, rtol=1e-4, atol=1e-8)


def test_weight_decay_spares_norms():
  optimizer = optimizer_lib.make(
      optimizer_lib.OptimizerConfig(learning_rate=0.1, weight_decay=0.5),
      num_steps=1)
  params = tiny_model.params()
  zeros = jax.tree.map(np.zeros_like, params)
  updates, _ = jax.jit(
      lambda: optimizer.update(zeros, optimizer.init(params), params))()

  def one(path, update, value):
    is_norm = path[-1].key in (
        'final_norm', 'attention_norm', 'ffn_norm', 'query_norm', 'key_norm')
    np.testing.assert_allclose(
        update, 0.0 if is_norm else -0.05 * value, rtol=1e-6)

  jax.tree_util.tree_map_with_path(one, updates, params)


def test_gradients_are_clipped_by_their_global_norm():
  def first_moment(size):
    optimizer = optimizer_lib.make(
        optimizer_lib.OptimizerConfig(learning_rate=0.1, clip_norm=2.0),
        num_steps=1)
    gradients = {'a': size * jnp.ones(3), 'b': size * jnp.ones(1)}
    _, opt_state = optimizer.update(
        gradients, optimizer.init(gradients), gradients)
    return optax.tree_utils.tree_get(opt_state, 'ScaleByAdamState').mu

  np.testing.assert_allclose(first_moment(0.5)['a'], 0.05, rtol=1e-6)
  np.testing.assert_allclose(first_moment(8.0)['a'], 0.1, rtol=1e-6)
  np.testing.assert_allclose(first_moment(8.0)['b'], 0.1, rtol=1e-6)


@pytest.mark.parametrize('field, value', [
    ('learning_rate', 0.0), ('clip_norm', 0.0), ('warmup_steps', -1),
    ('weight_decay', -0.1), ('b1', 1.0), ('b2', -0.5)])
def test_impossible_optimizers_are_refused(field, value):
  with pytest.raises(types.UserError, match=f'optimizer.{field}={value}'):
    optimizer_lib.OptimizerConfig(**{'learning_rate': 1.0} | {field: value})


def test_factored_moments_take_a_quarter_of_the_memory_and_still_learn():
  params = {'up': jnp.ones((256, 512)), 'final_norm': jnp.ones(512)}
  sizes, losses = {}, {}
  for moments in optimizer_lib.Moments:
    optimizer = optimizer_lib.make(
        optimizer_lib.OptimizerConfig(learning_rate=0.02, moments=moments),
        num_steps=30)
    state, now = optimizer.init(params), params
    sizes[moments] = sum(x.nbytes for x in jax.tree.leaves(state))

    def loss(params):
      # Different scales a row, as second moments are for.
      rows = jnp.linspace(0.01, 10.0, 256)[:, None]
      return jnp.sum(rows * params['up'] ** 2) + jnp.sum(
          params['final_norm'] ** 2)

    @jax.jit
    def step(params, state, optimizer=optimizer):
      updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      return optax.apply_updates(params, updates), state

    for _ in range(30):
      now, state = step(now, state)
    losses[moments] = float(loss(now) / loss(params))
  assert sizes['factored'] < 0.26 * sizes['full']
  assert losses['full'] < 0.4 and losses['factored'] < 0.4, losses

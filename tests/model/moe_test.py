"""The mixture of experts against its definition, token by token in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax.model import architecture, moe
from tests import tiny_model

B, T, D, F, E, A = 4, 6, 8, 5, 8, 3
CONFIG = architecture.MoeConfig(num_experts=E, num_active=A)
RAW = architecture.MoeConfig(
    num_experts=E, num_active=A, normalize_weights=False)


@functools.cache
def layer():
  rng = np.random.default_rng(0)
  shapes = dict(
      router=(D, E), gate=(E, D, F), up=(E, D, F), down=(E, F, D))
  return {name: np.float32(rng.normal(size=shape) / 2)
          for name, shape in shapes.items()}


@functools.cache
def inputs():
  rng = np.random.default_rng(1)
  is_token = np.ones((B, T), bool)
  is_token[1, 4:] = is_token[3] = False
  return np.float32(rng.normal(size=(B, T, D))), is_token


def reference(x, is_token, config, expert_ids=None):
  """Output, expert ids and load, one token at a time."""
  weights = {name: np.float64(w) for name, w in layer().items()}
  out, load = np.zeros(x.shape), np.zeros(E)
  ids = np.zeros((B, T, A), int)
  for b, t in np.ndindex(B, T):
    token = np.float64(x[b, t])
    logits = token @ weights['router']
    p = np.exp(logits - logits.max())
    p /= p.sum()
    chosen = (
        np.argsort(-p)[:A] if expert_ids is None else expert_ids[b, t])
    ids[b, t] = chosen
    if not is_token[b, t]:
      continue
    total = p[chosen].sum() if config.normalize_weights else 1.0
    for e in chosen:
      gate = token @ weights['gate'][e]
      hidden = gate / (1 + np.exp(-gate)) * (token @ weights['up'][e])
      out[b, t] += p[e] / total * (hidden @ weights['down'][e])
      load[e] += 1
  return out, ids, load


def run(mesh=(), config=CONFIG, expert_ids=None, x=None):
  """Output, routing, and gradients of a weighted sum of the output."""
  rules = tiny_model.rules(**dict(mesh))
  given, is_token = inputs()
  x = given if x is None else x
  weight = np.float32(np.random.default_rng(2).normal(size=x.shape))

  @jax.jit
  def both(layer, x):
    def total(layer, x):
      out, routing = moe.mixture(
          layer, x, config=config, rules=rules, is_token=is_token,
          expert_ids=expert_ids)
      return jnp.sum(out.astype(jnp.float32) * weight), (out, routing)
    gradients, results = jax.grad(total, (0, 1), has_aux=True)(layer, x)
    return *results, gradients

  return jax.device_get(both(layer(), x))


@pytest.mark.parametrize('config', [CONFIG, RAW], ids=['normalized', 'raw'])
def test_the_output_is_the_definition(config):
  x, is_token = inputs()
  out, routing, _ = run(config=config)
  want, ids, load = reference(x, is_token, config)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(routing.expert_ids, ids)
  np.testing.assert_array_equal(routing.load, load)
  assert load.sum() == A * is_token.sum()


def test_gradients_are_those_of_finite_differences():
  x, is_token = inputs()
  *_, (d_layer, d_x) = run()
  weight = np.float32(np.random.default_rng(2).normal(size=x.shape))
  _, ids, _ = reference(x, is_token, CONFIG)
  rng = np.random.default_rng(3)

  def total():
    return np.sum(reference(x, is_token, CONFIG, ids)[0] * weight)

  for array, gradient in [(x, d_x), *(
      (layer()[name], d_layer[name]) for name in layer())]:
    for _ in range(4):
      i = tuple(rng.integers(n) for n in array.shape)
      kept, ends = array[i].copy(), []
      for step in (2.0**-7, -(2.0**-7)):
        array[i] = kept + step
        ends.append(total())
      array[i] = kept
      np.testing.assert_allclose(
          gradient[i], (ends[0] - ends[1]) / 2.0**-6, rtol=2e-3, atol=2e-4)
  assert not d_x[~is_token].any()


@pytest.mark.parametrize('mesh', [
    dict(expert=4, seq=2), dict(expert=2, seq=2, data=2),
    dict(fsdp=4, seq=2)], ids=str)
def test_the_size_of_the_expert_axis_changes_nothing(mesh):
  got, want = run(tuple(mesh.items())), run()
  np.testing.assert_array_equal(got[1].expert_ids, want[1].expert_ids)
  jax.tree.map(
      lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5),
      got, want)


def test_no_token_is_dropped_when_all_want_one_expert():
  x, is_token = inputs()
  everywhere = np.tile(np.int32([5, 2, 7]), (B, T, 1))
  out, routing, _ = run((('expert', 4), ('seq', 2)), expert_ids=everywhere)
  want, _, load = reference(x, is_token, CONFIG, everywhere)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(routing.load, load)
  assert load[5] == is_token.sum()


def test_experts_chosen_before_are_used_again():
  x, is_token = inputs()
  ids = np.random.default_rng(4).permuted(
      np.tile(np.int32(range(E)), (B, T, 1)), axis=2)[..., :A]
  out, routing, _ = run(expert_ids=ids)
  np.testing.assert_array_equal(routing.expert_ids, ids)
  np.testing.assert_allclose(
      out, reference(x, is_token, CONFIG, ids)[0], rtol=1e-5, atol=1e-6)


def test_experts_that_have_become_impossible_give_no_nan():
  # Padding of replayed rows names expert 0, whatever its probability.
  logits = jnp.float32([[-300.0, -300.0, 0.0, 0.0]])
  config = architecture.MoeConfig(num_experts=4, num_active=2)

  def total(logits):
    weights = moe.route(
        logits, config=config, expert_ids=jnp.int32([[0, 1]]))[1]
    return jnp.sum(weights * jnp.float32([[1.0, 2.0]])), weights

  gradient, weights = jax.grad(total, has_aux=True)(logits)
  np.testing.assert_allclose(weights, [[0.5, 0.5]])
  np.testing.assert_allclose(gradient, [[-0.25, 0.25, 0.0, 0.0]])


def test_bfloat16_tokens_are_routed_in_float32():
  x, is_token = inputs()
  x16 = jnp.bfloat16(x)
  out, routing, (d_layer, _) = run(x=x16)
  want, ids, _ = reference(np.float32(x16), is_token, CONFIG)
  np.testing.assert_array_equal(routing.expert_ids, ids)
  assert out.dtype == jnp.bfloat16
  assert all(g.dtype == np.float32 for g in jax.tree.leaves(d_layer))
  np.testing.assert_allclose(np.float32(out), want, rtol=0.05, atol=0.05)


def test_balance_tells_the_busiest_and_the_idle():
  got = moe.balance(jnp.float32([[2, 2, 2, 2], [8, 0, 0, 0]]))
  assert got['moe/max_load'] == (1 + 4) / 2
  assert got['moe/idle'] == 3 / 8

"""Tests for longjax.model.merge.

The oracle is in `numpy_merge`; see also `merge_parity_test`.
"""

import math
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from longjax import types
from longjax.model import architecture, huggingface_layout, merge
from tests import tiny_model
from tests.model import numpy_merge

DENSITIES = (0.1, 0.5, 1.0)
MOE = architecture.ModelConfig(
    vocab_size=24, embed_dim=16, ffn_dim=12, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=6,
    moe=architecture.MoeConfig(num_experts=3, num_active=2))


def grid_models(shape, num_experts=2, seed=0, dtype=np.float32):
  """Base and experts whose deltas, a third of them zero, are exact.

  Many are equal, in size or also in sign, within an expert and between them.
  """
  rng = np.random.default_rng(seed)
  base = rng.integers(-16, 17, shape) / 32
  deltas = rng.integers(-4, 5, (num_experts, *shape)) / 64
  deltas[rng.uniform(size=deltas.shape) < 0.25] = 0.0
  deltas[1:, rng.uniform(size=shape) < 0.1] = 0.0
  same = rng.uniform(size=shape) < 0.1
  deltas[:, same] = deltas[0, same]
  return base.astype(dtype), [(base + d).astype(dtype) for d in deltas]


def assert_close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('select', ['prune', 'coef_only'])
@pytest.mark.parametrize('density', [*DENSITIES, 0.003])
@pytest.mark.parametrize('shape, num_experts', [
    ((13, 7), 2), ((13, 7), 3), ((5, 3, 4), 4), ((37,), 2), ((1,), 3)])
def test_sce_is_what_the_equations_say(shape, num_experts, density, select):
  base, experts = grid_models(shape, num_experts)
  got = merge.matrix(base, experts, config=merge.MergeConfig(
      density=density, select=select))
  want, weights = numpy_merge.sce(base, experts, density, select)
  assert_close(got.value, want)
  assert_close(got.coefficients, weights)
  assert got.value.dtype == np.float32


# Of weights that are no sums of powers of two, ties would be rounding errors.
@pytest.mark.parametrize('weights', [(), (0.75, 0.25, 1.5), (0.0, 2.0, 1.0)])
@pytest.mark.parametrize('density', [*DENSITIES, 0.003])
def test_ties_is_what_the_algorithm_says(density, weights):
  base, experts = grid_models((11, 9), 3)
  got = merge.matrix(base, experts, config=merge.MergeConfig(
      method='ties', density=density, weights=weights))
  want = numpy_merge.ties(base, experts, density, weights or (1.0, 1.0, 1.0))
  assert_close(got.value, want)


@pytest.mark.parametrize('weights', [(), (0.7, 0.3, 3.0)])
def test_linear_is_the_weighted_mean_of_the_experts(weights):
  base, experts = grid_models((11, 9), 3)
  got = merge.matrix(base, experts, config=merge.MergeConfig(
      method='linear', weights=weights)).value
  assert_close(got, np.average(
      np.float64(experts), axis=0, weights=weights or None))


@pytest.mark.parametrize('method', ['sce', 'ties', 'linear'])
def test_blocks_and_the_order_of_axes_do_not_matter(monkeypatch, method):
  base, experts = grid_models((31, 29), 3)
  config = merge.MergeConfig(
      method=method, density=1.0 if method == 'linear' else 0.4)
  want = merge.matrix(base, experts, config=config).value
  monkeypatch.setattr(merge, '_BLOCK_LEN', 50)
  assert_close(merge.matrix(base, experts, config=config).value, want)
  spread = [np.asfortranarray(x) for x in (base, *experts)]
  np.testing.assert_array_equal(
      merge.matrix(spread[0], spread[1:], config=config).value,
      merge.matrix(base, experts, config=config).value)


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16])
def test_short_inputs_are_merged_in_float32_and_rounded_once(dtype):
  base, experts = grid_models((13, 7), dtype=dtype)
  config = merge.MergeConfig(density=0.5)
  got = merge.matrix(base, experts, config=config)
  wide = merge.matrix(base, experts, config=config, dtype=np.float32)
  assert got.value.dtype == dtype
  assert_close(wide.value, numpy_merge.sce(base, experts, 0.5, 'prune')[0])
  assert not np.array_equal(wide.value, got.value)
  np.testing.assert_array_equal(got.value, wide.value.astype(dtype))


def test_tiny_changes_are_told_apart():
  # mergekit's guard would give each expert a half.
  rng = np.random.default_rng(0)
  base = np.zeros((20, 30), np.float32)
  for size in (1e-7, 1e-15):
    changes = np.float32(size * rng.normal(size=(2, 20, 30)))
    changes[1] *= 3.0
    got = merge.matrix(base, changes, config=merge.MergeConfig(density=0.5))
    assert_close(got.coefficients, numpy_merge.sce(
        base, changes, 0.5, 'prune')[1])
    assert got.coefficients[1] > 0.8
    assert np.count_nonzero(got.value) == 300


def test_experts_that_changed_nothing_leave_the_base():
  base, _ = grid_models((6, 5))
  for density in DENSITIES:
    for method in ('sce', 'ties'):
      got = merge.matrix(base, [base, base, base], config=merge.MergeConfig(
          density=density, method=method))
      np.testing.assert_array_equal(got.value, base)
      np.testing.assert_array_equal(got.coefficients, np.full(3, 1 / 3))


def test_equal_changes_of_several_experts_are_no_difference():
  # 0.1 + 0.1 + 0.1 is not 3 * 0.1 in float32: a variance of rounding errors
  # would be selected, and what differs left out.
  base = np.zeros(1000, np.float32)
  change = np.random.default_rng(0).normal(size=1000).astype(np.float32)
  other = change.copy()
  other[:10] += np.float32(1e-3)
  got = merge.matrix(
      base, [change, change, other], config=merge.MergeConfig(density=0.5))
  changed = np.flatnonzero(got.value)
  assert len(changed) == 5 and max(changed) < 10


@pytest.mark.parametrize('density', [0.1, 0.5])
def test_pruning_unlearns_what_nested_experts_have_in_common(density):
  """The second expert was trained on from the first."""
  rng = np.random.default_rng(0)
  base = rng.normal(size=(100, 100)).astype(np.float32)
  first = base + np.float32(1e-2 * rng.normal(size=base.shape))
  second = first + np.float32(1e-3 * rng.normal(size=base.shape))

  def learnt(**changes):
    got = merge.matrix(
        base, [first, second], config=merge.MergeConfig(**changes)).value
    return np.vdot(got - base, first - base) / np.vdot(
        first - base, first - base)

  assert abs(learnt(density=density) - density) < 0.05
  assert learnt(density=density, select='coef_only') > 0.99
  assert learnt() > 0.99


def test_one_expert_is_itself():
  base, [expert] = grid_models((9, 9), 1)
  for method in ('sce', 'ties', 'linear'):
    got = merge.matrix(base, [expert], config=merge.MergeConfig(method=method))
    np.testing.assert_array_equal(got.value, expert)


@pytest.mark.parametrize('config', [
    merge.MergeConfig(density=0.3), merge.MergeConfig(),
    merge.MergeConfig(density=0.2, select='coef_only'),
    merge.MergeConfig(method='ties', density=0.3),
    merge.MergeConfig(method='linear', weights=(1.0, 3.0))])
@pytest.mark.parametrize('model', [tiny_model.MODEL, MOE], ids=['dense', 'moe'])
def test_stacked_parameters_are_merged_as_hugging_face_tensors(config, model):
  trees = [tiny_model.params(0, model)]
  for seed in (1, 2):
    noise = tiny_model.params(seed, model)
    trees.append(jax.tree.map(
        # Coarse: what is equally large must be chosen alike.
        lambda x, y: np.float32(x + np.round(3 * y) / 64), trees[0], noise))
  got = merge.tree(trees[0], trees[1:], model, config=config)

  def stored(leaf, layout):
    """Its tensors, cut out one by one."""
    for index in np.ndindex(*layout.shape[:layout.num_stacked]):
      part = leaf[index].transpose(layout.rows + layout.columns)
      yield np.ascontiguousarray(part).reshape(layout.tensor_shape)

  num_tensors = 0
  for layout, made, *leaves in zip(*map(
      jax.tree.leaves,
      (huggingface_layout.layouts(model), got, *trees)), strict=True):
    assert made.shape == layout.shape
    for tensor, base, *experts in zip(
        stored(made, layout), *(stored(x, layout) for x in leaves),
        strict=True):
      np.testing.assert_array_equal(
          tensor, merge.matrix(base, experts, config=config).value)
      num_tensors += 1
  assert num_tensors == sum(
      len(layout.tensor_names())
      for layout in jax.tree.leaves(huggingface_layout.layouts(model)))


def test_layers_do_not_share_their_coefficients():
  base, experts = grid_models((2, 3, 8, 8))
  experts[1][0, 1] = base[0, 1] + np.float32(8.0)
  got = merge.stacked(
      base, experts, num_batch_axes=2, config=merge.MergeConfig(density=0.5))
  whole = merge.matrix(
      base, experts, config=merge.MergeConfig(density=0.5)).value
  for index in np.ndindex(2, 3):
    alone = merge.matrix(
        base[index], [x[index] for x in experts],
        config=merge.MergeConfig(density=0.5)).value
    np.testing.assert_array_equal(got[index], alone)
    assert not np.array_equal(got[index], whole[index])


@pytest.mark.parametrize('density, most', [(1.0, 2.2), (0.3, 10.0)])
def test_little_more_is_held_than_what_is_given(monkeypatch, density, most):
  base, experts = grid_models((1000, 1000), dtype=ml_dtypes.bfloat16)
  monkeypatch.setattr(merge, '_BLOCK_LEN', 1000)
  tracemalloc.start()
  merge.matrix(base, experts, config=merge.MergeConfig(density=density))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # The result; and to select, variances, twice, and a mask.
  assert peak < most * base.size


@pytest.mark.parametrize('values, message', [
    ({'density': 0.0}, r'merge\.density=0\.0 must lie in \(0, 1\]; 1 takes'),
    ({'density': 1.5}, r'merge\.density=1\.5 must lie in'),
    ({'density': math.nan}, r'merge\.density=nan must lie in'),
    ({'density': 0.5, 'method': 'linear'}, 'density=0.5 does not go with'),
    ({'select': 'coef_only', 'method': 'ties'}, 'select=coef_only does not go'),
    ({'weights': (0.5, 0.5)}, r'weights=\(0.5, 0.5\) do not go with'),
    ({'weights': (1.0, -0.5), 'method': 'ties'}, 'must be >= 0'),
    ({'weights': (0.0, 0.0), 'method': 'linear'}, 'one of them > 0'),
    ({'weights': (1.0, math.inf), 'method': 'linear'}, 'must be >= 0'),
])
def test_mistakes_in_the_config_are_named(values, message):
  with pytest.raises(types.UserError, match=message):
    merge.MergeConfig(**values)


@pytest.mark.parametrize('values, count, message', [
    ({}, 0, 'experts is empty; name the models to merge'),
    ({'weights': (0.5, 0.5), 'method': 'ties'}, 3, 'are 2 for 3 experts'),
    ({'density': 0.5}, 1, 'density=0.5 selects nothing of one expert'),
])
def test_too_few_or_too_many_experts_are_refused(values, count, message):
  base, _ = grid_models((2, 2))
  with pytest.raises(types.UserError, match=message):
    merge.matrix(base, [base] * count, config=merge.MergeConfig(**values))

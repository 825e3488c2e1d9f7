"""Our merges are mergekit's.

What mergekit makes of small tensors is kept in tests/testdata/merge; where
mergekit is installed it is computed anew and compared too. After a change of
`CASES` or `METHODS`:

  LONGJAX_UPDATE_GOLDEN=1 python -m pytest tests/model/merge_parity_test.py
"""

import functools
import importlib.util
import os
import pathlib

import numpy as np
import pytest

from longjax.model import merge
from tests.model import mergekit_reference

DATA = pathlib.Path(__file__).parent.parent / 'testdata' / 'merge'
GOLDEN = DATA / 'mergekit.npz'
DENSITIES = (0.1, 0.5, 1.0)
# Name -> shape, experts, share of all elements that no expert changed. Deltas
# are of size 1: below 1e-6 mergekit has guards that we have not.
CASES = {
    'matrix': ((8, 6), 2, 0.2),
    'three': ((7, 9), 3, 0.2),
    'vector': ((40,), 2, 0.3),
    'unchanged': ((4, 5), 2, 1.0),
}
METHODS = {
    **{f'sce_{d}': {'method': 'sce', 'density': d} for d in DENSITIES},
    **{f'ties_{d}': {'method': 'ties', 'density': d} for d in DENSITIES},
    'ties_weighted': {
        'method': 'ties', 'density': 0.5, 'weights': (0.7, 0.2, 0.4)},
    'linear': {'method': 'linear'},
    'linear_weighted': {'method': 'linear', 'weights': (0.7, 0.2, 0.4)},
}


def mergekit_inputs(case):
  """Base and experts; besides what `CASES` says, ties and equal changes."""
  shape, num_experts, unchanged = CASES[case]
  rng = np.random.default_rng(sorted(CASES).index(case))

  def draw(*shape):
    """Values whose sums and differences are exact."""
    return np.float32(np.round(rng.normal(size=shape) * 4096) / 4096)

  base, deltas = draw(*shape), draw(num_experts, *shape)
  for j in range(num_experts):
    deltas[j] *= j + 1
  deltas[rng.uniform(size=deltas.shape) < 0.1] = 0.0
  flat = deltas.reshape(num_experts, -1)
  flat[:, :3] = flat[0, :3]  # No variance.
  flat[:2, 3:5] = [flat[0, 3:5], -flat[0, 3:5]]  # No majority.
  flat[2:, 3:5] = 0.0
  deltas[:, rng.uniform(size=shape) < unchanged] = 0.0
  return base, list(base + deltas)


def method_of(name, case):
  values = dict(METHODS[name])
  if 'weights' in values:
    values['weights'] = values['weights'][:CASES[case][1]]
  return values


@functools.cache
def golden():
  """What mergekit made of them when it was last asked."""
  if os.environ.get('LONGJAX_UPDATE_GOLDEN'):
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **{
        f'{name}/{case}': mergekit_reference.merge(
            *mergekit_inputs(case), **method_of(name, case))
        for name in METHODS for case in CASES})
  return np.load(GOLDEN)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('name', METHODS)
def test_mergekit_gives_the_same(name, case):
  base, experts = mergekit_inputs(case)
  got = merge.matrix(
      base, experts, config=merge.MergeConfig(**method_of(name, case))).value
  want = golden()[f'{name}/{case}']
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  if importlib.util.find_spec('mergekit'):
    np.testing.assert_array_equal(want, mergekit_reference.merge(
        base, experts, **method_of(name, case)))


def test_the_cases_tell_the_methods_apart():
  for case in set(CASES) - {'unchanged'}:
    results = [golden()[f'{name}/{case}'] for name in METHODS]
    for i, a in enumerate(results):
      assert not any(np.allclose(a, b) for b in results[:i])

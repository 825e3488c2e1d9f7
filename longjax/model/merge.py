"""Merging what several models learnt from one base, a matrix at a time.

An expert here is a whole model trained from the base, not a part of a mixture.
With deltas_j = expert_j - base, the merged matrix is

  base + sum_j w_j E_j delta_j / sum_j w_j E_j     (0 where nothing is left)

  sce     w_j from the matrix itself, E_j by vote: Select, Calculate, Erase of
          FuseChat (arXiv:2408.07990), which QwenLong-L1.5 (arXiv:2512.12967)
          merges its memory expert with
  ties    w_j given, the smallest changes trimmed, E_j by vote: TIES
          (arXiv:2306.01708), trimmed in each matrix as mergekit does
  linear  w_j given, E_j = 1: the weighted mean of the experts

What is reduced over is one matrix as Hugging Face stores it: of one layer, of
one expert of a mixture. Stacked arrays are many of them.

NumPy on the host: a merge goes from files to files and must not depend on what
devices there are. Elements are float32; sums over a matrix, which may have 1e9
of them, are float64: float32 would lose what is added last.

Shapes: J experts, M elements of a matrix.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from jax.typing import DTypeLike

from longjax import types
from longjax.model import architecture, huggingface_layout

# A matrix is worked on in pieces that stay in a core's cache: what is held of
# it beside what is given is then a mask and, to select, its variances.
_BLOCK_LEN = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
  """How models are merged.

  Attributes:
    method: see the module.
    density: kappa, share of the elements that are selected: 'sce' takes those
      in which the experts differ most, of all in which they differ; 'ties'
      the largest changes of each expert, one at least. 1 takes all.
    select: what becomes of the changes that 'sce' did not select. 'prune'
      resets them to the base. That also unlearns what one expert, trained on
      from the other, has in common with it: there the experts hardly differ.
      'coef_only' keeps them; the selected ones only make the coefficients.
    weights: of the experts, for 'linear' and 'ties'; () are equal ones.
  """

  method: Literal['sce', 'linear', 'ties'] = 'sce'
  density: float = 1.0
  select: Literal['prune', 'coef_only'] = 'prune'
  weights: tuple[float, ...] = ()

  def __post_init__(self):
    if not 0.0 < self.density <= 1.0:
      raise types.UserError(
          f'merge.density={self.density} must lie in (0, 1]; 1 takes all.')
    if self.method == 'linear' and self.density != 1.0:
      raise types.UserError(
          f'merge.density={self.density} does not go with '
          'merge.method=linear; leave it at 1, or use sce or ties.')
    if self.method != 'sce' and self.select != 'prune':
      raise types.UserError(
          f'merge.select={self.select} does not go with merge.method='
          f'{self.method}; leave it out, or use sce.')
    if self.method == 'sce' and self.weights:
      raise types.UserError(
          f'merge.weights={self.weights} do not go with merge.method=sce, '
          'which finds them; leave them out, or use linear or ties.')
    if self.weights and not (
        all(0.0 <= w < math.inf for w in self.weights)
        and sum(self.weights) > 0.0):
      raise types.UserError(
          f'merge.weights={self.weights} must be >= 0, and one of them > 0.')

  def check_experts(self, count: int) -> None:
    """Raises UserError if so many experts cannot be merged like this."""
    if count < 1:
      raise types.UserError('experts is empty; name the models to merge.')
    if self.weights and len(self.weights) != count:
      raise types.UserError(
          f'merge.weights={self.weights} are {len(self.weights)} for {count} '
          'experts; give one for each.')
    if self.method == 'sce' and count == 1 and self.density < 1.0:
      raise types.UserError(
          f'merge.density={self.density} selects nothing of one expert, which '
          'differs from no other; name another one, or set the density to 1.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merged:
  """A merged matrix.

  Attributes:
    value: f[...] of the base's shape.
    coefficients: f64[J] w_j, which sum to 1.
  """

  value: np.ndarray
  coefficients: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rule:
  """What the elements of a matrix are merged by.

  Attributes:
    coefficients: f64[J] w_j.
    keep: bool[J or 1, M] changes that are not set to zero; None keeps all.
    votes: f64[J] weights in the vote on the sign; None erases no other signs.
  """

  coefficients: np.ndarray
  keep: np.ndarray | None = None
  votes: np.ndarray | None = None


def matrix(
    base: np.ndarray,  # f[...]
    experts: Sequence[np.ndarray],  # J of f[...]
    *,
    config: MergeConfig,
    dtype: DTypeLike | None = None,
) -> Merged:
  """Merges one matrix or vector.

  Elements that are equally large where the selection ends are taken in the
  order in which they lie in the matrix.

  Args:
    base: as it was before training.
    experts: as each training left it.
    config: how.
    dtype: of the result; None is the base's.
  """
  config.check_experts(len(experts))
  assert all(x.shape == base.shape for x in experts), base.shape
  arrays = [np.ascontiguousarray(x).reshape(-1) for x in (base, *experts)]
  rule = _RULES[config.method](arrays, config)
  out = np.empty(base.size, dtype or base.dtype)
  # A value beyond the dtype is infinite, which callers look for.
  with np.errstate(over='ignore', invalid='ignore'):
    for block in _blocks(base.size):
      change = _change(_deltas(arrays, block, rule.keep), rule)
      out[block] = change + arrays[0][block].astype(np.float32)
  return Merged(
      value=out.reshape(base.shape), coefficients=rule.coefficients)


def stacked(
    base: np.ndarray,  # f[..., matrix]
    experts: Sequence[np.ndarray],  # J of f[..., matrix]
    *,
    num_batch_axes: int,
    config: MergeConfig,
) -> np.ndarray:  # f[..., matrix]
  """Merges every matrix of an array by itself, as `matrix` does.

  There is one at each index of the first `num_batch_axes` axes: of a layer, of
  an expert of a mixture.
  """
  out = np.empty_like(base)
  for index in np.ndindex(*base.shape[:num_batch_axes]):
    out[index] = matrix(
        base[index], [x[index] for x in experts], config=config).value
  return out


def tree(
    base: types.Params,
    experts: Sequence[types.Params],
    model: architecture.ModelConfig,
    *,
    config: MergeConfig,
) -> types.Params:
  """Merges parameter trees as Hugging Face's tensors would be, bit for bit.

  So each matrix is gone through in the order in which it is stored.
  """

  def one(layout: huggingface_layout.Layout, *leaves: np.ndarray) -> np.ndarray:
    first, *others = (np.asarray(x).transpose(layout.order) for x in leaves)
    merged = stacked(
        first, others, num_batch_axes=layout.num_stacked, config=config)
    return merged.transpose(np.argsort(layout.order))

  return jax.tree.map(one, huggingface_layout.layouts(model), base, *experts)


def _sce(arrays: Sequence[np.ndarray], config: MergeConfig) -> _Rule:
  """Select and Calculate."""
  size, num_experts = arrays[0].size, len(arrays) - 1
  keep = None
  if config.density < 1.0:
    variances = np.empty(size, np.float32)
    for block in _blocks(size):
      # In float64 the variance of equal changes is exactly 0: they do not
      # count as elements in which the experts differ.
      variances[block] = _deltas(arrays, block).var(axis=0, dtype=np.float64)
    count = math.floor(config.density * np.count_nonzero(variances))
    keep = _largest(variances, count)[None]
  squares = np.zeros(num_experts)
  for block in _blocks(size):
    deltas = _deltas(arrays, block, keep)
    squares += np.einsum('jm,jm->j', deltas, deltas, dtype=np.float64)
  total = squares.sum()
  # Squares of RL's changes sum to very little, and are still told apart:
  # mergekit gives up below 1e-6, silently.
  coefficients = squares / total if total != 0.0 else np.full(
      num_experts, 1.0 / num_experts)
  return _Rule(
      coefficients=coefficients,
      keep=keep if config.select == 'prune' else None,
      votes=np.ones(num_experts))


def _ties(arrays: Sequence[np.ndarray], config: MergeConfig) -> _Rule:
  """Trim; each expert has its own mask."""
  size, num_experts = arrays[0].size, len(arrays) - 1
  keep = None
  if config.density < 1.0:
    keep = np.empty((num_experts, size), np.bool)
    for j, expert in enumerate(arrays[1:]):
      magnitudes = np.empty(size, np.float32)
      for block in _blocks(size):
        magnitudes[block] = np.abs(_deltas([arrays[0], expert], block)[0])
      keep[j] = _largest(magnitudes, max(1, math.floor(config.density * size)))
  # Not the coefficients: thirds would turn an even vote into a majority.
  votes = _given(config, num_experts)
  return _Rule(coefficients=votes / votes.sum(), keep=keep, votes=votes)


def _linear(arrays: Sequence[np.ndarray], config: MergeConfig) -> _Rule:
  weights = _given(config, len(arrays) - 1)
  return _Rule(coefficients=weights / weights.sum())


_RULES = {'sce': _sce, 'ties': _ties, 'linear': _linear}


def _given(config: MergeConfig, num_experts: int) -> np.ndarray:  # f64[J]
  return np.asarray(config.weights or (1.0,) * num_experts, np.float64)


def _blocks(size: int) -> Iterator[slice]:
  """A matrix in pieces."""
  return (slice(i, i + _BLOCK_LEN) for i in range(0, size, _BLOCK_LEN))


def _deltas(
    arrays: Sequence[np.ndarray],  # base and experts, f[M]
    block: slice,
    keep: np.ndarray | None = None,  # bool[J or 1, M]
) -> np.ndarray:  # f32[J, m]
  """The experts' changes in a block, those not kept set to zero."""
  base = arrays[0][block].astype(np.float32)
  deltas = np.stack(
      [x[block].astype(np.float32) - base for x in arrays[1:]])
  return deltas if keep is None else deltas * keep[:, block]


def _largest(
    values: np.ndarray,  # f32[M], not negative
    count: int,
) -> np.ndarray:  # bool[M]
  """True at the `count` largest values; zeros may be left out."""
  if count in (0, values.size):
    return np.full(values.size, count > 0)
  border = np.partition(values, -count)[-count]
  chosen = values > border
  if border > 0.0:  # To keep a change of zero changes nothing.
    equal = np.flatnonzero(values == border)
    chosen[equal[:count - np.count_nonzero(chosen)]] = True
  return chosen


def _change(
    deltas: np.ndarray,  # f32[J, m]
    rule: _Rule,
) -> np.ndarray:  # f32[m]
  """Erases, and takes the mean of what is left."""
  weights = rule.coefficients.astype(np.float32)[:, None]
  if rule.votes is None:
    return (weights * deltas).sum(axis=0)
  votes = (rule.votes.astype(np.float32)[:, None] * deltas).sum(axis=0)
  majority = np.where(votes >= 0.0, np.float32(1.0), np.float32(-1.0))
  weights = weights * (deltas * majority > 0.0)
  total = weights.sum(axis=0)
  total[total == 0.0] = 1.0  # Of nothing: the sum is 0.
  return (weights * deltas).sum(axis=0) / total

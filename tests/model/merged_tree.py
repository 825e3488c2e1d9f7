"""Stacked parameters merged in memory, to compare merged files with.

Shapes: J experts.
"""

from collections.abc import Sequence

import jax
import numpy as np

from longjax import types
from longjax.model import architecture, huggingface_layout, merge


def tree(
    base: types.Params,
    experts: Sequence[types.Params],
    model: architecture.ModelConfig,
    *,
    config: merge.MergeConfig,
) -> types.Params:
  """Merges parameter trees as Hugging Face's tensors would be, bit for bit.

  So each matrix is gone through in the order in which it is stored.
  """

  def one(layout: huggingface_layout.Layout, *leaves: np.ndarray) -> np.ndarray:
    first, *others = (np.asarray(x).transpose(layout.order) for x in leaves)
    merged = _stacked(
        first, others, num_batch_axes=layout.num_stacked, config=config)
    return merged.transpose(np.argsort(layout.order))

  return jax.tree.map(one, huggingface_layout.layouts(model), base, *experts)


def _stacked(
    base: np.ndarray,  # f[..., matrix]
    experts: Sequence[np.ndarray],  # J of f[..., matrix]
    *,
    num_batch_axes: int,
    config: merge.MergeConfig,
) -> np.ndarray:  # f[..., matrix]
  """Merges every matrix of an array by itself, as `matrix` does.

  There is one at each index of the first `num_batch_axes` axes: of a layer, of
  an expert of a mixture.
  """
  out = np.empty_like(base)
  for index in np.ndindex(*base.shape[:num_batch_axes]):
    out[index] = merge.matrix(
        base[index], [x[index] for x in experts], config=config).value
  return out

"""What mergekit (0.1.5) makes of tensors; needs it and torch installed."""

from collections.abc import Sequence

import numpy as np


def merge(
    base: np.ndarray,
    experts: Sequence[np.ndarray],
    *,
    method: str,
    density: float = 1.0,
    weights: Sequence[float] = (),
) -> np.ndarray:
  """The merged tensor, by mergekit's defaults beside what is asked."""
  import torch
  from mergekit import merge_methods

  tensors = list(map(torch.from_numpy, experts))
  parameters = {'weight': dict(enumerate(weights or (1.0,) * len(experts)))}
  if method == 'linear':
    return merge_methods.merge_tensors(
        tensors, method, parameters=parameters, ids=range(len(tensors)),
    ).numpy()
  if method == 'sce':
    parameters = {'select_topk': density}
  else:
    parameters['density'] = density
  return merge_methods.merge_tensors(
      [*tensors, torch.from_numpy(base)], method, parameters=parameters,
      ids=range(len(tensors) + 1), base_index=len(tensors)).numpy()

"""Merges of one matrix from their equations, in float64, an element at a time.

Written without longjax.
"""

import math

import numpy as np


def top(values, count):
  """The largest, of equal ones the first."""
  order = sorted(range(len(values)), key=lambda i: (-values[i], i))
  return [i in order[:count] for i in range(len(values))]


def sce(base, experts, density, select):
  """Select, Calculate, Erase (arXiv:2408.07990); matrix and coefficients."""
  num = len(experts)
  shape, base = base.shape, np.float64(base).ravel()
  deltas = [np.float64(e).ravel() - base for e in experts]
  variance = []
  for m in range(base.size):
    # E[d^2] - E[d]^2 over one divisor: exact, so that ties are ties.
    variance.append((num * sum(d[m] ** 2 for d in deltas)
                     - sum(d[m] for d in deltas) ** 2) / num**2)
  if density == 1.0:
    mask = [True] * base.size
  else:
    mask = top(
        variance, math.floor(density * sum(v != 0.0 for v in variance)))
  squares = [sum(d[m] ** 2 for m in range(base.size) if mask[m]) / base.size
             for d in deltas]
  weights = ([s / sum(squares) for s in squares] if sum(squares)
             else [1 / num] * num)
  out = np.array(base)
  for m in range(base.size):
    if not mask[m] and select == 'prune':
      continue
    out[m] += elected_mean([d[m] for d in deltas], weights, [1.0] * num)
  return out.reshape(shape), weights


def elected_mean(changes, weights, votes):
  """Erase and merge at one element."""
  sign = 1.0 if sum(v * c for v, c in zip(votes, changes)) >= 0.0 else -1.0
  agree = [np.sign(c) == sign for c in changes]
  total = sum(w for w, a in zip(weights, agree) if a)
  if not total:
    return 0.0
  return sum(w * c for w, c, a in zip(weights, changes, agree) if a) / total


def ties(base, experts, density, weights):
  """TIES (arXiv:2306.01708), Algorithm 1, one matrix."""
  shape, base = base.shape, np.float64(base).ravel()
  deltas = [np.float64(e).ravel() - base for e in experts]
  if density < 1.0:
    deltas = [d * top(np.abs(d), max(1, math.floor(density * d.size)))
              for d in deltas]
  out = [b + elected_mean([d[m] for d in deltas], weights, weights)
         for m, b in enumerate(base)]
  return np.reshape(out, shape)

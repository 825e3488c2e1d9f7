"""Attention over rows in float64 NumPy, one query at a time.

Written from the visibility rule in `rows`' docstring and the softmax's
definition, without longjax. Also rows of every awkward kind.
"""

import numpy as np


def attention(q, k, v, query_meta, key_meta, d_out, d_lse):
  """Output, log-sum-exp and gradients for cotangents of both.

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H].
    v: [B, S, K, H].
    query_meta: (group, branch, position), each [B, T].
    key_meta: the same, [B, S].
    d_out: [B, T, N, H].
    d_lse: [B, T, N]; ignored for queries that see nothing.

  Returns:
    out, lse, dq, dk, dv.
  """
  q, k, v, d_out, d_lse = (
      np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
  out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
  lse = np.full(q.shape[:3], -np.inf)
  scale = 1.0 / np.sqrt(q.shape[3])
  for b, t, n in np.ndindex(*q.shape[:3]):
    kv = n // (q.shape[2] // k.shape[2])
    group, branch, position = (x[b, t] for x in query_meta)
    seen = [
        s for s in range(k.shape[1])
        if key_meta[0][b, s] == group >= 0
        and key_meta[1][b, s] in (0, branch)
        and key_meta[2][b, s] <= position]
    if not seen:
      continue
    scores = k[b, seen, kv] @ q[b, t, n] * scale
    lse[b, t, n] = np.log(np.sum(np.exp(scores - scores.max()))) + scores.max()
    weights = np.exp(scores - lse[b, t, n])
    out[b, t, n] = weights @ v[b, seen, kv]
    d_weights = v[b, seen, kv] @ d_out[b, t, n]
    d_scores = weights * (d_weights - weights @ d_weights + d_lse[b, t, n])
    dq[b, t, n] = d_scores @ k[b, seen, kv] * scale
    dk[b, seen, kv] += np.outer(d_scores, q[b, t, n]) * scale
    dv[b, seen, kv] += np.outer(weights, d_out[b, t, n])
  return out, lse, dq, dk, dv


def shared_prefix(prefix_len, branch_lens, row_len):
  """(group, branch, position), each [row_len]: one group, then padding."""
  group = np.full(row_len, -1)
  branch, position = np.zeros(row_len, int), np.zeros(row_len, int)
  group[:prefix_len + sum(branch_lens)] = 0
  position[:prefix_len] = np.arange(prefix_len)
  start = prefix_len
  for b, length in enumerate(branch_lens, start=1):
    branch[start:start + length] = b
    position[start:start + length] = prefix_len + np.arange(length)
    start += length
  return group, branch, position


def packed(lens, row_len):
  """(group, branch, position): sequences one after another, then padding."""
  group = np.full(row_len, -1)
  position = np.zeros(row_len, int)
  start = 0
  for g, length in enumerate(lens):
    group[start:start + length] = g
    position[start:start + length] = np.arange(length)
    start += length
  return group, np.zeros(row_len, int), position


def stack(*rows):
  """(group, branch, position) of several rows, each i32[B, T]."""
  return tuple(np.int32(field) for field in map(np.stack, zip(*rows)))


def row_kinds(row_len):
  """One row of each kind: shared prefix, packed, shuffled, padding only."""
  branch_lens = [row_len // 8, 1, row_len // 4]
  shared = shared_prefix(row_len // 2, branch_lens, row_len)
  order = np.random.default_rng(0).permutation(row_len)
  return stack(
      shared,
      packed([row_len // 3, 2, row_len // 2], row_len),
      tuple(x[order] for x in shared),
      packed([], row_len),
  )

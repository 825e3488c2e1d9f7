"""The compiled TPU program sends keys while it computes, not before or after.

Read off the schedule that libtpu's compiler makes, without a TPU.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from longjax import rows
from longjax.model import attention
from longjax.parallel import mesh
from longjax.parallel import rules as rules_lib


def hidden(text):
  """For every loop that sends something: is there a kernel on the way?

  Yields a bool for each array of keys, values or gradients; metadata is small.
  """
  for computation in re.split(r'\n(?=%|ENTRY)', text):
    if computation.startswith('ENTRY'):
      continue
    lines = computation.splitlines()
    kernels = [
        i for i, line in enumerate(lines) if 'tpu_custom_call' in line]
    started, on_the_way = {}, []
    for i, line in enumerate(lines):
      if match := re.search(
          r'(%\S+) = \((?:bf16|f32)\[.* collective-permute-start\(', line):
        started[match[1]] = i
      if match := re.search(r' collective-permute-done\((%[^) ]+)', line):
        if (start := started.get(match[1])) is not None:
          on_the_way.append(any(start < k < i for k in kernels))
    if on_the_way:
      yield on_the_way


def test_keys_and_their_gradients_travel_while_kernels_run():
  topologies = pytest.importorskip('longjax.planner.topologies')
  pytest.importorskip('libtpu')
  topologies.compile_only()
  devices = topologies.devices('v5p:2x2x1')
  rules = rules_lib.Rules(mesh.make(mesh.MeshConfig(data=1, seq=4), devices))

  def array(*shape, names, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(*names))

  q = array(1, 8192, 8, 128, names=('batch', 'seq', 'heads', None))
  k = array(1, 8192, 2, 128, names=('batch', 'seq', 'kv_heads', None))
  field = array(1, 8192, names=('batch', 'seq'), dtype=jnp.int32)

  def total(q, k, v, meta):
    out, _ = attention.attention(
        q, k, v, meta, meta, backend='tpu', context_parallel='ring',
        rules=rules)
    return jnp.sum(out.astype(jnp.float32) ** 2)

  text = jax.jit(jax.grad(total, (0, 1, 2))).lower(
      q, k, k, rows.TokenMeta(field, field, field)).compile().as_text()
  # Forward: keys and values. Backward: their gradients' sums as well.
  assert list(hidden(text)) == [[True] * 2, [True] * 4]

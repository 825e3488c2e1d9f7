"""Attention alone: how fast by backend, and is the device right?

`speed` measures one causal row. `parity` compares with the plain computation
on this machine's CPU in float32: attention over rows with branches, and loss
and gradients of a whole small network. On the platform's own devices that
tests what no simulated device can.

T positions, N query heads, K key/value heads, H head size.
"""

import functools
import types as python_types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longjax import rows
from longjax.bench import measure, suite
from longjax.model import architecture, attention, parameters
from longjax.model import compute as compute_lib
from longjax.parallel import mesh as mesh_lib
from longjax.parallel import rules as rules_lib
from longjax.planner import flops
from longjax.train import sft_job

_NUM_BRANCHES = 3

_SMALL = architecture.ModelConfig(
    vocab_size=96, embed_dim=64, ffn_dim=96, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=32)


def row(length: int, *, num_branches: int) -> rows.Rows:
  """A prompt and responses to it, of equal parts, that fill a row."""
  part = length // (num_branches + 1)
  prompt = length - num_branches * part + 1
  branches = [
      rows.Branch(response=[2] * part, trajectory=b)
      for b in range(num_branches)]
  return rows.pack(
      [rows.Group(prompt=[1] * prompt, branches=branches)], row_len=length)


def causal_meta(length: int) -> rows.TokenMeta:  # i32[1, T]
  """One sequence that fills a row."""
  return jax.tree.map(
      jnp.asarray, flops.row_meta([(length, ())], row_len=length))


def num_flops(model: architecture.ModelConfig, length: int) -> float:
  """Operations of one layer's attention over a causal row, forward."""
  return (4.0 * flops.visible_pairs(length, ())
          * model.num_heads * model.head_dim)


def speed(
    case: suite.KernelCase,
    backend: suite.Backend,
    model: architecture.ModelConfig,
    dtype: str,
) -> dict[str, list[measure.Reading]]:
  """Times forward, and forward and backward together, on one device."""
  device = jax.local_devices()[0]
  meta = jax.device_put(causal_meta(case.length), device)
  q, k, v = _heads(model, case.length, dtype, device)
  attend = _attend(backend, meta, device)

  def total(q, k, v):
    return jnp.sum(attend(q, k, v).astype(jnp.float32))

  return {
      name: _readings(functools.partial(jax.jit(function), q, k, v), case)
      for name, function in (
          ('forward', attend), ('both', jax.grad(total, (0, 1, 2))))}


def _readings(
    function: Callable[[], Any], case: suite.KernelCase
) -> list[measure.Reading]:
  """Times a function after a call that compiles it."""
  jax.block_until_ready(function())
  return [measure.timed(function)[0] for _ in range(case.repeats)]


def _heads(
    model: architecture.ModelConfig, length: int, dtype: str,
    device: jax.Device,
) -> list[jax.Array]:
  """Normal q, k and v, f[1, T, N or K, H]."""
  rng = np.random.default_rng(0)
  counts = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
  return [
      jax.device_put(jnp.asarray(rng.normal(
          size=(1, length, n, model.head_dim)), dtype), device)
      for n in counts]


def _attend(
    backend: suite.Backend, meta: rows.TokenMeta, device: jax.Device
) -> Callable[..., jax.Array]:
  if backend == 'cudnn':
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation='cudnn')
  return lambda q, k, v: attention.attention(
      q, k, v, meta, meta, backend=backend, rules=_alone(device))[0]


def _alone(device: jax.Device) -> rules_lib.Rules:
  return rules_lib.Rules(
      mesh_lib.make(mesh_lib.MeshConfig(data=1), [device]))


def attention_errors(
    case: suite.KernelCase, backend: suite.Backend, dtype: str
) -> dict[str, float]:
  """Largest error of outputs and gradients over the largest value."""
  meta = row(case.length, num_branches=_NUM_BRANCHES).meta
  rng = np.random.default_rng(0)
  arrays = [
      rng.normal(size=(1, case.length, n, 64)) for n in (4, 2, 2, 4)]

  def run(device, backend, dtype):
    *qkv, weight = jax.device_put(
        [jnp.asarray(x, dtype) for x in arrays], device)
    attend = _attend(backend, jax.device_put(meta, device), device)

    def total(q, k, v):
      out = attend(q, k, v)
      return jnp.sum((out * weight).astype(jnp.float32)), out

    with compute_lib.Compute(dtype=dtype).matmul_precision():
      gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*qkv)
    return out, *gradients

  return dict(zip(('out', 'dq', 'dk', 'dv'), _errors(
      run(jax.local_devices()[0], backend, dtype),
      run(_cpu(), 'reference', 'float32')), strict=True))


def network_errors(case: suite.KernelCase) -> dict[str, float]:
  """Largest errors of loss and gradients of a small network, in float32."""
  batch = row(case.length, num_branches=_NUM_BRANCHES)
  params = parameters.init(_SMALL, jax.random.key(0))

  def run(device):
    context: Any = python_types.SimpleNamespace(
        model=_SMALL, rules=_alone(device), compute=compute_lib.Compute())
    loss = functools.partial(sft_job.loss, context=context)
    with compute_lib.Compute().matmul_precision():
      (value, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
          *jax.device_put((params, batch, {'num_tokens': 100.0}), device))
    return value, *jax.tree.leaves(gradients)

  loss, *gradients = _errors(run(jax.local_devices()[0]), run(_cpu()))
  return {'loss': loss, 'gradients': max(gradients)}


def _cpu() -> jax.Device:
  return jax.local_devices(backend='cpu')[0]


def _errors(got: Any, want: Any) -> list[float]:
  """Of each array, its largest error over its largest value."""
  found = []
  for one, true in zip(got, want, strict=True):
    one, true = np.asarray(one, np.float64), np.asarray(true, np.float64)
    found.append(float(np.abs(one - true).max() / np.abs(true).max()))
  return found

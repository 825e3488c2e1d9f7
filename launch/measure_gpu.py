"""Measures this machine's accelerator: is it right, and how fast?

  python launch/measure_gpu.py --output=gpu.json
  python launch/measure_gpu.py --smoke          seconds on a CPU, tiny shapes

Three parts, in one run and printed as they come:

  parity     attention kernels and a whole network's loss and gradients on the
             device against the plain CPU computation in float32
  attention  TFLOP/s of forward and of forward + backward by backend, at 16
             query and 8 key heads of 128, bfloat16, one causal row; the one
             that is not a kernel up to 32K tokens only
  update     MFU of an SFT step of Qwen3-0.6B and 1.7B with random weights at
             8K, 32K and 128K tokens in one row

FLOPs are those that are needed (causal, nothing recomputed); times are medians
of `--repeats` runs after one that compiles.
"""

import functools
import json
import pathlib
import statistics
import time
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from longjax import rows
from longjax.model import architecture, attention, parameters
from longjax.model import compute as compute_lib
from longjax.parallel import mesh
from longjax.parallel import rules as rules_lib
from longjax.planner import flops
from longjax.train import optimizer as optimizer_lib
from longjax.train import sft_job, state
from longjax.train import step as step_lib

_OUTPUT = flags.DEFINE_string('output', None, 'JSON file for the figures.')
_SMOKE = flags.DEFINE_boolean('smoke', False, 'Tiny shapes, to try the script.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed runs of each program.')
_PEAK = flags.DEFINE_float(
    'peak_tflops', None,
    'bf16 peak without sparsity; known for the devices in the source.')

# bf16 without sparsity, from the vendors' data sheets.
_PEAK_TFLOPS = {
    'H200': 989.5, 'H100': 989.5, 'A100': 312.0, 'L4': 121.0, 'B200': 2250.0}

# A step of its loop is one pair of short blocks: at 128K there are two million.
_MOST_BLOCKWISE = 32_768

_SMALL = architecture.ModelConfig(
    vocab_size=96, embed_dim=64, ffn_dim=96, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=32)
_QWEN3 = {
    '0.6B': architecture.ModelConfig(
        vocab_size=151_936, embed_dim=1024, ffn_dim=3072, num_layers=28,
        num_heads=16, num_kv_heads=8, head_dim=128, tied_embeddings=True),
    '1.7B': architecture.ModelConfig(
        vocab_size=151_936, embed_dim=2048, ffn_dim=6144, num_layers=28,
        num_heads=16, num_kv_heads=8, head_dim=128, tied_embeddings=True),
}


def _rules(device: jax.Device) -> rules_lib.Rules:
  return rules_lib.Rules(mesh.make(mesh.MeshConfig(data=1), [device]))


def _causal(length: int, num_branches: int = 0) -> rows.Rows:
  """One row: a plain sequence, or a prompt and responses to it."""
  if not num_branches:
    return rows.pack(
        [rows.Group(prompt=[1], branches=[
            rows.Branch(response=[1] * length, trajectory=0)])],
        row_len=length)
  part = length // (num_branches + 2)
  return rows.pack(
      [rows.Group(prompt=[1] * part, branches=[
          rows.Branch(response=[1] * part, trajectory=b)
          for b in range(num_branches)])],
      row_len=length)


def _seconds(function, *args) -> float:
  """Median time of a call that returns arrays."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(_REPEATS.value):
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - began)
  return statistics.median(times)


def _backends(device: jax.Device) -> list[str]:
  kernel = {'gpu': ['gpu'], 'tpu': ['tpu']}.get(device.platform, [])
  return [*kernel, 'blockwise']


def attention_parity(device: jax.Device) -> list[dict]:
  """Largest error of outputs and gradients over the largest value."""
  length = 256 if _SMOKE.value else 1024
  rng = np.random.default_rng(0)
  meta = jax.tree.map(jnp.asarray, _causal(length, num_branches=3).meta)
  arrays = [rng.normal(size=(1, length, n, 64)) for n in (4, 2, 2, 4)]

  def run(where, backend, dtype):
    *qkv, weight = jax.device_put(
        [jnp.asarray(x, dtype) for x in arrays], where)

    def total(q, k, v, meta):
      out, _ = attention.attention(
          q, k, v, meta, meta, backend=backend, rules=_rules(where))
      return jnp.sum((out * weight).astype(jnp.float32)), out

    with jax.default_matmul_precision('highest'):
      gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(
          *qkv, jax.device_put(meta, where))
    return [np.asarray(x, np.float64) for x in (out, *gradients)]

  found = []
  want = run(jax.devices('cpu')[0], 'reference', 'float32')
  for backend in _backends(device):
    for dtype in ('float32', 'bfloat16'):
      errors = {
          name: float(np.abs(g - w).max() / np.abs(w).max())
          for name, g, w in zip(
              ('out', 'dq', 'dk', 'dv'), run(device, backend, dtype), want)}
      found.append(dict(part='parity', backend=backend, dtype=dtype) | errors)
      _say(found[-1])
  return found


def model_parity(device: jax.Device) -> dict:
  """Loss and gradients of a small network on the device and on the CPU."""
  batch = _causal(512, num_branches=3)
  params = parameters.init(_SMALL, jax.random.key(0))

  def run(where):
    context = python_types.SimpleNamespace(
        model=_SMALL, rules=_rules(where), compute=compute_lib.Compute())
    loss = functools.partial(sft_job.loss, context=context)
    with jax.default_matmul_precision('highest'):
      (value, _), gradients = jax.jit(jax.value_and_grad(
          loss, has_aux=True))(
              *jax.device_put((params, batch, {'num_tokens': 100.0}), where))
    return jax.device_get((value, gradients))

  (got, got_gradients), (want, want_gradients) = (
      run(d) for d in (device, jax.devices('cpu')[0]))
  result = dict(
      part='parity', backend='network', dtype='float32',
      loss=float(abs(got - want) / abs(want)),
      gradients=max(
          float(np.abs(g - w).max() / np.abs(w).max())
          for g, w in zip(
              jax.tree.leaves(got_gradients),
              jax.tree.leaves(want_gradients))))
  _say(result)
  return result


def attention_speed(device: jax.Device, length: int) -> list[dict]:
  """TFLOP/s by backend on one causal row."""
  heads = (2, 1, 1) if _SMOKE.value else (16, 8, 8)
  rng = np.random.default_rng(0)
  q, k, v = jax.device_put(
      [jnp.asarray(rng.normal(size=(1, length, n, 128)), jnp.bfloat16)
       for n in heads], device)
  meta = jax.device_put(_causal(length).meta, device)
  pairs = flops.visible_pairs(length, [])
  forward_flops = 4.0 * pairs * heads[0] * 128

  def by_longjax(backend, q, k, v):
    return attention.attention(
        q, k, v, meta, meta, backend=backend, rules=_rules(device))[0]

  functions = {
      backend: functools.partial(by_longjax, backend)
      for backend in _backends(device)
      if backend != 'blockwise' or length <= _MOST_BLOCKWISE}
  if device.platform == 'gpu':  # A yardstick: knows no groups and branches.
    functions['cudnn, causal only'] = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation='cudnn')
  found = []
  for name, function in functions.items():
    def total(q, k, v, function=function):
      return jnp.sum(function(q, k, v).astype(jnp.float32))

    forward = _seconds(jax.jit(function), q, k, v)
    both = _seconds(jax.jit(jax.grad(total, (0, 1, 2))), q, k, v)
    found.append(dict(
        part='attention', backend=name, length=length,
        forward_ms=forward * 1e3, forward_tflops=forward_flops / forward / 1e12,
        both_ms=both * 1e3, both_tflops=3 * forward_flops / both / 1e12))
    _say(found[-1])
  return found


def update_speed(
    device: jax.Device, name: str, model: architecture.ModelConfig, length: int
) -> dict:
  """MFU of an SFT step of one causal row."""
  rules = _rules(device)
  compute = compute_lib.Compute(
      dtype='bfloat16', remat=compute_lib.Remat.BLOCK)
  context = python_types.SimpleNamespace(
      model=model, rules=rules, compute=compute)
  optimizer = optimizer_lib.make(
      optimizer_lib.OptimizerConfig(learning_rate=1e-6), num_steps=10)
  update = step_lib.make_update(
      functools.partial(sft_job.loss, context=context), optimizer,
      config=model, rules=rules)
  now = state.create(
      jax.jit(functools.partial(parameters.init, model))(jax.random.key(0)),
      model, optimizer, rules)
  batch = step_lib.put_rows(_causal(length), rules)
  extras = {'num_tokens': jnp.float32(length)}
  times = []
  for _ in range(_REPEATS.value + 1):
    began = time.perf_counter()
    now, _ = jax.block_until_ready(update(now, [batch], extras, True))
    times.append(time.perf_counter() - began)
  seconds = statistics.median(times[1:])
  needed = flops.needed_update(flops.forward(
      model, num_tokens=length, num_pairs=flops.visible_pairs(length, []),
      num_scored=length))
  peak = _peak_tflops(device)
  stats = device.memory_stats() or {}
  result = dict(
      part='update', model=name, length=length, seconds=seconds,
      tokens_per_second=length / seconds,
      tflops=needed.total / seconds / 1e12,
      mfu=needed.total / seconds / 1e12 / peak if peak else None,
      compile_seconds=times[0] - seconds,
      peak_gib=stats.get('peak_bytes_in_use', 0) / 1024**3 or None)
  _say(result)
  return result


def _peak_tflops(device: jax.Device) -> float | None:
  if _PEAK.value:
    return _PEAK.value
  return next((
      peak for kind, peak in _PEAK_TFLOPS.items()
      if kind in device.device_kind), None)


def _say(result: dict) -> None:
  logging.info('%s', '  '.join(
      f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}'
      for k, v in result.items()))


def main(_) -> None:
  """Runs all parts."""
  device = jax.devices()[0]
  logging.info('%s, jax %s', device.device_kind, jax.__version__)
  results = [*attention_parity(device), model_parity(device)]
  lengths = (256,) if _SMOKE.value else (8192, 32_768, 131_072)
  models = {'small': _SMALL} if _SMOKE.value else _QWEN3
  for length in lengths:
    results += attention_speed(device, length)
  for name, model in models.items():
    for length in lengths:
      try:
        results.append(update_speed(device, name, model, length))
      except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
          raise
        results.append(dict(
            part='update', model=name, length=length, seconds=None))
        logging.info('%s at %d tokens does not fit.', name, length)
  if _OUTPUT.value:
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(
        dict(device=device.device_kind, jax=jax.__version__,
             date=time.strftime('%Y-%m-%d'), results=results), indent=1))


if __name__ == '__main__':
  app.run(main)

"""What devices can do at most: from data sheets, or measured in this run.

Figures are bfloat16 products without sparsity, and bandwidth of the device's
memory, as the vendors state them. TPUs are the planner's.
"""

import dataclasses

import jax
import jax.numpy as jnp

from longjax.bench import measure, suite
from longjax.parallel import rules as rules_lib
from longjax.planner import topologies

_TERA = 1e12

# (what the device's name contains, operations a second, bytes a second); the
# first match counts.
_GPUS = (
    ('GB200', 2500 * _TERA, 8.0 * _TERA),
    ('B200', 2250 * _TERA, 8.0 * _TERA),
    ('H200', 989.5 * _TERA, 4.8 * _TERA),
    ('H100 PCIe', 756 * _TERA, 2.0 * _TERA),
    ('H100 NVL', 835.5 * _TERA, 3.9 * _TERA),
    ('H100', 989.5 * _TERA, 3.35 * _TERA),
    ('A100-SXM4-80GB', 312 * _TERA, 2.039 * _TERA),
    ('A100 80GB PCIe', 312 * _TERA, 1.935 * _TERA),
    ('A100', 312 * _TERA, 1.555 * _TERA),
    ('L40S', 362 * _TERA, 0.864 * _TERA),
    ('L40', 181 * _TERA, 0.864 * _TERA),
    ('L4', 121 * _TERA, 0.3 * _TERA),
)

# Side of the product that is measured where nothing is known.
_SIDE = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
  """What one device can do.

  Attributes:
    flops: operations a second.
    memory_bandwidth: bytes a second; 0 if not known.
    is_measured: `flops` is what a large matrix product reached in this run.
    source: one line that says what is assumed, and why.
  """

  flops: float
  memory_bandwidth: float
  is_measured: bool
  source: str


def known(device_kind: str) -> tuple[float, float]:
  """Operations and bytes a second of one device; zeros if it is not known."""
  for chip in topologies.CHIPS.values():
    if chip.kind == device_kind:
      return chip.flops, chip.memory_bandwidth
  return next(
      ((flops, bandwidth) for name, flops, bandwidth in _GPUS
       if name in device_kind), (0.0, 0.0))


def find(config: suite.BenchConfig, rules: rules_lib.Rules) -> Rates:
  """What the config says, what is known of the device, or what is measured."""
  kind = rules.mesh.devices.flat[0].device_kind
  flops, bandwidth = known(kind)
  source = f'{kind!r} by its data sheet, bf16 without sparsity'
  if config.peak_tflops:
    flops, source = config.peak_tflops * _TERA, 'config.peak_tflops'
  if config.peak_gb_per_second:
    bandwidth = config.peak_gb_per_second * 1e9
  is_measured = not flops
  if is_measured:
    flops = _matrix_product(rules, config.compute.dtype)
    source = (
        f'what a {config.compute.dtype} product of {_SIDE} x {_SIDE} matrices '
        f'reaches in this run, all devices at once: the peak of {kind!r} is '
        'not known, see --config.peak_tflops')
  of_memory = (
      f'{bandwidth / 1e9:,.0f} GB/s of memory' if bandwidth else
      'memory bandwidth not known, see --config.peak_gb_per_second')
  return Rates(
      flops=flops, memory_bandwidth=bandwidth, is_measured=is_measured,
      source=f'{flops / _TERA:,.3g} TFLOP/s a device ({source}); {of_memory}')


def _matrix_product(rules: rules_lib.Rules, dtype: str) -> float:
  """Operations a second of a device while all have a product of their own."""
  num_devices = rules.mesh.size
  where = jax.NamedSharding(
      rules.mesh, jax.sharding.PartitionSpec(rules.mesh.axis_names))
  x = jax.jit(
      lambda: jnp.ones((num_devices, _SIDE, _SIDE), dtype),
      out_shardings=where)()
  product = jax.jit(
      lambda x: jnp.einsum('nij,njk->nik', x, x), out_shardings=where)
  jax.block_until_ready(product(x))  # Compiles.
  seconds = min(
      measure.timed(lambda: product(x))[0].seconds for _ in range(5))
  return 2.0 * _SIDE**3 / seconds

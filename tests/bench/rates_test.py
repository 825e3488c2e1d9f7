import jax
import pytest

from longjax.bench import rates, suite
from longjax.planner import topologies
from tests import tiny_model


def config(**facts):
  return suite.BenchConfig(
      suite='test', model=tiny_model.MODEL, **facts,
      cases={'one': suite.Case(program='score', prompt_len=4)})


@pytest.mark.parametrize('kind, tflops, terabytes', [
    ('NVIDIA H200', 989.5, 4.8),
    ('NVIDIA H100 80GB HBM3', 989.5, 3.35),
    ('NVIDIA H100 PCIe', 756.0, 2.0),
    ('NVIDIA GB200', 2500.0, 8.0),
    ('NVIDIA A100-SXM4-80GB', 312.0, 2.039),
    ('NVIDIA L40S', 362.0, 0.864),
    ('NVIDIA L4', 121.0, 0.3),
    ('cpu', 0.0, 0.0),
])
def test_devices_are_known_by_what_jax_calls_them(kind, tflops, terabytes):
  assert rates.known(kind) == pytest.approx((tflops * 1e12, terabytes * 1e12))


def test_tpus_are_those_of_the_planner():
  for chip in topologies.CHIPS.values():
    assert rates.known(chip.kind) == (chip.flops, chip.memory_bandwidth)


def test_an_unknown_device_is_measured_and_said_to_be():
  found = rates.find(config(), tiny_model.rules(data=8))
  assert found.is_measured
  assert 1e8 < found.flops < 1e14
  assert found.memory_bandwidth == 0.0
  assert jax.devices()[0].device_kind in found.source
  assert 'reaches in this run' in found.source


def test_the_config_knows_better():
  found = rates.find(
      config(peak_tflops=2.0, peak_gb_per_second=50.0), tiny_model.rules())
  assert (found.flops, found.memory_bandwidth) == (2e12, 50e9)
  assert not found.is_measured
  assert 'config.peak_tflops' in found.source

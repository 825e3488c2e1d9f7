"""Slices by name; their devices where libtpu is installed."""

import pytest

from longjax import types
from longjax.parallel import mesh
from longjax.planner import topologies


def test_slices_are_listed_from_small_to_large():
  for generation in topologies.CHIPS:
    sizes = [topologies.num_chips(t) for t in topologies.like(generation)]
    assert sizes == sorted(sizes) and sizes[-1] >= 256
  assert topologies.num_devices('v5p:4x4x8') == 128
  assert topologies.num_devices('tpu7x:2x2x1') == 8  # Two a chip.


@pytest.mark.parametrize('wrong, right', [
    ('v5p:4x4', 'v5p:2x4x4'), ('v6e:3x4', 'v6e:'), ('v5p-256', 'v5p:4x4x8'),
    ('v5litepod-16', 'v5e:4x4'), ('v6e-64', 'v6e:8x8'), ('h100', '')])
def test_a_wrong_name_is_answered_with_the_list(wrong, right):
  with pytest.raises(types.UserError) as error:
    topologies.chip(wrong)
  message = str(error.value)
  assert f'--plan={wrong} is no topology; did you mean {right}' in message
  assert 'v5e:1x1, 2x2, 2x4' in message and '8x8x16' in message


def test_an_axis_may_take_part_of_a_side_of_the_torus():
  pytest.importorskip('libtpu')
  topologies.compile_only()
  devices = topologies.devices('v5p:4x4x8')
  assert len(devices) == 128 and devices[0].device_kind == 'TPU v5'
  made = mesh.make(mesh.MeshConfig(data=1, fsdp=-1, seq=32, expert=2), devices)
  assert made.devices.shape == (1, 2, 32, 1, 2)
  # Neighbours along `seq` are one link apart, round the ring too.
  ring = [d.coords for d in made.devices[0, 0, :, 0, 0]]
  for here, there in zip(ring, [*ring[1:], ring[0]]):
    steps = [min(abs(a - b), n - abs(a - b))
             for a, b, n in zip(here, there, (4, 4, 8))]
    assert sum(steps) <= 2


def test_every_listed_slice_exists():
  pytest.importorskip('libtpu')
  topologies.compile_only()
  for topology in topologies.TOPOLOGIES:
    devices = topologies.devices(topology)
    assert len(devices) == topologies.num_devices(topology)
    assert devices[0].device_kind == topologies.chip(topology).kind


def test_without_libtpu_the_remedy_is_named(monkeypatch):
  def missing(name):
    raise topologies.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(topologies.metadata, 'version', missing)
  with pytest.raises(types.UserError, match='LONGJAX_EXTRAS=tpu'):
    topologies.devices('v5e:2x2')

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from longjax import types
from longjax.parallel import mesh


def test_the_rest_of_the_devices_goes_to_the_axis_of_minus_one():
  made = mesh.make(mesh.MeshConfig(data=-1, fsdp=2))
  assert dict(made.shape) == {
      'data': 4, 'fsdp': 2, 'seq': 1, 'tensor': 1, 'expert': 1}
  assert made.axis_names == mesh.AXES


def test_all_axes_are_auto():
  made = mesh.make(mesh.MeshConfig())
  assert made.axis_types == (AxisType.Auto,) * 5


def test_a_mesh_over_some_devices_holds_exactly_these():
  devices = jax.devices()[2:6]
  made = mesh.make(mesh.MeshConfig(data=2, tensor=2), devices)
  assert list(made.devices.flat) == devices


@pytest.mark.parametrize('sizes, message', [
    (dict(data=3), 'data=3.* needs a multiple of 3 devices .* are 8'),
    (dict(data=2, fsdp=2), 'uses 4 of 8 devices'),
    (dict(data=-1, fsdp=16), 'needs a multiple of 16 devices .* are 8'),
    (dict(data=16), 'needs a multiple of 16 devices .* are 8'),
])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes, message):
  with pytest.raises(types.UserError, match=message):
    mesh.make(mesh.MeshConfig(**sizes))


@pytest.mark.parametrize('sizes, message', [
    (dict(data=-1, seq=-1), 'data and seq are both -1'),
    (dict(tensor=0), r'mesh\.tensor=0 must be >= 1'),
    (dict(fsdp=-2), r'mesh\.fsdp=-2 must be >= 1'),
])
def test_impossible_sizes_are_refused_when_configured(sizes, message):
  with pytest.raises(types.UserError, match=message):
    mesh.MeshConfig(**sizes)


def test_the_cpu_becomes_as_many_devices_as_asked():
  # In a process of its own: jax here has its devices already.
  program = (
      'import jax\n'
      'from longjax.parallel import mesh\n'
      'mesh.split_cpu(3)\n'
      'assert jax.device_count() == 3\n'
      'mesh.split_cpu(3)\n')  # Asking again is no change.
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  subprocess.run([sys.executable, '-c', program], env=env, check=True)


def test_no_devices_are_refused():
  with pytest.raises(types.UserError, match='cpu_devices=0'):
    mesh.split_cpu(0)


def tpu_slices(number):
  """Devices of TPU slices of eight chips, to compile for."""
  topologies = pytest.importorskip('longjax.planner.topologies')
  pytest.importorskip('libtpu')
  topologies.compile_only()
  return jax.experimental.topologies.get_topology_desc(
      platform='tpu', topology_name='v5p:2x2x2', num_slices=number).devices


def test_only_copies_of_the_model_lie_on_different_slices():
  made = mesh.make(mesh.MeshConfig(data=4, fsdp=-1, seq=2), tpu_slices(2))
  slices = np.vectorize(lambda device: device.slice_index)(made.devices)
  assert made.devices.shape == (4, 2, 2, 1, 1)
  assert (slices[:2] == 0).all() and (slices[2:] == 1).all()


def test_a_copy_of_the_model_that_spans_slices_is_refused():
  with pytest.raises(types.UserError, match='data=1 .* over 2 TPU slices'):
    mesh.make(mesh.MeshConfig(data=1, fsdp=-1), tpu_slices(2))

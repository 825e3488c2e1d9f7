import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from longjax import types
from longjax.parallel import mesh, rules


@pytest.fixture
def train():
  return rules.Rules(mesh.make(mesh.MeshConfig(data=2, fsdp=2, tensor=2)))


def test_names_become_mesh_axes(train):
  assert train.spec('batch', 'seq', 'activation_embed') == P(
      ('data', 'fsdp', 'expert'), 'seq', None)
  assert train.spec('layers', 'embed', 'heads', None) == P(
      None, ('fsdp', 'seq', 'expert'), 'tensor', None)
  assert train.size('batch') == 4
  assert train.size(None) == 1


def test_decoding_does_not_split_the_width_of_weights():
  decode = rules.Rules(mesh.make(mesh.MeshConfig(fsdp=8)), rules.DECODE)
  assert decode.spec('embed', 'ffn') == P(None, 'tensor')


def test_two_dimensions_on_one_mesh_axis_are_refused(train):
  with pytest.raises(ValueError, match="'batch' and 'embed'.*'fsdp'"):
    train.spec('batch', 'seq', 'embed')


def test_an_unknown_name_is_refused(train):
  with pytest.raises(ValueError, match='unknown logical axis'):
    train.spec('bathc')


def test_constrain_places_an_array_inside_jit(train):
  x = jax.jit(lambda x: train.constrain(x * 2, 'batch', None))(jnp.ones((8, 3)))
  assert x.sharding.is_equivalent_to(train.sharding('batch', None), 2)
  assert x.addressable_shards[0].data.shape == (2, 3)


def test_constrain_names_a_dimension_that_does_not_divide(train):
  with pytest.raises(types.UserError, match=r'0 \(batch\) of size 6 .*fsdp=2'):
    train.constrain(jnp.ones((6, 3)), 'batch', None)


def test_a_parameter_that_does_not_divide_is_named(train):
  axes = {'layers': {'query': ('layers', 'embed', 'heads', None)}}
  shapes = {
      'layers': {'query': jax.ShapeDtypeStruct((3, 8, 1, 4), jnp.float32)}}
  with pytest.raises(
      types.UserError, match=r"'query'.*dimension 2 \(heads\) of size 1 "
      'does not divide over mesh tensor=2'):
    train.tree_shardings(axes, shapes)


def test_a_tree_of_names_becomes_a_tree_of_shardings(train):
  axes = {'a': {'b': ('embed', 'ffn')}, 'c': (None,)}
  shapes = {
      'a': {'b': jax.ShapeDtypeStruct((4, 6), jnp.float32)},
      'c': jax.ShapeDtypeStruct((5,), jnp.float32),
  }
  assert train.tree_shardings(axes, shapes) == {
      'a': {'b': train.sharding('embed', 'ffn')}, 'c': train.sharding(None)}


def test_equal_rules_are_one_cache_key(train):
  again = rules.Rules(mesh.make(mesh.MeshConfig(data=2, fsdp=2, tensor=2)))
  assert train == again
  assert hash(train) == hash(again)
  assert train != rules.Rules(train.mesh, rules.DECODE)

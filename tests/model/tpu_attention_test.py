import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import rows
from longjax.model import flash_attention, tpu_attention
from tests.model import kernel_checks

BLOCK_LEN = 128

forward = jax.jit(functools.partial(
    tpu_attention.forward, block_len=BLOCK_LEN, interpret=True))
backward = jax.jit(functools.partial(
    tpu_attention.backward, block_len=BLOCK_LEN, interpret=True))


def test_every_kind_of_row_equals_the_reference():
  meta = kernel_checks.row_kinds(256)
  kernel_checks.check_equals_reference(
      forward, backward, meta, meta, heads=(8, 2), head_size=16)


def test_queries_and_keys_may_differ_in_number_and_order():
  # Neither length is made of whole blocks; the order is nobody's.
  meta = kernel_checks.row_kinds(400)
  rng = np.random.default_rng(0)
  some, all_keys = rng.permutation(400)[:200], rng.permutation(400)
  query, key = (
      jax.tree.map(lambda x, order=order: x[:, order], meta)
      for order in (some, all_keys))
  kernel_checks.check_equals_reference(
      forward, backward, query, key, heads=(3, 1), head_size=8)


def test_parts_of_the_keys_merge_and_their_gradients_add_up():
  kernel_checks.check_halves_add_up(
      forward, backward, kernel_checks.row_kinds(256), heads=(8, 2),
      head_size=16)


def test_bfloat16_is_as_close_as_its_rounding():
  kernel_checks.check_bfloat16(
      forward, backward, kernel_checks.row_kinds(256), heads=(2, 1),
      head_size=128)


def test_a_query_that_sees_nothing_gives_and_gets_no_gradient():
  kernel_checks.check_blind_queries(forward, backward, row_len=256)


def test_skipped_blocks_are_not_touched_at_run_time():
  kernel_checks.check_skipped_blocks_are_not_read(
      forward, backward, row_len=256)


@pytest.mark.parametrize('by_key', [False, True])
def test_as_many_pairs_run_as_blocks_meet(by_key):
  meta = kernel_checks.row_kinds(64)
  pairs, num_pairs = jax.jit(functools.partial(
      tpu_attention.block_pairs, block_len=8, by_key=by_key))(meta, meta)
  pairs = np.asarray(pairs)
  assert np.all(pairs[num_pairs:] == np.iinfo(np.int32).max)
  pairs = pairs[:num_pairs]
  executed = flash_attention.num_executed_blocks(meta, meta, block_len=8)
  meets = pairs & tpu_attention._MEETS > 0
  assert np.sum(meets) == np.sum(executed)
  # Each result begins and ends once, and is not left in between.
  kept = pairs >> 17
  np.testing.assert_array_equal(
      kept[pairs & tpu_attention._FIRST > 0], np.arange(48))
  np.testing.assert_array_equal(
      kept[pairs & tpu_attention._LAST > 0], np.arange(48))
  assert np.all(np.diff(kept) >= 0)
  # What meets nothing is there once, to be written.
  without = ~np.isin(np.arange(48), kept[meets])
  np.testing.assert_array_equal(kept[~meets], np.flatnonzero(without))


@pytest.mark.parametrize('q_shape, k_shape, block_len, reason', [
    ((1, 512, 8, 128), (1, 512, 2, 128), 192, 'block_len=192'),
    ((1, 512, 8, 100), (1, 512, 2, 100), 128, 'head size 100'),
    ((1, 512, 64, 128), (1, 512, 1, 128), 1024, 'vector memory'),
    ((1, 2**18, 8, 128), (1, 2**18, 2, 128), 512, 'scalar memory'),
    ((1, 2**21, 8, 128), (1, 128, 2, 128), 128, '16384 blocks'),
])
def test_a_shape_that_cannot_run_says_why(q_shape, k_shape, block_len, reason):
  line = tpu_attention.why_not(
      q_shape, k_shape, jnp.bfloat16, block_len=block_len)
  assert reason in line and '\n' not in line
  q, k = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (q_shape, k_shape))
  meta_q, meta_k = (
      rows.TokenMeta(*[jax.ShapeDtypeStruct(x[:2], jnp.int32)] * 3)
      for x in (q_shape, k_shape))
  with pytest.raises(ValueError, match=reason):
    jax.eval_shape(
        functools.partial(tpu_attention.forward, block_len=block_len),
        q, k, k, meta_q, meta_k)


def test_the_shapes_of_a_long_context_can_run():
  for length, block_len in ((2**17, 512), (2**18, 1024)):
    assert tpu_attention.why_not(
        (1, length, 32, 128), (1, length, 4, 128), jnp.bfloat16,
        block_len=block_len) is None
  assert tpu_attention.why_not(
      (1, 512, 8, 128), (1, 512, 2, 128), jnp.float16,
      block_len=128).startswith('float16')


@pytest.fixture(scope='module')
def topology():
  """Devices of a TPU topology that is not there, to compile for."""
  pytest.importorskip('libtpu')
  from jax.experimental import topologies
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TPU_SKIP_MDS_QUERY', '1')
    patch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    yield lambda name: topologies.get_topology_desc(
        platform='tpu', topology_name=name)


@pytest.mark.parametrize('name, block_len', [
    ('v5e:2x2', 512),
    *(pytest.param(name, block_len, marks=pytest.mark.slow)
      for name in ('v5p:2x2x1', 'v6e:2x2') for block_len in (256, 512, 1024)),
])
def test_it_compiles_for_tpu_with_memory_for_copies_only(
    topology, name, block_len):
  sharding = jax.sharding.SingleDeviceSharding(topology(name).devices[0])

  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

  length = 8192
  q, k = shape(1, length, 32, 128), shape(1, length, 4, 128)
  meta = rows.TokenMeta(*[shape(1, length, dtype=jnp.int32)] * 3)
  per_query = shape(1, length, 32, dtype=jnp.float32)
  for function, args in (
      (tpu_attention.forward, (q, k, k, meta, meta)),
      (tpu_attention.backward, (
          q, k, k, meta, meta, per_query, q, per_query)),
  ):
    memory = jax.jit(functools.partial(function, block_len=block_len)).lower(
        *args).compile().memory_analysis()
    # Arguments and results with heads first: 0.3 GiB. Scores are 8 GiB.
    assert memory.temp_size_in_bytes < 1.25 * (
        memory.argument_size_in_bytes + memory.output_size_in_bytes)


def test_bfloat16_compiles_for_tpu_where_jax_is_set_to_exact_products(topology):
  sharding = jax.sharding.SingleDeviceSharding(topology('v5e:2x2').devices[0])

  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

  q, k = shape(1, 256, 4, 128), shape(1, 256, 2, 128)
  meta = rows.TokenMeta(*[shape(1, 256, dtype=jnp.int32)] * 3)
  with jax.default_matmul_precision('highest'):
    jax.jit(functools.partial(tpu_attention.forward, block_len=128)).lower(
        q, k, k, meta, meta).compile()

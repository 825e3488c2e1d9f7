import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import rows
from longjax.model import flash_attention, gpu_attention
from tests.model import kernel_checks

BLOCK_LEN = 16

forward = jax.jit(functools.partial(
    gpu_attention.forward, block_len=BLOCK_LEN, interpret=True))
backward = jax.jit(functools.partial(
    gpu_attention.backward, block_len=BLOCK_LEN, interpret=True))


def test_every_kind_of_row_equals_the_reference():
  meta = kernel_checks.row_kinds(64)
  kernel_checks.check_equals_reference(
      forward, backward, meta, meta, heads=(8, 2), head_size=16)


def test_queries_and_keys_may_differ_in_number_and_order():
  # Neither length is made of whole blocks; the order is nobody's.
  meta = kernel_checks.row_kinds(50)
  rng = np.random.default_rng(0)
  some, all_keys = rng.permutation(50)[:25], rng.permutation(50)
  query, key = (
      jax.tree.map(lambda x, order=order: x[:, order], meta)
      for order in (some, all_keys))
  kernel_checks.check_equals_reference(
      forward, backward, query, key, heads=(3, 1), head_size=16)


def test_parts_of_the_keys_merge_and_their_gradients_add_up():
  kernel_checks.check_halves_add_up(
      forward, backward, kernel_checks.row_kinds(64), heads=(8, 2),
      head_size=16)


def test_bfloat16_is_as_close_as_its_rounding():
  kernel_checks.check_bfloat16(
      forward, backward, kernel_checks.row_kinds(64), heads=(2, 1),
      head_size=128)


def test_a_query_that_sees_nothing_gives_and_gets_no_gradient():
  kernel_checks.check_blind_queries(forward, backward, row_len=32)


def test_skipped_blocks_are_not_touched_at_run_time():
  kernel_checks.check_skipped_blocks_are_not_read(
      forward, backward, row_len=32)


@pytest.mark.parametrize('by_key', [False, True])
def test_each_block_lists_those_it_meets_and_full_ones_first(by_key):
  meta = kernel_checks.row_kinds(64)
  order, counts = jax.jit(functools.partial(
      gpu_attention.block_lists, block_len=8, by_key=by_key))(meta, meta)
  np.testing.assert_array_equal(
      np.sum(counts[..., 1], axis=1),
      flash_attention.num_executed_blocks(meta, meta, block_len=8))
  meets = jax.vmap(functools.partial(
      flash_attention.meeting_blocks, block_len=8))(meta, meta)
  order, counts, meets = map(np.asarray, (order, counts, meets))
  if by_key:
    meets = np.swapaxes(meets, 1, 2)
  for place in np.ndindex(*counts.shape[:2]):
    num_full, num_meeting = counts[place]
    assert num_full <= num_meeting
    assert set(order[place][:num_meeting]) == set(np.flatnonzero(meets[place]))
  # Causal, the first kind: all but the diagonal are full.
  np.testing.assert_array_equal(
      counts[0, :, 1] - counts[0, :, 0], np.ones(8))


@pytest.mark.parametrize('q_shape, block_len, dtype, reason', [
    ((1, 512, 8, 128), 96, jnp.bfloat16, 'block_len 96'),
    ((1, 512, 8, 128), 8, jnp.bfloat16, 'block_len 8'),
    ((1, 512, 8, 80), 64, jnp.bfloat16, 'head size 80'),
    ((1, 512, 8, 128), 64, jnp.int8, 'int8'),
])
def test_a_shape_that_cannot_run_says_why(q_shape, block_len, dtype, reason):
  k_shape = (1, 512, 2, q_shape[3])
  line = gpu_attention.why_not(q_shape, k_shape, dtype, block_len=block_len)
  assert reason in line and '\n' not in line
  q, k = (jax.ShapeDtypeStruct(x, dtype) for x in (q_shape, k_shape))
  meta = rows.TokenMeta(*[jax.ShapeDtypeStruct((1, 512), jnp.int32)] * 3)
  with pytest.raises(ValueError, match=reason):
    jax.eval_shape(
        functools.partial(gpu_attention.forward, block_len=block_len),
        q, k, k, meta, meta)


@pytest.mark.skipif(
    jax.__version_info__ > (0, 10, 2),
    reason='later versions compile kernels while lowering, for a device')
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_it_lowers_to_three_triton_kernels_for_cuda(dtype):
  def shape(*dims, dtype=dtype):
    return jax.ShapeDtypeStruct(dims, dtype)

  length = 8192
  q, k = shape(1, length, 32, 128), shape(1, length, 4, 128)
  meta = rows.TokenMeta(*[shape(1, length, dtype=jnp.int32)] * 3)
  per_query = shape(1, length, 32, dtype=jnp.float32)
  for function, args, num_kernels in (
      (gpu_attention.forward, (q, k, k, meta, meta), 1),
      (gpu_attention.backward, (
          q, k, k, meta, meta, per_query, q, per_query), 2),
  ):
    lowered = jax.jit(functools.partial(function, block_len=64)).trace(
        *args).lower(lowering_platforms=('cuda',))
    assert lowered.as_text().count('xla.gpu.triton') == num_kernels

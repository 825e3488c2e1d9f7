import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import rows, types
from longjax.model import attention, flash_attention
from longjax.parallel import token_order
from tests import tiny_model


def group(prompt_len, response_lens=(1,)):
  return rows.Group(prompt=[1] * prompt_len, branches=[
      rows.Branch(response=[1] * n, trajectory=0) for n in response_lens])


def lengths(low, high, number):
  return np.random.default_rng(0).integers(low, high, number).tolist()


T = 16_384
ROWS = {
    'causal': [group(T)],
    'half full': [group(T // 2)],
    'packed': [group(n) for n in lengths(250, 3000, 9)],
    'shared prefix': [group(6000, lengths(500, 1250, 8))],
    'two groups': [
        group(4000, lengths(100, 600, 8)), group(3000, lengths(100, 600, 8))],
}


@pytest.mark.parametrize('kind', ROWS)
@pytest.mark.parametrize('seq', [2, 8])
def test_devices_execute_equally_many_blocks(kind, seq):
  rules = tiny_model.rules(seq=seq, data=8 // seq)
  meta = rows.pack(ROWS[kind], row_len=T, num_rows=8 // seq).meta
  size = token_order.block_len(T, seq, max_len=64)
  assert size == 64

  @jax.jit
  def executed(meta):
    order = attention.order(meta, block_len=64, rules=rules)
    dealt = jax.tree.map(lambda x: token_order.reorder(x, order)[:1], meta)
    parts = [
        jax.tree.map(lambda x, i=i: jnp.split(x, seq, axis=1)[i], dealt)
        for i in range(seq)]
    return [
        flash_attention.num_executed_blocks(part, dealt, block_len=64)[0]
        for part in parts]

  got = np.asarray(executed(meta))
  # Nothing is visited that would not be in natural order.
  assert got.sum() == flash_attention.num_executed_blocks(
      meta, meta, block_len=64)[0]
  assert got.max() <= 1.05 * got.mean(), got


def test_dealing_goes_back_and_forth_on_a_causal_row():
  order = token_order.deal(jnp.arange(1, 9)[None], 4)
  np.testing.assert_array_equal(order, [[0, 7, 1, 6, 2, 5, 3, 4]])


def test_reordering_is_undone_by_its_inverse_with_gradients():
  rng = np.random.default_rng(0)
  x = jnp.float32(rng.normal(size=(2, 24, 3)))
  order = jnp.stack([jnp.int32(rng.permutation(6)) for _ in range(2)])
  moved = token_order.reorder(x, order)
  assert (moved != x).any()
  for b in range(2):
    np.testing.assert_array_equal(
        moved[b].reshape(6, 4, 3), x[b].reshape(6, 4, 3)[order[b]])
  np.testing.assert_array_equal(
      token_order.reorder(moved, token_order.inverse(order)), x)
  weight = jnp.float32(rng.normal(size=x.shape))
  gradient = jax.grad(
      lambda x: jnp.sum(token_order.reorder(x, order) * weight))(x)
  np.testing.assert_array_equal(token_order.reorder(gradient, order), weight)


@pytest.mark.parametrize('length, num_devices, want', [
    (131_072, 16, 512), (16_384, 8, 256), (32_768, 16, 256), (64, 8, 1),
    (24, 8, 1), (96, 2, 4)])
def test_blocks_are_powers_of_two_and_eight_or_more_a_device(
    length, num_devices, want):
  assert token_order.block_len(length, num_devices, max_len=512) == want
  assert length % (num_devices * want) == 0


def test_a_block_length_asked_for_is_rounded_down_to_one_that_divides():
  assert token_order.block_len(2048, 2, max_len=96) == 64
  rules = tiny_model.rules(data=4, seq=2)
  meta = rows.pack([group(2048)] * 4, row_len=2048).meta
  order = attention.order(meta, block_len=96, rules=rules)
  np.testing.assert_array_equal(np.sort(order), [range(32)] * 4)


@pytest.mark.parametrize('length, message', [
    (66, 'row_len=66 cannot be split over mesh.seq=4; use a multiple of 4,'),
    (8200, 'row_len=8200 .* use a multiple of 512,')])
def test_rows_that_cannot_be_dealt_out_are_refused(length, message):
  with pytest.raises(types.UserError, match=message):
    token_order.check_len('row_len', length, 4)
  token_order.check_len('row_len', length, 1)


def test_rows_of_whole_blocks_and_short_rows_are_dealt_out():
  for length in (8, 1000, 4096, 8192, 131_072):
    token_order.check_len('row_len', length, 4)

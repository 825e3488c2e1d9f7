import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longjax import rows
from longjax.model import meeting_blocks
from tests.model import numpy_attention

meets_and_full = jax.jit(
    meeting_blocks.meets_and_full, static_argnames='block_len')


@st.composite
def token_meta(draw):
  """Metadata i32[1, 12] that is mostly constant over blocks of four."""

  def integers(low, high):
    blocks = draw(st.lists(st.integers(low, high), min_size=3, max_size=3))
    values = np.repeat(blocks, 4)
    for place, value in draw(st.dictionaries(
        st.integers(0, 11), st.integers(low, high), max_size=2)).items():
      values[place] = value
    return np.int32(values)[None]

  return rows.TokenMeta(
      group=integers(-1, 1), branch=integers(0, 2), position=integers(0, 4))


@settings(max_examples=200, deadline=None)
@given(token_meta(), token_meta())
def test_in_a_full_pair_every_query_sees_every_key(query, key):
  meets, full = map(np.asarray, meets_and_full(query, key, block_len=4))
  visible = np.asarray(rows.visible(query, key)).reshape(1, 3, 4, 3, 4)
  assert np.all(visible.all(axis=(2, 4))[full])
  assert not np.any(visible.any(axis=(2, 4)) & ~meets)


@pytest.mark.parametrize('fields, num_full', [
    # Causal: every block of 8 but those on the diagonal.
    (numpy_attention.packed([64], 64), 28),
    (numpy_attention.packed([32, 32], 64), 12),
    # The fifth block holds four tokens and padding.
    (numpy_attention.packed([36], 64), 6),
    # Inside the prefix 1, and for each branch 4 to the prefix, 1 to itself.
    (numpy_attention.shared_prefix(16, [16, 16, 16], 64), 16),
    (numpy_attention.packed([], 64), 0),
])
def test_pairs_off_the_diagonal_are_full(fields, num_full):
  meta = rows.TokenMeta(*map(jnp.int32, numpy_attention.stack(fields)))
  _, full = meets_and_full(meta, meta, block_len=8)
  assert np.sum(full) == num_full


def test_tokens_filled_up_are_padding():
  meta = rows.TokenMeta(*map(
      jnp.int32, numpy_attention.stack(numpy_attention.packed([6], 6))))
  group, branch, position = meeting_blocks.meta_rows(meta, 4)[:, 0]
  np.testing.assert_array_equal(group, [0, 0, 0, 0, 0, 0, -1, -1])
  np.testing.assert_array_equal(branch, np.zeros(8))
  np.testing.assert_array_equal(position, [0, 1, 2, 3, 4, 5, 0, 0])

import jax.numpy as jnp
import numpy as np

from longjax.model import rope

HEAD_DIM, THETA = 8, 1e4
# The last is where bfloat16, and float16 too, would merge neighbours.
POSITIONS = [0, 1, 2, 31, 4097]


def reference(x, position):
  """RoFormer Eq. 34, a channel pair (i, i + H/2) at a time, in float64."""
  out, half = np.zeros(HEAD_DIM), HEAD_DIM // 2
  for i in range(half):
    turn = np.exp(1j * position * THETA ** (-2 * i / HEAD_DIM))
    pair = complex(x[i], x[i + half]) * turn
    out[i], out[i + half] = pair.real, pair.imag
  return out


def rotated(x, positions):
  angle = rope.angles(
      jnp.int32(positions), head_dim=HEAD_DIM, theta=THETA)
  return rope.rotate(jnp.asarray(x), angle)


def test_channel_pairs_turn_by_their_own_frequency():
  x = np.random.default_rng(0).normal(size=(5, 3, HEAD_DIM))
  got = rotated(np.float32(x), POSITIONS)
  for t, n in np.ndindex(5, 3):
    np.testing.assert_allclose(
        got[t, n], reference(x[t, n], POSITIONS[t]), rtol=0, atol=2e-3)
    if POSITIONS[t] < 100:  # Angles carry the rounding of their size.
      np.testing.assert_allclose(
          got[t, n], reference(x[t, n], POSITIONS[t]), rtol=0, atol=1e-5)


def test_a_score_depends_on_the_distance_alone():
  rng = np.random.default_rng(1)
  q, k = (
      np.float32(rng.normal(size=(1, 1, HEAD_DIM))) for _ in range(2))

  def score(query_position, key_position):
    return float(jnp.sum(
        rotated(q, [query_position]) * rotated(k, [key_position])))

  np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
  assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_bfloat16_is_rotated_in_float32():
  x = jnp.ones((1, 1, HEAD_DIM), jnp.bfloat16)
  one, next_one = rotated(x, [4096]), rotated(x, [4097])
  assert one.dtype == jnp.bfloat16
  assert (one != next_one).any()

"""Keys of turns: of the reader and the turn, not of who else is asked."""

import jax
import numpy as np

from longjax.agents import rounds, sampled


def test_a_key_is_of_its_reader_and_turn_alone():
  key = jax.random.key(3)
  asked = [
      rounds.Prompt(query=0, sample=sample, turn=turn, tokens=(1,))
      for sample in range(3) for turn in range(2)]
  want = [
      jax.random.key_data(jax.random.fold_in(
          jax.random.fold_in(key, prompt.sample), prompt.turn))
      for prompt in asked]
  assert len({x.tobytes() for x in map(np.asarray, want)}) == len(asked)
  for some in (asked, asked[::-1], asked[2:3]):
    got = jax.random.key_data(sampled.turn_keys(key, some))
    np.testing.assert_array_equal(
        got, [want[asked.index(prompt)] for prompt in some])

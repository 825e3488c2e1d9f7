import functools

import jax
import jax.numpy as jnp
import numpy as np

from longjax import rows
from longjax.model import compute, incremental, transformer
from tests import tiny_model

MODEL = tiny_model.MODEL
RULES = tiny_model.rules()


def test_prefill_and_decode_steps_equal_the_whole_sequence():
  prompt_len, num_read = np.int32([6, 1, 4]), 5
  rng = np.random.default_rng(3)
  prompts = rng.integers(1, MODEL.vocab_size, (3, 6))
  # Two samples of each prompt; the first token of both is the prompt's last.
  samples = rng.integers(1, MODEL.vocab_size, (3, 2, num_read))
  samples[:, :, 0] = prompts[np.arange(3), prompt_len - 1][:, None]

  position = np.tile(np.arange(5), (3, 1))
  meta = rows.TokenMeta(
      group=np.where(position < prompt_len[:, None] - 1, 0, -1),
      branch=np.zeros_like(position), position=position)
  params = tiny_model.params()
  prefix, _ = jax.jit(functools.partial(
      transformer.prefill, config=MODEL, rules=RULES,
      compute=compute.Compute()))(params, prompts[:, :5], meta)
  read = jax.jit(functools.partial(
      incremental.decode_step, config=MODEL, rules=RULES))
  empty = jnp.zeros((MODEL.num_layers, 3, 2, num_read + 2,
                     MODEL.num_kv_heads, MODEL.head_dim))
  suffix = transformer.KeyValues(key=empty, value=empty)
  got = []
  for slot in range(num_read):
    hidden, suffix, _ = read(
        params, samples[:, :, slot], prefix, meta, suffix, jnp.int32(slot),
        prompt_len - 1)
    got.append(hidden)

  # The same tokens, one plain causal sequence for each sample.
  sequences = np.zeros((6, 11), np.int32)
  for i, (p, g) in enumerate(np.ndindex(3, 2)):
    prefix_len = prompt_len[p] - 1
    sequences[i, :prefix_len] = prompts[p, :prefix_len]
    sequences[i, prefix_len:prefix_len + num_read] = samples[p, g]
  places = np.tile(np.arange(11), (6, 1))
  whole = jax.jit(functools.partial(
      transformer.hidden_states, config=MODEL, rules=RULES,
      compute=compute.Compute(attention='reference')))(
          params, sequences, rows.TokenMeta(
              group=np.zeros_like(places), branch=np.zeros_like(places),
              position=places)).states
  for i, (p, g) in enumerate(np.ndindex(3, 2)):
    for slot in range(num_read):
      np.testing.assert_allclose(
          got[slot][p, g], whole[i, prompt_len[p] - 1 + slot], rtol=0,
          atol=1e-5)

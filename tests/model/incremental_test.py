"""Tests for longjax.model.incremental."""

import functools

import jax
import numpy as np
import pytest

from longjax import rows
from longjax.model import compute, transformer
from longjax.parallel import rules as rules_lib
from tests import tiny_model
from tests.model import chunk_by_chunk

MODEL = tiny_model.MODEL
RULES = rules_lib.for_sampler(tiny_model.rules(), 3).decode
PROMPT_LEN, NUM_READ = np.int32([6, 1, 4]), 5


def texts():
  """Prompts but for their last token, and two samples of each."""
  rng = np.random.default_rng(3)
  prompts = rng.integers(1, MODEL.vocab_size, (3, 6))
  # The first token of both samples is the prompt's last.
  samples = rng.integers(1, MODEL.vocab_size, (3, 2, NUM_READ))
  samples[:, :, 0] = prompts[np.arange(3), PROMPT_LEN - 1][:, None]
  return [p[:n - 1] for p, n in zip(prompts, PROMPT_LEN)], samples


@functools.cache
def want():
  """Hidden states of one plain causal sequence for each sample."""
  prompts, samples = texts()
  sequences = np.zeros((6, 11), np.int32)
  for i, (p, g) in enumerate(np.ndindex(3, 2)):
    prefix_len = PROMPT_LEN[p] - 1
    sequences[i, :prefix_len] = prompts[p]
    sequences[i, prefix_len:prefix_len + NUM_READ] = samples[p, g]
  places = np.tile(np.arange(11), (6, 1))
  whole = jax.jit(functools.partial(
      transformer.hidden_states, config=MODEL, rules=tiny_model.rules(),
      compute=compute.Compute(attention='reference')))(
          tiny_model.params(), sequences, rows.TokenMeta(
              group=np.zeros_like(places), branch=np.zeros_like(places),
              position=places)).states
  return np.stack([
      whole[i, PROMPT_LEN[i // 2] - 1:][:NUM_READ] for i in range(6)
  ]).reshape(3, 2, NUM_READ, -1)


def got(chunk_len, **how):
  prompts, samples = texts()
  return chunk_by_chunk.hidden_states(
      tiny_model.params(), prompts, samples, config=MODEL, rules=RULES,
      chunk_len=chunk_len, **how)


@pytest.mark.parametrize('chunk_len', [5, 8, 2, 1])
def test_prefill_and_decode_steps_equal_the_whole_sequence(chunk_len):
  np.testing.assert_allclose(
      got(chunk_len, num_places=NUM_READ + 2), want(), rtol=0, atol=1e-5)


def test_samples_may_begin_at_any_tick_of_the_clock_and_sit_anywhere():
  first_tick = np.array([[0, 3], [7, 1], [12, 4]])
  for seed in range(3):
    np.testing.assert_allclose(
        got(2, first_tick=first_tick, seed=seed), want(), rtol=0, atol=1e-5)


def test_samples_begun_elsewhere_go_on_as_if_they_had_not_been_moved():
  num_begun = np.array([[4, 0], [1, 3], [2, 4]])
  first_tick = np.array([[0, 2], [3, 1], [9, 4]])
  is_read = np.arange(NUM_READ) >= num_begun[..., None]
  np.testing.assert_allclose(
      got(2, num_begun=num_begun, first_tick=first_tick, num_places=7),
      np.where(is_read[..., None], want(), 0.0), rtol=0, atol=1e-5)

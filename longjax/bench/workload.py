"""Prompts and responses of random tokens, and what must be computed for them.

The *shared* workload holds each prompt once with its G responses. The
*unshared* one gives every response a prompt of its own: the same tokens, as
P * G prompts with one response each. Both are packed, sampled and counted by
the same code; they differ in their lists of prompts only.

P prompts, G samples per prompt, R response tokens, S prompt tokens that are
read but for the last.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from longjax import types
from longjax.bench import suite
from longjax.model import architecture
from longjax.planner import flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """Prompts and the responses to them.

  Attributes:
    prompts: P of them.
    rollouts: NumPy, [P, G, R].
  """

  prompts: list[types.Prompt]
  rollouts: types.Rollouts

  @property
  def lengths(self) -> np.ndarray:  # i32[P, G]
    """Tokens of each response."""
    return np.asarray(self.rollouts.lengths)

  @property
  def num_prompt_tokens(self) -> int:
    """Read of all prompts but for their last tokens, which responses read."""
    return sum(len(prompt.tokens) - 1 for prompt in self.prompts)

  @property
  def num_response_tokens(self) -> int:
    """Of all responses."""
    return int(self.lengths.sum())


def make(
    case: suite.Case, *, num_prompts: int, vocab_size: int, seed: int
) -> Workload:
  """The shared workload of a case; the same seed gives the same tokens."""
  rng = np.random.default_rng(seed)
  shape = (num_prompts, case.num_samples, case.response_len)
  lengths = rng.integers(
      case.shortest_response or case.response_len, case.response_len,
      shape[:2], endpoint=True)
  tokens = rng.integers(1, vocab_size, (num_prompts, case.prompt_len))
  mask = np.arange(case.response_len) < lengths[..., None]
  # What a sampler that finds all tokens alike would say of them.
  logprobs = np.float32(-np.log(vocab_size) * mask)
  written: dict[str, Any] = dict(
      tokens=np.int32(rng.integers(1, vocab_size, shape) * mask),
      lengths=np.int32(lengths), logprobs=logprobs, entropy=-logprobs,
      entropy_t1=-logprobs, is_finished=np.zeros(shape[:2], bool))
  return Workload(
      prompts=[_prompt(number, row.tolist())
               for number, row in enumerate(tokens)],
      rollouts=types.Rollouts(**written))


def unshared(work: Workload, *, are_distinct: bool = False) -> Workload:
  """The same responses, each to a prompt of its own.

  Args:
    work: shared.
    are_distinct: copies of a prompt differ in their first tokens, so that a
      sampler that recognises prompts must read each of them.
  """
  num_samples = work.lengths.shape[1]
  prompts: list[types.Prompt] = []
  for prompt in work.prompts:
    for g in range(num_samples):
      first = g + 1 if are_distinct else prompt.tokens[0]
      prompts.append(_prompt(len(prompts), [first, *prompt.tokens[1:]]))
  return Workload(
      prompts=prompts, rollouts=jax.tree.map(
          lambda x: x.reshape(-1, 1, *x.shape[2:]), work.rollouts))


def _prompt(number: int, tokens: list[int]) -> types.Prompt:
  example = types.TaskExample(
      id=f'random {number}', task='bench', kind='qa', documents=(),
      question='', answers=())
  return types.Prompt(example=example, tokens=tuple(tokens), number=number)


def num_tokens(program: suite.Program, work: Workload) -> int:
  """Tokens a program computes, each prompt of the workload once."""
  if program == 'prefill':
    return work.num_prompt_tokens
  if program == 'decode':
    return work.num_response_tokens
  return work.num_prompt_tokens + work.num_response_tokens


def needed_flops(
    program: suite.Program, work: Workload, model: architecture.ModelConfig
) -> flops.Flops:
  """Operations that the mathematics asks for, each prompt once.

  Only pairs of tokens that see each other count.
  """
  prefixes = [len(prompt.tokens) - 1 for prompt in work.prompts]
  branches = [row.tolist() for row in work.lengths]
  if program == 'prefill':
    return flops.forward(
        model, num_tokens=work.num_prompt_tokens, num_scored=0,
        num_pairs=sum(flops.visible_pairs(p, ()) for p in prefixes))
  if program == 'decode':
    return flops.forward(
        model, num_tokens=work.num_response_tokens,
        num_scored=work.num_response_tokens,
        num_pairs=sum(
            flops.visible_pairs(p, ns) - flops.visible_pairs(p, ())
            for p, ns in zip(prefixes, branches, strict=True)))
  forward = flops.forward(
      model, num_tokens=num_tokens(program, work),
      num_pairs=sum(
          flops.visible_pairs(p, ns)
          for p, ns in zip(prefixes, branches, strict=True)),
      num_scored=work.num_response_tokens)
  return flops.needed_update(forward) if program == 'update' else forward


def decode_bytes(
    work: Workload, model: architecture.ModelConfig, *, width: int
) -> float:
  """Bytes that decoding must read, all responses written side by side.

  With every token that the longest response writes, all weights a token meets
  are read once, the keys and values of each prompt once, and those of each
  response up to where it stands. Experts count as if all were met.

  Args:
    work: what is decoded.
    model: sizes.
    width: bytes of a number.
  """
  weights = flops.num_parameters(model)
  if not model.tied_embeddings:  # Of the embedding a few rows are looked up.
    weights -= model.vocab_size * model.embed_dim
  of_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
  own = sum(n * (n + 1) // 2 for n in work.lengths.reshape(-1).tolist())
  steps = work.lengths.max(axis=1)  # With any sample of the prompt.
  prefix = sum(
      (len(prompt.tokens) - 1) * int(n)
      for prompt, n in zip(work.prompts, steps, strict=True))
  return width * (
      int(steps.max()) * weights + of_token * (own + prefix))

"""The sampler: prompts in, rollouts out, inside the training process.

Prompts are grouped into a few length buckets, so that a handful of compiled
programs serve every batch. The engine holds no parameters: they are an
argument, so the policy just updated is the policy that writes.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from longjax import types
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib
from longjax.rollout import decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
  """Shapes of the compiled sampling programs.

  Attributes:
    prompt_buckets: allowed prompt lengths in tokens, increasing; a prompt is
      padded to the first that holds it.
    prompts_per_batch: P of one program call; a multiple of the mesh's data
      shards.
  """

  prompt_buckets: tuple[int, ...]
  prompts_per_batch: int

  def __post_init__(self):
    if not self.prompt_buckets or list(self.prompt_buckets) != sorted(
        set(self.prompt_buckets)) or self.prompt_buckets[0] < 2:
      raise types.UserError(
          f'engine.prompt_buckets={self.prompt_buckets} must be increasing '
          'lengths of at least 2 tokens.')
    if self.prompts_per_batch < 1:
      raise types.UserError(
          f'engine.prompts_per_batch={self.prompts_per_batch} must be >= 1.')


class Engine:
  """Compiled sampling programs for one model shape, sampler and mesh."""

  def __init__(
      self,
      *,
      model: architecture.ModelConfig,
      sampler: decode.SamplerConfig,
      engine: EngineConfig,
      stop_ids: tuple[int, ...],
      rules: rules_lib.Rules,
      compute: compute_lib.Compute,
      record_experts: bool = False,
  ):
    shards = rules.size('batch')
    if engine.prompts_per_batch % shards:
      raise types.UserError(
          f'engine.prompts_per_batch={engine.prompts_per_batch} does not '
          f'divide over the {shards} data shards of mesh '
          f'{dict(rules.mesh.shape)}; use a multiple of {shards}.')
    self._engine = engine
    self._rules = rules
    self._num_programs = 0

    def generate(params, batch, key, num_samples):
      self._num_programs += 1  # While tracing only.
      return decode.generate(
          params, batch, key, num_samples=num_samples, sampler=sampler,
          config=model, rules=rules, compute=compute, stop_ids=stop_ids,
          record_experts=record_experts)

    self._generate = jax.jit(generate, static_argnames=('num_samples',))

  def num_programs(self) -> int:
    """Programs traced so far; constant in steady state."""
    return self._num_programs

  def sample(
      self,
      params: types.Params,
      prompts: Sequence[types.Prompt],
      key: jax.Array,
      *,
      num_samples: int,
  ) -> types.Rollouts:
    """Samples responses; result row i belongs to `prompts[i]`.

    Args:
      params: the policy.
      prompts: at least one, of any lengths up to the largest bucket.
      key: typed PRNG key. A sample depends on it, its prompt's number and its
        own number, not on the batch it is drawn in.
      num_samples: G.

    Returns:
      NumPy rollouts [P, G, R].
    """
    if not prompts:
      raise ValueError('there is no prompt to sample from.')
    parts = []
    for indices, batch in self._batches(prompts):
      rollouts = self._generate(params, batch, key, num_samples=num_samples)
      parts.append((indices, multihost.to_host(rollouts)))
    out = jax.tree.map(
        lambda x: np.zeros((len(prompts), *x.shape[1:]), x.dtype), parts[0][1])
    for indices, part in parts:

      def put(destination, source, indices=indices):
        destination[indices] = source[:len(indices)]

      jax.tree.map(put, out, part)
    return out

  def _batches(
      self, prompts: Sequence[types.Prompt]
  ) -> Iterator[tuple[list[int], decode.PromptBatch]]:
    by_bucket: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
      by_bucket.setdefault(self._bucket(prompt), []).append(i)
    size = self._engine.prompts_per_batch
    for bucket in sorted(by_bucket):
      members = by_bucket[bucket]
      for start in range(0, len(members), size):
        indices = members[start:start + size]
        batch = pad([prompts[i] for i in indices], num_prompts=size,
                    prompt_len=bucket)
        yield indices, multihost.put(batch, self._rules.sharding('batch'))

  def _bucket(self, prompt: types.Prompt) -> int:
    for bucket in self._engine.prompt_buckets:
      if len(prompt.tokens) <= bucket:
        return bucket
    raise types.UserError(
        f'prompt {prompt.example.id} has {len(prompt.tokens)} tokens, more '
        f'than the largest of engine.prompt_buckets='
        f'{self._engine.prompt_buckets}; add a larger bucket.')


def pad(
    prompts: Sequence[types.Prompt], *, num_prompts: int, prompt_len: int
) -> decode.PromptBatch:
  """Lays prompts out as fixed-shape NumPy arrays."""
  batch = decode.PromptBatch(
      tokens=np.zeros((num_prompts, prompt_len), np.int32),
      last_token=np.zeros(num_prompts, np.int32),
      lengths=np.zeros(num_prompts, np.int32),
      numbers=np.zeros(num_prompts, np.uint32))
  for i, prompt in enumerate(prompts):
    length = len(prompt.tokens)
    batch.tokens[i, :length - 1] = prompt.tokens[:-1]
    batch.last_token[i] = prompt.tokens[-1]
    batch.lengths[i] = length
    batch.numbers[i] = prompt.number
  return batch


def response_text(
    tokenizer: tokenizer_lib.Tokenizer, rollouts: types.Rollouts, p: int, g: int
) -> str:
  """Text of a response, '</think>' visible, without the stop token."""
  ids = rollouts.tokens[p, g, :rollouts.lengths[p, g]]
  if rollouts.is_finished[p, g]:
    ids = ids[:-1]
  return tokenizer.decode(ids.tolist())

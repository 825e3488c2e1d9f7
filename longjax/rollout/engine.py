"""The sampler: prompts in, rollouts out, inside the training process.

Prompts are grouped into a few length buckets, so that a handful of compiled
programs serve every batch. The engine holds no parameters: they are an
argument, so the policy just updated is the policy that writes. A session is
the time during which they do not change; within it a prompt, or the beginning
of one, that comes back is not read again.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from longjax import types
from longjax.data import chat
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import rules as rules_lib
from longjax.rollout import continuous, decode

# Tokens a call writes for each sample at most: host and devices meet no more
# often, and what is handed over stays small.
_MAX_STEPS = 128

# Chunks of a prompt are whole blocks of attention.
_ALIGNMENT = 64

# A person who reads along sees tokens appear so many at a time.
_STREAM_STEPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
  """Shapes of the compiled sampling programs.

  Attributes:
    prompt_buckets: allowed prompt lengths in tokens, increasing; a prompt is
      padded to the first that holds it.
    prompts_at_once: P, lanes: prompts whose keys and values are held.
    samples_per_prompt: seats of a lane: samples that may read it at a time.
    samples_at_once: M, slots: samples being written at a time; 0 means P times
      `samples_per_prompt`. The next sample takes the place of one that ends,
      so slots are busy while samples are many times more than slots.
    chunk_len: tokens of a prompt read at once at most; the longest prompt of a
      bucket is cut into equal chunks, C, which are reused or not as a whole.
  """

  prompt_buckets: tuple[int, ...]
  prompts_at_once: int
  samples_per_prompt: int = 1
  samples_at_once: int = 0
  chunk_len: int = 2048

  def __post_init__(self):
    if not self.prompt_buckets or list(self.prompt_buckets) != sorted(
        set(self.prompt_buckets)) or self.prompt_buckets[0] < 2:
      raise types.UserError(
          f'engine.prompt_buckets={self.prompt_buckets} must be increasing '
          'lengths of at least 2 tokens.')
    for name, least in (('prompts_at_once', 1), ('samples_per_prompt', 1),
                        ('samples_at_once', 0), ('chunk_len', 1)):
      if getattr(self, name) < least:
        raise types.UserError(
            f'engine.{name}={getattr(self, name)} must be >= {least}.')

    if self.num_slots > self.prompts_at_once * self.samples_per_prompt:
      raise types.UserError(
          f'engine.samples_at_once={self.samples_at_once} is more than '
          f'prompts_at_once={self.prompts_at_once} prompts have samples '
          f'({self.samples_per_prompt} each); lower it.')

  @property
  def num_slots(self) -> int:
    """M."""
    return self.samples_at_once or (
        self.prompts_at_once * self.samples_per_prompt)


def check(
    config: EngineConfig, rules: rules_lib.Rules, *, name: str = 'engine'
) -> None:
  """Refuses lanes and slots that do not divide over the mesh.

  Args:
    config: of the engine.
    rules: logical axes to mesh axes.
    name: where its fields stand in the config, for the message.
  """
  shards = rules_lib.for_sampler(
      rules, config.prompts_at_once).decode.size('batch')
  for field, number in (('prompts_at_once', config.prompts_at_once),
                        ('samples_at_once', config.num_slots)):
    if number % shards:
      raise types.UserError(
          f'{name}.{field}={number} does not divide over the {shards} data '
          f'shards of mesh {dict(rules.mesh.shape)}; use a multiple of '
          f'{shards}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
  """A token as it is written.

  Attributes:
    prompt: index of the prompt.
    sample: number of the sample.
    token: its id.
    logprob: nats, see `types.Rollouts`.
    is_stop: whether it is a stop token, which is no text.
    is_last: whether the response ends here.
  """

  prompt: int
  sample: int
  token: int
  logprob: float
  is_stop: bool
  is_last: bool


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
    check(engine, rules)
    self.config = engine
    self.sampler = sampler
    self._jitted = {
        bucket: continuous.Jitted(programs(
            engine, bucket, config=model, sampler=sampler, stop_ids=stop_ids,
            compute=compute, record_experts=record_experts,
            rules=rules_lib.for_sampler(rules, engine.prompts_at_once)))
        for bucket in engine.prompt_buckets}

  def num_programs(self) -> int:
    """Programs compiled so far; constant in steady state."""
    return sum(x.num_programs() for x in self._jitted.values())

  def session(self, params: types.Params) -> 'Session':
    """The time during which the policy is `params`."""
    return Session(self.config, self.sampler, self._jitted, params)

  def sample(
      self,
      params: types.Params,
      prompts: Sequence[types.Prompt],
      key: jax.Array,
      *,
      num_samples: int,
  ) -> types.Rollouts:
    """A session of one call; see `Session.sample`."""
    return self.session(params).sample(
        prompts, prompt_keys(key, prompts), num_samples=num_samples)

  def generate(
      self,
      params: types.Params,
      prompts: Sequence[types.Prompt],
      key: jax.Array,
      *,
      num_samples: int = 1,
  ) -> Iterator[Token]:
    """A session of one call; see `Session.generate`."""
    return self.session(params).generate(
        prompts, prompt_keys(key, prompts), num_samples=num_samples)


def programs(
    engine: EngineConfig, bucket: int, *, rules: rules_lib.SamplerRules,
    sampler: decode.SamplerConfig, **facts: Any,
) -> decode.Programs:
  """What is compiled for prompts of a bucket."""
  num_devices = rules.prefill.size('seq')
  # The last token of a prompt is read by its samples.
  longest = max(bucket - 1, 1)
  # Chunks of one length, as few as `engine.chunk_len` allows, that fill the
  # lane: what stands empty in it is read for every token that is written.
  num_chunks = -(-longest // engine.chunk_len)
  is_aligned = num_chunks > 1 and engine.chunk_len % _ALIGNMENT == 0
  multiple = math.lcm(num_devices, _ALIGNMENT if is_aligned else 1)
  chunk_len = -(-longest // (num_chunks * multiple)) * multiple
  return decode.Programs(
      rules=rules, sampler=sampler, chunk_len=chunk_len,
      lane_len=-(-longest // chunk_len) * chunk_len,
      max_steps=min(_MAX_STEPS, sampler.max_response_len), **facts)


# Compiled, because `vmap` alone traces it anew in every call.
@jax.jit
def fold_in(
    key: jax.Array,  # key[] or key[P]
    numbers: jax.Array,  # u32[P]
) -> jax.Array:  # key[P]
  """A key for each number."""
  in_axes = (0 if key.ndim else None, 0)
  return jax.vmap(jax.random.fold_in, in_axes=in_axes)(key, numbers)


def prompt_keys(
    key: jax.Array,  # key[] or key[P]
    prompts: Sequence[types.Prompt],
) -> np.ndarray:  # u32[P, ...]
  """One raw key for each prompt, whatever else is in the batch."""
  numbers = np.asarray([prompt.number for prompt in prompts], np.uint32)
  return np.asarray(jax.random.key_data(fold_in(key, numbers)))


class Session:
  """The sampler while parameters do not change."""

  def __init__(
      self,
      config: EngineConfig,
      sampler: decode.SamplerConfig,
      jitted: Mapping[int, continuous.Jitted],
      params: types.Params,
  ):
    self.stats = continuous.Stats()
    self._config = config
    self._sampler = sampler
    self._jitted = jitted
    self._params = next(iter(jitted.values())).prepare(params)
    # Of the bucket last used: caches are large.
    self._bucket = 0
    self._batch: continuous.ContinuousBatch | None = None
    self._is_running = False

  def sample(
      self,
      prompts: Sequence[types.Prompt],
      keys: np.ndarray,  # u32[P, ...]
      *,
      num_samples: int,
      begun: types.Rollouts | None = None,
      max_lens: np.ndarray | None = None,  # i32[P, G]
      should_cut: Callable[[types.Rollouts], bool] = lambda rollouts: False,
      on_end: Callable[[types.Rollouts, int, int], None] = (
          lambda rollouts, p, g: None),
  ) -> types.Rollouts:
    """Samples responses; result row i belongs to `prompts[i]`.

    Args:
      prompts: at least one, of any lengths up to the largest bucket.
      keys: a raw key for each, see `prompt_keys`. A sample depends on it and
        on its own number, not on what it is drawn beside.
      num_samples: G.
      begun: of an earlier call that was cut, for these prompts: samples that
        ended are kept, others go on. They are drawn with the parameters of
        this session from here on; what was drawn before keeps its scores.
      max_lens: a cap for each sample below the sampler's, `begun` included.
      should_cut: asked now and then with what there is so far; True ends the
        call and leaves samples unfinished.
      on_end: called once for every sample that has ended, with what there is
        so far, its prompt's index and its number: at once for those that had
        ended in `begun`, for others as soon as they do. It keeps the devices
        waiting.

    Returns:
      NumPy rollouts [P, G, R].
    """
    out = self._start(prompts, num_samples, begun)
    caps = self._caps(out, max_lens)
    for p, g in np.argwhere(out.lengths >= caps).tolist():
      on_end(out, p, g)
    pieces = self._run(
        prompts, keys, out, caps=caps, max_steps=_MAX_STEPS,
        should_cut=lambda: should_cut(out))
    for piece in pieces:
      _add(out, piece)
      if piece.is_last:
        on_end(out, piece.prompt, piece.sample)
    return out

  def generate(
      self,
      prompts: Sequence[types.Prompt],
      keys: np.ndarray,  # u32[P, ...]
      *,
      num_samples: int = 1,
  ) -> Iterator[Token]:
    """Writes responses for someone who reads along; see `sample`.

    Yields:
      Tokens as they are written, those of a response in order. `streaming`
      makes text of them.
    """
    out = self._start(prompts, num_samples, None)
    pieces = self._run(
        prompts, keys, out, caps=self._caps(out, None),
        max_steps=_STREAM_STEPS)
    for piece in pieces:
      last = piece.tokens.size - 1
      for i, (token, logprob) in enumerate(zip(piece.tokens, piece.logprobs)):
        yield Token(
            prompt=piece.prompt, sample=piece.sample, token=int(token),
            logprob=float(logprob), is_stop=piece.is_stopped and i == last,
            is_last=piece.is_last and i == last)

  def forget(self) -> None:
    """Gives up what has been read.

    What is written from here on is bit for bit what a new session writes.
    Else it may differ in the last bits of its scores: what is reused was
    perhaps read beside something else.
    """
    self._batch = None

  def _start(
      self,
      prompts: Sequence[types.Prompt],
      num_samples: int,
      begun: types.Rollouts | None,
  ) -> types.Rollouts:
    """Where the results are put: what was written before, or nothing yet."""
    if not prompts:
      raise ValueError('there is no prompt to sample from.')
    if begun is not None:
      return jax.tree.map(np.copy, begun)
    shape = (len(prompts), num_samples)
    by_token = (*shape, self._sampler.max_response_len)
    made = next(iter(self._jitted.values())).programs
    expert_ids = prompt_expert_ids = None
    if made.record_experts:
      moe = made.config.moe
      assert moe is not None
      each = (made.config.num_layers, moe.num_active)
      longest = max(len(prompt.tokens) - 1 for prompt in prompts)
      expert_ids = np.zeros((*by_token, *each), moe.id_dtype)
      prompt_expert_ids = np.zeros(
          (len(prompts), longest, *each), moe.id_dtype)
    return types.Rollouts(
        tokens=np.zeros(by_token, np.int32), lengths=np.zeros(shape, np.int32),
        logprobs=np.zeros(by_token, np.float32),
        entropy=np.zeros(by_token, np.float32),
        entropy_t1=np.zeros(by_token, np.float32),
        is_finished=np.zeros(shape, bool), expert_ids=expert_ids,
        prompt_expert_ids=prompt_expert_ids)

  def _caps(
      self,
      out: types.Rollouts,
      max_lens: np.ndarray | None,  # i32[P, G]
  ) -> np.ndarray:  # i64[P, G]
    """How long each sample may get; one that ended writes nothing more."""
    caps = np.full(out.lengths.shape, self._sampler.max_response_len)
    if max_lens is not None:
      caps = np.minimum(caps, max_lens)
    return np.where(out.is_finished, out.lengths, caps)

  def _run(
      self,
      prompts: Sequence[types.Prompt],
      keys: np.ndarray,
      out: types.Rollouts,
      *,
      max_steps: int,
      caps: np.ndarray,  # i64[P, G]
      should_cut: Callable[[], bool] = lambda: False,
  ) -> Iterator[continuous.Piece]:
    """What is written, bucket by bucket."""
    if self._is_running:
      raise ValueError(
          'an earlier iterator over what this session writes has not come to '
          'its end; exhaust it or close it.')
    self._is_running = True
    try:
      yield from self._run_buckets(
          prompts, keys, out, max_steps=max_steps, caps=caps,
          should_cut=should_cut)
    finally:
      self._is_running = False

  def _run_buckets(
      self, prompts, keys, out, *, max_steps, caps, should_cut
  ) -> Iterator[continuous.Piece]:
    by_bucket: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
      by_bucket.setdefault(self._bucket_of(prompt), []).append(i)
    for bucket, members in sorted(by_bucket.items()):
      requests = [
          continuous.Request(
              tokens=prompts[i].tokens, key=keys[i], max_lens=caps[i].tolist(),
              begun=[row[:n].tolist() for row, n in zip(
                  out.tokens[i], out.lengths[i])])
          for i in members]
      with contextlib.closing(self._open(bucket).run(
          requests, max_steps=min(
              max_steps, self._sampler.max_response_len))) as running:
        for pieces in running:
          for piece in pieces:
            yield dataclasses.replace(piece, prompt=members[piece.prompt])
          if should_cut():
            return

  def _open(self, bucket: int) -> continuous.ContinuousBatch:
    """The caches of a bucket; those of another are given up."""
    if self._batch is None or self._bucket != bucket:
      self._batch = None  # Before the next one takes its memory.
      self._batch = continuous.ContinuousBatch(
          self._jitted[bucket], self._params,
          num_lanes=self._config.prompts_at_once,
          num_slots=self._config.num_slots,
          num_seats=self._config.samples_per_prompt, stats=self.stats)
      self._bucket = bucket
    return self._batch

  def _bucket_of(self, prompt: types.Prompt) -> int:
    for bucket in self._config.prompt_buckets:
      if len(prompt.tokens) <= bucket:
        return bucket
    raise types.UserError(
        f'prompt {prompt.example.id} has {len(prompt.tokens)} tokens, more '
        f'than the largest of engine.prompt_buckets='
        f'{self._config.prompt_buckets}; add a larger bucket.')


def _add(out: types.Rollouts, piece: continuous.Piece) -> None:
  """Writes a piece behind what the sample has."""
  sample = piece.prompt, piece.sample
  new = slice(piece.first, piece.first + piece.tokens.size)
  for name in ('tokens', 'logprobs', 'entropy', 'entropy_t1', 'expert_ids'):
    array = getattr(out, name)
    if array is not None:
      array[sample][new] = getattr(piece, name)
  out.lengths[sample] = new.stop
  out.is_finished[sample] = piece.is_stopped
  if piece.prompt_expert_ids is not None:
    assert out.prompt_expert_ids is not None
    of_prompt = out.prompt_expert_ids[piece.prompt]
    known = piece.prompt_expert_ids[:len(of_prompt)]
    of_prompt[:len(known)] = known


def response_text(
    tokenizer: tokenizer_lib.Tokenizer, rollouts: types.Rollouts, p: int, g: int
) -> str:
  """Text of sample `g` of prompt `p`, see `chat.response_text`."""
  return chat.response_text(
      rollouts.tokens[p, g, :rollouts.lengths[p, g]].tolist(), tokenizer,
      is_finished=bool(rollouts.is_finished[p, g]))

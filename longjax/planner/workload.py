"""What the programs of a stage have to do at its length caps: all estimates.

The caps are the worst case: every prompt is `max_prompt_len` long, every
response runs to the end, every row of fine-tuning is one document of which
every token is trained. Average steps are shorter.

P prompts, G samples per prompt, S prompt tokens, R response tokens, B rows, T
tokens of a row.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from longjax.model import architecture
from longjax.model import attention as attention_lib
from longjax.model import compute as compute_lib
from longjax.parallel import rules as rules_lib
from longjax.planner import flops, layout, memory, traffic, transfer
from longjax.train import rl_stage

# Products of a pair of blocks in the backward pass. Kernels compute scores and
# their gradients twice, once for dq, once for dk and dv.
_BACKWARD_MATMULS = {'flash_attention': 5}
_KERNEL_BACKWARD_MATMULS = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
  """How rows of a length are attended to, as `model.attention` chooses.

  Attributes:
    backend: name of its module.
    block_len: tokens of a block.
    backward_matmuls: of a pair of blocks in the backward pass.
    is_ring: whether keys travel around `seq` or are gathered.
  """

  backend: str
  block_len: int
  backward_matmuls: int
  is_ring: bool


def attention(
    num_rows: int,
    length: int,
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
    *,
    is_dealt: bool = True,
) -> Attention:
  """Of rows computed at once, dealt out over `seq` or not."""

  def heads(number):
    return jax.ShapeDtypeStruct(
        (num_rows, length, number, model.head_dim), compute.activation_dtype)

  chosen = attention_lib.settings(
      heads(model.num_heads), heads(model.num_kv_heads),
      backend=compute.attention, block_len=compute.block_len,
      strategy=compute.context_parallel, is_dealt=is_dealt, rules=rules)
  backend = chosen.backend.__name__.rpartition('.')[2]
  return Attention(
      backend=backend, block_len=chosen.block_len,
      is_ring=chosen.strategy == 'ring',
      backward_matmuls=_BACKWARD_MATMULS.get(
          backend, _KERNEL_BACKWARD_MATMULS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """One run of a program.

  Attributes:
    what: it is run on, in words.
    num_runs: in a step of the stage.
    needed: operations on all devices, the ideal.
    executed: operations on all devices.
    imbalance: the busiest device's attention over the mean.
    memory_bytes: one device reads and writes in HBM.
    transfers: what one device sends.
    attention: how rows are attended to; None for single tokens.
  """

  what: str
  num_runs: float
  needed: flops.Flops
  executed: flops.Flops
  imbalance: float
  memory_bytes: float
  transfers: list[transfer.Transfer]
  attention: Attention | None = None


@functools.cache
def _pairs_of_row(groups, row_len, block_len, num_shards):
  if not groups:
    return 0, 1.0
  return flops.executed_pairs(
      flops.row_meta(groups, row_len=row_len), block_len=block_len,
      num_shards=num_shards)


def update(
    stage: layout.Stage,
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> Work:
  """One optimizer step."""
  num_runs = 1
  if isinstance(stage, rl_stage.RlStage):
    num_runs = stage.num_minibatches * stage.num_epochs
  return _over_rows(
      stage, model, rules, compute, passes=traffic.passes(compute.remat),
      num_runs=num_runs)


def score(
    stage: rl_stage.RlStage,
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> Work:
  """Log-probabilities and entropies of the rows of an optimizer step."""
  return _over_rows(
      stage, model, rules, compute, passes=traffic.Passes(),
      num_runs=stage.num_minibatches * stage.is_scored)


def _over_rows(
    stage, model, rules, compute, *, passes, num_runs
) -> Work:
  """Forward passes over rows, and backward passes if there are any."""
  made = layout.layout(stage, rules)
  num_prefix, branches = made.group
  group_len = num_prefix + sum(branches)
  # One branch-less group is a document: all of it is trained.
  num_scored = made.num_groups * (sum(branches) or group_len)
  needed = flops.forward(
      model, num_tokens=made.num_groups * group_len, num_scored=num_scored,
      num_pairs=made.num_groups * flops.visible_pairs(num_prefix, branches))
  # Few differ; the first has the longest rows.
  parts = [
      (_of_micro_batch(part, model, rules, compute, passes), number)
      for part, number in collections.Counter(made.micro_batches).items()]
  num_pairs = sum(part.num_pairs * n for part, n in parts)
  executed = flops.forward(
      model, num_tokens=sum(part.num_tokens * n for part, n in parts),
      num_scored=num_scored, num_pairs=num_pairs)
  chosen = parts[0][0].attention
  if passes.backward:
    needed = flops.needed_update(needed)
    executed = flops.executed_update(
        executed, model, remat=compute.remat,
        is_ring=rules.size('experts') > 1,
        backward_matmuls=chosen.backward_matmuls)
  memory_bytes = sum(part.memory_bytes * n for part, n in parts)
  if passes.backward:
    memory_bytes += memory.of_optimizer(model, rules, len(made.micro_batches))
  mean_pairs = num_pairs / (rules.size('batch') * rules.size('seq'))
  num_rows = sum(len(part.rows) for part in made.micro_batches)
  return Work(
      what=f'{num_rows} rows of {layout.row_lens(stage)[-1]:,} tokens, '
      f'{layout.rows_at_once(stage, rules)} at once',
      num_runs=num_runs, needed=needed, executed=executed,
      imbalance=sum(part.busiest_pairs * n for part, n in parts) / mean_pairs,
      memory_bytes=memory_bytes,
      transfers=[
          t for part, n in parts for t in traffic.repeated(part.transfers, n)],
      attention=chosen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
  """What a micro-batch executes.

  Attributes:
    num_tokens: padding included.
    num_pairs: that attention computes, on all devices.
    busiest_pairs: on the device that has the most of them.
    memory_bytes: see `Work`.
    transfers: see `Work`.
    attention: see `Work`.
  """

  num_tokens: int
  num_pairs: int
  busiest_pairs: float
  memory_bytes: float
  transfers: list[transfer.Transfer]
  attention: Attention


@functools.cache
def _of_micro_batch(
    part: layout.MicroBatch, model, rules, compute, passes
) -> _Part:
  """One of the micro-batches, all of whose rows are computed at once."""
  num_rows, row_len = len(part.rows), part.row_len
  chosen = attention(num_rows, row_len, model, rules, compute)
  pairs, imbalance = np.transpose([
      _pairs_of_row(groups, row_len, chosen.block_len, rules.size('seq'))
      for groups in part.rows])
  # Neighbouring rows lie on the same devices.
  busiest = (pairs * imbalance).reshape(rules.size('batch'), -1).sum(axis=1)
  num_pairs = int(pairs.sum())
  return _Part(
      num_tokens=num_rows * row_len, num_pairs=num_pairs,
      busiest_pairs=float(busiest.max()) / rules.size('seq'),
      memory_bytes=memory.of_rows(
          model, rules, compute, passes, num_tokens=num_rows * row_len,
          num_pairs=num_pairs, block_len=chosen.block_len),
      transfers=traffic.of_rows(
          model, rules, num_rows=num_rows, row_len=row_len,
          ring=chosen.is_ring, dtype=compute.dtype, passes=passes,
          with_head=True),
      attention=chosen)


def prefill(
    stage: rl_stage.RlStage,
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> Work:
  """A chunk of as many prompts as are read at once, half way through them."""
  sampler = layout.sampler(stage, model, rules, compute)
  num_chunks = sampler.chunks_at_once(layout.prompts_at_once(stage))
  chunk_len, of_prompt = sampler.chunk_len, (
      sampler.lane_len // sampler.chunk_len)
  num_runs = stage.num_prompts * of_prompt / num_chunks
  prefill_rules, num_tokens = sampler.rules.prefill, num_chunks * chunk_len
  chosen = attention(
      num_chunks, chunk_len, model, prefill_rules, compute, is_dealt=False)
  own, imbalance = _pairs_of_row(
      ((chunk_len, ()),), chunk_len, chosen.block_len, 1)
  read = stage.max_prompt_len - 1
  needed = flops.forward(
      model, num_tokens=stage.num_prompts * read, num_scored=0,
      num_pairs=stage.num_prompts * flops.visible_pairs(read, ()))
  # Of earlier chunks all keys are seen, half of them on average.
  earlier = chunk_len * (sampler.lane_len - chunk_len) / 2
  pairs = num_chunks * (own + earlier)
  executed = flops.forward(
      model, num_tokens=num_tokens, num_scored=0, num_pairs=pairs)
  transfers = [
      *traffic.repeated(
          traffic.sampler_weights(model, rules, dtype=compute.dtype),
          1 / num_runs),
      *traffic.of_rows(
          model, prefill_rules, num_rows=num_chunks, row_len=chunk_len,
          ring=chosen.is_ring, dtype=compute.dtype, passes=traffic.Passes(),
          with_head=False),
      *traffic.of_queries(
          model, prefill_rules, num_tokens=num_tokens, dtype=compute.dtype)]
  return Work(
      what=f'{num_chunks} chunks of {chunk_len:,} tokens',
      num_runs=num_runs, needed=needed.times(*(1 / num_runs,) * 3),
      executed=executed, imbalance=imbalance, transfers=transfers,
      attention=chosen, memory_bytes=memory.of_rows(
          model, prefill_rules, compute, traffic.Passes(),
          num_tokens=num_tokens, num_pairs=pairs,
          block_len=chosen.block_len))


def resume(
    stage: rl_stage.RlStage,
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> Work:
  """Half a response of one sample of each shard.

  As if every slot were given to a sample of the step before.
  """
  sampler = layout.sampler(stage, model, rules, compute)
  resume_rules, num_places = sampler.rules.prefill, sampler.num_places
  num_samples = sampler.rules.decode.size('batch')
  chosen = attention(
      num_samples, num_places, model, resume_rules, compute, is_dealt=False)
  half = num_places // 2
  needed = flops.forward(
      model, num_tokens=num_samples * half, num_scored=0,
      num_pairs=num_samples * (
          half * stage.max_prompt_len + flops.visible_pairs(half, ())))
  own, imbalance = _pairs_of_row(
      ((half, ()),), num_places, chosen.block_len, 1)
  num_tokens = num_samples * num_places
  pairs = num_samples * (own + half * sampler.lane_len)
  return Work(
      what=f'half a response of {num_samples} samples',
      num_runs=stage.engine.num_slots / num_samples, needed=needed,
      executed=flops.forward(
          model, num_tokens=num_tokens, num_scored=0, num_pairs=pairs),
      imbalance=imbalance, attention=chosen,
      transfers=[
          *traffic.of_rows(
              model, resume_rules, num_rows=num_samples, row_len=num_places,
              ring=chosen.is_ring, dtype=compute.dtype,
              passes=traffic.Passes(), with_head=False),
          *traffic.of_queries(
              model, resume_rules, num_tokens=num_tokens,
              dtype=compute.dtype)],
      memory_bytes=memory.of_rows(
          model, resume_rules, compute, traffic.Passes(),
          num_tokens=num_tokens, num_pairs=pairs,
          block_len=chosen.block_len))


def decode(
    stage: rl_stage.RlStage,
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> Work:
  """One token of every sample, half way through the longest response."""
  length, num_places = stage.max_prompt_len, stage.sampler.max_response_len
  num_slots = stage.engine.num_slots
  decode_rules = rules_lib.for_sampler(
      rules, layout.prompts_at_once(stage)).decode

  def count(num_read):
    return flops.forward(
        model, num_tokens=num_slots, num_scored=num_slots,
        num_pairs=num_slots * (length + num_read))

  # Half the places are filled on average, all of them are read.
  needed, executed = count(num_places / 2), count(num_places)
  # Every device along an axis that does not split the samples repeats the
  # products with weights.
  copies = rules.mesh.size / (
      decode_rules.size('batch') * decode_rules.size('heads'))
  executed = executed.times(copies, 1, copies)
  return Work(
      what=f'1 token of {num_slots} samples',
      num_runs=stage.num_prompts * stage.num_samples * num_places / num_slots,
      needed=needed, executed=executed, imbalance=1.0,
      memory_bytes=memory.of_token(stage, model, decode_rules, compute),
      transfers=traffic.of_token(
          model, decode_rules, num_samples=num_slots, dtype=compute.dtype))


WORK: dict[str, Callable[..., Work]] = {
    'prefill': prefill,
    'resume': resume,
    'decode': decode,
    'score': score,
    'update': update,
}

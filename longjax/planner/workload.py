"""What the programs of a stage have to do at its length caps: all estimates.

The caps are the worst case: every prompt is `max_prompt_len` long, every
response runs to the end, every row of fine-tuning is one document of which
every token is trained. Average steps are shorter.

P prompts, G samples per prompt, S prompt tokens, R response tokens, B rows, T
tokens of a row.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax

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
) -> Attention:
  """Of rows computed at once."""

  def heads(number):
    return jax.ShapeDtypeStruct(
        (num_rows, length, number, model.head_dim), compute.activation_dtype)

  chosen = attention_lib.settings(
      heads(model.num_heads), heads(model.num_kv_heads),
      backend=compute.attention, block_len=compute.block_len,
      strategy=compute.context_parallel, rules=rules)
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
def _pairs_of_row(num_prefix, branches, row_len, block_len, num_shards):
  return flops.executed_pairs(
      flops.group_meta(num_prefix, branches, row_len=row_len),
      block_len=block_len, num_shards=num_shards)


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
  """Log-probabilities and entropies of a whole batch."""
  return _over_rows(
      dataclasses.replace(
          stage, num_minibatches=1, num_epochs=1), model, rules,
      compute, passes=traffic.Passes(),
      num_runs=float(stage.entropy_source == 'trainer_forward'))


def _over_rows(
    stage, model, rules, compute, *, passes, num_runs
) -> Work:
  """Forward passes over rows, and backward passes if there are any."""
  made = layout.layout(stage)
  chosen = attention(made.rows_at_once, stage.row_len, model, rules, compute)
  pairs, imbalance = _pairs_of_row(
      made.num_prefix, made.branches, stage.row_len, chosen.block_len,
      rules.size('seq'))
  group_len = made.num_prefix + sum(made.branches)
  # One branch-less group is a document: all of it is trained.
  num_scored = made.num_groups * (sum(made.branches) or group_len)
  needed = flops.forward(
      model, num_tokens=made.num_groups * group_len, num_scored=num_scored,
      num_pairs=made.num_groups * flops.visible_pairs(
          made.num_prefix, made.branches))
  executed = flops.forward(
      model, num_tokens=made.num_rows * stage.row_len, num_scored=num_scored,
      num_pairs=made.num_rows * pairs)
  if passes.backward:
    needed = flops.needed_update(needed)
    executed = flops.executed_update(
        executed, model, remat=compute.remat,
        is_ring=rules.size('experts') > 1,
        backward_matmuls=chosen.backward_matmuls)
  num_parts = made.num_rows // made.rows_at_once
  transfers = traffic.repeated(
      traffic.of_rows(
          model, rules, num_rows=made.rows_at_once, row_len=stage.row_len,
          ring=chosen.is_ring, dtype=compute.dtype, passes=passes,
          with_head=True), num_parts)
  memory_bytes = num_parts * memory.of_rows(
      model, rules, compute, passes,
      num_tokens=made.rows_at_once * stage.row_len,
      num_pairs=made.rows_at_once * pairs, block_len=chosen.block_len)
  if passes.backward:
    memory_bytes += memory.of_optimizer(model, rules, num_parts)
  return Work(
      what=f'{made.num_rows} rows of {stage.row_len:,} tokens, '
      f'{made.rows_at_once} at once',
      num_runs=num_runs, needed=needed, executed=executed,
      imbalance=imbalance, memory_bytes=memory_bytes, transfers=transfers,
      attention=chosen)


def prefill(
    stage: rl_stage.RlStage,
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> Work:
  """Keys and values of the prompts that are sampled from at once."""
  num_prompts, length = layout.prompts_at_once(stage), stage.max_prompt_len
  prefill_rules = dataclasses.replace(rules, table=rules_lib.PREFILL)
  chosen = attention(num_prompts, length, model, rules, compute)
  pairs, imbalance = _pairs_of_row(
      length - 1, (), length, chosen.block_len, rules.size('seq'))
  needed = flops.forward(
      model, num_tokens=num_prompts * (length - 1), num_scored=0,
      num_pairs=num_prompts * flops.visible_pairs(length - 1, ()))
  executed = flops.forward(
      model, num_tokens=num_prompts * length, num_scored=0,
      num_pairs=num_prompts * pairs)
  transfers = [
      *traffic.sampler_weights(model, rules, dtype=compute.dtype),
      *traffic.of_rows(
          model, prefill_rules, num_rows=num_prompts, row_len=length,
          ring=chosen.is_ring, dtype=compute.dtype, passes=traffic.Passes(),
          with_head=False)]
  return Work(
      what=f'{num_prompts} prompts of {length:,} tokens',
      num_runs=stage.num_prompts / num_prompts, needed=needed,
      executed=executed, imbalance=imbalance, transfers=transfers,
      attention=chosen, memory_bytes=memory.of_rows(
          model, prefill_rules, compute, traffic.Passes(),
          num_tokens=num_prompts * length, num_pairs=num_prompts * pairs,
          block_len=chosen.block_len))


def decode(
    stage: rl_stage.RlStage,
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
) -> Work:
  """One token of every sample, half way through the longest response."""
  num_prompts, length = layout.prompts_at_once(stage), stage.max_prompt_len
  num_slots = stage.sampler.max_response_len
  num_samples = num_prompts * stage.num_samples
  decode_rules = dataclasses.replace(
      rules, table=rules_lib.decode_table(rules.mesh, num_prompts))

  def count(num_read):
    return flops.forward(
        model, num_tokens=num_samples, num_scored=num_samples,
        num_pairs=num_samples * (length + num_read))

  # Half the slots are filled on average, all of them are read.
  needed, executed = count(num_slots / 2), count(num_slots)
  # Every device along an axis that does not split the samples repeats the
  # products with weights.
  copies = rules.mesh.size / (
      decode_rules.size('batch') * decode_rules.size('heads'))
  executed = executed.times(copies, 1, copies)
  return Work(
      what=f'1 token of {num_prompts} x {stage.num_samples} samples',
      num_runs=num_slots * stage.num_prompts / num_prompts, needed=needed,
      executed=executed, imbalance=1.0,
      memory_bytes=memory.of_token(
          stage, model, decode_rules, compute, num_prompts),
      transfers=traffic.of_token(
          model, decode_rules, num_samples=num_samples, dtype=compute.dtype))


WORK: dict[str, Callable[..., Work]] = {
    'prefill': prefill,
    'decode': decode,
    'score': score,
    'update': update,
}

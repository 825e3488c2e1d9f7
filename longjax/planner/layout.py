"""What a stage computes at its length caps: rows of updates, prompts at once.

B rows, T tokens of a row.
"""

import dataclasses
from typing import Literal

from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import rules as rules_lib
from longjax.rl import placement
from longjax.rollout import decode, engine
from longjax.train import rl_stage, sft_job

Stage = rl_stage.RlStage | sft_job.SupervisedConfig
Name = Literal['prefill', 'resume', 'decode', 'score', 'update']


# Tokens of a group in a row: of its prefix, of each of its branches there.
Group = tuple[int, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
  """T, and the groups of each of the B rows."""

  row_len: int
  rows: tuple[tuple[Group, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """The rows of an optimizer step.

  Attributes:
    group: each of the groups, whole.
    num_groups: of the step.
    micro_batches: as they are computed.
  """

  group: Group
  num_groups: int
  micro_batches: tuple[MicroBatch, ...]


def row_lens(stage: Stage) -> tuple[int, ...]:
  """T: the lengths rows may have, increasing."""
  if isinstance(stage, rl_stage.RlStage):
    return stage.row_lens
  return (stage.row_len,)


def rows_at_once(stage: Stage, rules: rules_lib.Rules) -> int:
  """B."""
  if isinstance(stage, rl_stage.RlStage):
    return rl_stage.rows_at_once(stage, rules)
  return stage.rows_at_once or stage.num_rows


def layout(stage: Stage, rules: rules_lib.Rules) -> Layout:
  """Rows of one optimizer step when all are as long as they may be."""
  num_rows = rows_at_once(stage, rules)
  if isinstance(stage, sft_job.SupervisedConfig):
    document = (stage.row_len, ())
    return Layout(
        group=document, num_groups=stage.num_rows,
        micro_batches=(MicroBatch(
            row_len=stage.row_len, rows=((document,),) * num_rows),) * (
                stage.num_rows // num_rows))
  # As `rows.write` does it: branches begin with the last prompt token.
  num_groups, prefix = stage.num_prompts // stage.num_minibatches, (
      stage.max_prompt_len - 1)
  if stage.memory is not None:
    # A group for each turn; its readers share the part, not what they noted.
    num_groups *= stage.max_parts + 1
    prefix = stage.memory.part_len
  branch = stage.max_prompt_len - 1 + stage.sampler.max_response_len - prefix
  whole = placement.Lengths(
      prefix=prefix, branches=(branch,) * stage.num_samples)
  placed = placement.place(
      [whole] * num_groups, row_lens=stage.row_lens, num_rows=num_rows)

  def part(piece: placement.Piece) -> Group:
    return whole.prefix, tuple(whole.branches[b] for b in piece.branches)

  return Layout(
      group=(whole.prefix, whole.branches), num_groups=num_groups,
      micro_batches=tuple(
          MicroBatch(row_len=made.row_len, rows=tuple(
              tuple(part(piece) for piece in row) for row in made.rows))
          for made in placed))


def prompts_at_once(stage: rl_stage.RlStage) -> int:
  """Prompts whose keys and values the sampler holds."""
  return stage.engine.prompts_at_once


def sampler(
    stage: rl_stage.RlStage,
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
    *,
    stop_ids: tuple[int, ...] = (0, 1),
) -> decode.Programs:
  """The sampler's programs; which tokens stop changes no shape."""
  return engine.programs(
      stage.engine, stage.max_prompt_len, sampler=stage.sampler,
      rules=rules_lib.for_sampler(rules, prompts_at_once(stage)),
      config=model, compute=compute, stop_ids=stop_ids,
      record_experts=stage.replay_experts)

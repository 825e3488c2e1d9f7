"""What a stage computes at its length caps: rows of updates, prompts at once.

B rows, T tokens of a row.
"""

import dataclasses
from typing import Literal

from longjax.train import rl_stage, sft_job

Stage = rl_stage.RlStage | sft_job.SupervisedConfig
Name = Literal['prefill', 'decode', 'score', 'update']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """The rows of an update.

  Attributes:
    num_rows: B, of one optimizer step.
    rows_at_once: of a micro-batch.
    num_prefix: tokens of a group's prefix.
    branches: tokens of each of its branches.
    num_groups: in all rows.
  """

  num_rows: int
  rows_at_once: int
  num_prefix: int
  branches: tuple[int, ...]
  num_groups: int


def layout(stage: Stage) -> Layout:
  """Rows of one update when all are as long as they may be."""
  if isinstance(stage, sft_job.SupervisedConfig):
    return Layout(
        num_rows=stage.num_rows, num_groups=stage.num_rows,
        rows_at_once=stage.rows_at_once or stage.num_rows,
        num_prefix=stage.row_len, branches=())
  # As `rows.pack` writes them: branches begin with the last prompt token.
  num_prefix = stage.max_prompt_len - 1
  branches = (stage.sampler.max_response_len,) * stage.num_samples
  num_groups = stage.num_prompts // stage.num_minibatches
  groups_a_row = stage.row_len // (num_prefix + sum(branches))
  num_rows = -(-num_groups // groups_a_row)
  num_rows = -(-num_rows // stage.row_multiple) * stage.row_multiple
  return Layout(
      num_rows=num_rows, num_groups=num_groups, num_prefix=num_prefix,
      branches=branches, rows_at_once=stage.rows_at_once or num_rows)


def prompts_at_once(stage: rl_stage.RlStage) -> int:
  """Prompts of one call of the sampler."""
  return stage.prompts_per_batch or stage.num_prompts

"""The merge stage of a recipe: policies of earlier stages become one.

QwenLong-L1.5 (arXiv:2512.12967) merges the policy of the last full-context
stage with the memory agent's, relative to the model that reinforcement learning
began with. What it reads and writes is kept, see `policies`.
"""

import dataclasses
import json
from typing import Literal

from longjax.data import records
from longjax.model import merge as merge_lib
from longjax.parallel import multihost
from longjax.train import merge_job, policies, run_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeStage:
  """What is merged.

  Attributes:
    job: marks the kind of stage.
    base: name of the stage whose policy the experts were trained from; 'base'
      is the model the run begins with.
    experts: names of stages whose policies are merged.
    merge: how.
  """

  job: Literal['merge'] = 'merge'
  base: str = policies.BASE
  experts: tuple[str, ...]
  merge: merge_lib.MergeConfig = merge_lib.MergeConfig()

  def __post_init__(self):
    self.merge.check_experts(len(self.experts))

  @property
  def names(self) -> tuple[str, ...]:
    """Of all models that it reads."""
    return (self.base, *self.experts)


def run(stage: MergeStage, name: str, context: run_state.Context) -> None:
  """Merges, once; the result is kept as the policy of this stage."""
  path = policies.directory(context, name)
  summary = context.workdir / policies.FOLDER / f'{name}.json'
  if multihost.on_primary(lambda: path.exists() and summary.exists()):
    return
  made = merge_job.merge_directories(
      policies.directory(context, stage.base),
      [policies.directory(context, expert) for expert in stage.experts], path,
      config=stage.merge, dtype='float32', description=name)
  content = {
      'base': stage.base, 'experts': list(stage.experts),
      'merge': dataclasses.asdict(stage.merge),
      'coefficients': made.coefficients}
  multihost.on_primary(
      lambda: records.write_text(summary, json.dumps(content, indent=1)))
  context.publish()

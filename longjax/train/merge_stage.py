"""The merge stage of a recipe: policies of earlier stages become one.

QwenLong-L1.5 (arXiv:2512.12967) merges the policy of the last full-context
stage with the memory agent's, relative to the model that reinforcement learning
began with. Policies that a later merge names are kept in {workdir}/models.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Literal

from longjax import types
from longjax.data import records
from longjax.model import huggingface
from longjax.model import merge as merge_lib
from longjax.parallel import multihost
from longjax.train import initial, merge_job, run_state

FOLDER = 'models'

# Stands for the model a run begins with.
BASE = 'base'


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
  base: str = BASE
  experts: tuple[str, ...]
  merge: merge_lib.MergeConfig = merge_lib.MergeConfig()

  def __post_init__(self):
    self.merge.check_experts(len(self.experts))

  @property
  def names(self) -> tuple[str, ...]:
    """Of all models that it reads."""
    return (self.base, *self.experts)


def directory(context: run_state.Context, name: str) -> pathlib.Path:
  """Where the policy of a stage is kept."""
  return context.workdir / FOLDER / name


def keep(
    name: str,
    params: Callable[[], types.Params],
    context: run_state.Context,
    begin: initial.Initial,
) -> None:
  """Writes the policy of a stage, in the dtype it is trained in, once."""
  path = directory(context, name)
  if not multihost.on_primary(path.exists):
    huggingface.save(
        path, params(), context.model, source=begin.tokenizer_directory,
        stop_ids=context.tokenizer.stop_ids, pad_id=context.tokenizer.pad_id)
    context.publish()


def run(stage: MergeStage, name: str, context: run_state.Context) -> None:
  """Merges, once; the result is kept as the policy of this stage."""
  path = directory(context, name)
  summary = context.workdir / FOLDER / f'{name}.json'
  if multihost.on_primary(lambda: path.exists() and summary.exists()):
    return
  made = merge_job.merge_directories(
      directory(context, stage.base),
      [directory(context, expert) for expert in stage.experts], path,
      config=stage.merge, dtype='float32', description=name)
  content = {
      'base': stage.base, 'experts': list(stage.experts),
      'merge': dataclasses.asdict(stage.merge),
      'coefficients': made.coefficients}
  multihost.on_primary(
      lambda: records.write_text(summary, json.dumps(content, indent=1)))
  context.publish()


def load(name: str, context: run_state.Context) -> types.Params:
  """The kept policy of a stage, on the mesh."""
  return huggingface.load(directory(context, name), rules=context.rules)[0]

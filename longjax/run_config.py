"""What a whole run is, and what it cannot be."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from longjax import config as config_lib
from longjax import stage_list, types
from longjax.evals import comparison as comparison_lib
from longjax.evals import stage as evals_stage
from longjax.evals import tables
from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import mesh as mesh_lib
from longjax.train import initial, merge_stage, rl_stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """A whole run.

  Attributes:
    job: 'recipe' runs all stages of `recipe`; another job runs those of its
      kind only, and the data set they read.
    recipe: names of stages in the order they run. Evaluations may recur;
      their results are named after the stage before them, and one that would
      only repeat another is left out.
    stages: configuration of each stage by name.
    init_from: Hugging Face directory to start from, see `initial.find`; ''
      starts from scratch with `model`.
    model: sizes of a network from scratch.
    initialization: of a network from scratch, see `initial.from_scratch`.
    seed: of all randomness.
    cpu_devices: where there is no accelerator, into how many devices the
      host is split; one a core uses all cores best. 0 leaves it to XLA_FLAGS.
    mesh: devices along each axis.
    compute: backends, dtype and remat, see `model.compute`.
    checkpoint_every: steps between checkpoints.
    keep_checkpoints: how many are kept.
    max_skipped_in_a_row: so many non-finite steps in a row stop the run.
    export: write the final model to {workdir}/model for other programs.
    comparison: of stages that are arms of an experiment, in the report.
  """

  job: Literal[
      'recipe', 'synth', 'pretrain', 'sft', 'rl', 'evals'] = 'recipe'
  recipe: tuple[str, ...]
  stages: Mapping[str, stage_list.Stage]
  init_from: str = ''
  model: architecture.ModelConfig | None = None
  initialization: initial.Initialization = 'random'
  seed: int = 0
  cpu_devices: int = 0
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig()
  compute: compute_lib.Compute = compute_lib.Compute()
  checkpoint_every: int = 50
  keep_checkpoints: int = 2
  max_skipped_in_a_row: int = 5
  export: bool = True
  comparison: comparison_lib.Comparison | None = None

  def __post_init__(self):
    for name in self.recipe:
      if name not in self.stages:
        raise types.UserError(
            f'recipe names the stage {name!r}, which stages does not '
            'configure; did you mean '
            f'{config_lib.nearest(name, self.stages)!r}?')
    plan = self.plan()
    if bool(self.init_from) == (self.model is not None):
      raise types.UserError(
          f'init_from={self.init_from!r} and model={self.model}: set exactly '
          'one of them, a base model or the sizes of a fresh one.')
    for named in plan:
      if isinstance(
          named.stage, rl_stage.RlStage | evals_stage.EvalsStage
      ) and not self.init_from and named.stage.judge.mode == 'inprocess':
        raise types.UserError(
            f"stages.{named.name}.judge.mode='inprocess' asks the model that "
            'the run begins with, which knows nothing here; set init_from, or '
            "use judge.mode='endpoint' or 'none'.")
    for field, least in (
        ('checkpoint_every', 1), ('max_skipped_in_a_row', 1),
        ('keep_checkpoints', 2)):
      if getattr(self, field) < least:
        raise types.UserError(
            f'{field}={getattr(self, field)} must be >= {least}.')
    if self.seed < 0 or self.seed >= 1 << 31:
      raise types.UserError(f'seed={self.seed} must be in [0, 2**31).')
    if not any(self.job in ('recipe', n.stage.job) for n in plan):
      raise types.UserError(
          f'job={self.job!r}: recipe={self.recipe} has no such stage.')
    stage_list.check_plan(plan)
    policies = [n.name for n in plan if isinstance(n.stage, stage_list.Making)]
    for name in self.comparison.stages if self.comparison else ():
      if name not in policies:
        raise types.UserError(
            f'comparison.arms names {name!r}, which no stage of recipe trains '
            f'or merges; did you mean {config_lib.nearest(name, policies)!r}?')

  def plan(self) -> list[stage_list.Named]:
    """What `job` runs, in order."""
    found: list[stage_list.Named] = []
    evaluated: set[tuple[str, str]] = set()
    before = 'base'
    for name in self.recipe:
      stage = self.stages[name]
      if stage.job not in (self.job, 'synth') and self.job != 'recipe':
        continue
      label = name
      if isinstance(stage, evals_stage.EvalsStage):
        if (name, before) in evaluated:
          continue
        policy = tables.policy_label(
            before, is_agent=stage.memory is not None)
        label = f'{len(evaluated)}_{policy}'
        evaluated.add((name, before))
      elif isinstance(stage, stage_list.Training | merge_stage.MergeStage):
        before = name
      found.append(stage_list.Named(name=name, label=label, stage=stage))
    return found

  def trained(self) -> list[tuple[str, stage_list.Training]]:
    """(label, stage) of those that train."""
    return [(n.label, n.stage) for n in self.plan()
            if isinstance(n.stage, stage_list.Training)]

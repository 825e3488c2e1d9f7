"""The stages of a run in order: what each reads and what must precede it."""

import dataclasses
from collections.abc import Sequence

from longjax import types
from longjax.agents import memory as memory_lib
from longjax.evals import selection
from longjax.evals import stage as evals_stage
from longjax.synthesis import stage as synth_stage
from longjax.train import gradient_stage, merge_stage, rl_stage, sft_job

Training = sft_job.PretrainStage | sft_job.SftStage | rl_stage.RlStage
# They look at the policy so far and leave it as it is.
Observing = (
    evals_stage.EvalsStage | selection.SelectStage
    | gradient_stage.GradientStage)
Stage = (
    synth_stage.SynthStage | Training | merge_stage.MergeStage | Observing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
  """A stage of a run.

  Attributes:
    name: under which the config has it.
    label: unique in the run; evaluations are labelled by number and what they
      evaluate: '0_base'.
    stage: its configuration.
  """

  name: str
  label: str
  stage: Stage


def splits_read(stage: Stage) -> tuple[str, ...]:
  """The splits of the data set that a stage reads."""
  if isinstance(stage, evals_stage.EvalsStage):
    return stage.splits
  if isinstance(stage, gradient_stage.GradientStage):
    return splits_read(stage.rl)
  if isinstance(
      stage, sft_job.SftStage | rl_stage.RlStage | selection.SelectStage):
    return (stage.split,)
  return ()


def sources(plan: Sequence[Named], split: str) -> list[str]:
  """The splits of the data set that a split's examples come from."""
  by_name = {named.name: named.stage for named in plan}
  stage = by_name.get(split)
  if not isinstance(stage, selection.SelectStage):
    return [split]
  earlier = [s for name in stage.seen for s in splits_read(by_name[name])]
  return list(dict.fromkeys(
      source for s in (stage.split, *earlier) for source in sources(plan, s)))


def caps(plan: Sequence[Named]) -> list[synth_stage.Cap]:
  """What the examples of each split have to fit into."""
  found = []
  for named in plan:
    match named.stage:
      case sft_job.SftStage(row_len=max_len):
        field = 'row_len'
      case rl_stage.RlStage(memory=memory_lib.MemoryConfig() as memory):
        # So many parts hold it wherever lines end.
        field = 'max_parts'
        max_len = named.stage.max_parts * memory.least_part_len
      case rl_stage.RlStage(max_prompt_len=max_len):
        field = 'max_prompt_len'
      case selection.SelectStage(max_prompt_len=max_len):
        field = 'max_prompt_len'
      case gradient_stage.GradientStage(
          rl=rl_stage.RlStage(max_prompt_len=max_len)):
        field = 'rl.max_prompt_len'
      case evals_stage.EvalsStage(lengths=lengths):
        field, max_len = 'lengths', max(lengths)
      case _:
        continue
    found += [
        synth_stage.Cap(
            split=split, field=f'stages.{named.name}.{field}', max_len=max_len,
            with_response=isinstance(named.stage, sft_job.SftStage))
        for read in splits_read(named.stage) for split in sources(plan, read)]
  return list(dict.fromkeys(found))


def check_plan(plan: Sequence[Named]) -> None:
  """Refuses stages that cannot follow each other in one run.

  Raises:
    UserError: a stage trains twice or reads what none before it writes, or
      checkpoints of different stages would have different forms.
  """
  written: list[str] = []
  names = [named.name for named in plan]
  writers = [
      n.name for n in plan if isinstance(n.stage, synth_stage.SynthStage)]
  if len(writers) > 1:
    raise types.UserError(
        f'recipe runs the synth stages {", ".join(writers)}; a run has one '
        'data set, so use one of them with all splits.')
  moments = {n.name: str(n.stage.optimizer.moments) for n in plan
             if isinstance(n.stage, Training)}
  if len(set(moments.values())) > 1:
    raise types.UserError(
        f'optimizer.moments differ between stages ({moments}); all '
        'stages of a run share the form of their checkpoints, so set one.')
  policies, trained = [merge_stage.BASE], list[str]()
  before: Stage | None = None
  for named in plan:
    if isinstance(named.stage, merge_stage.MergeStage):
      for name in named.stage.names:
        if name not in policies:
          raise types.UserError(
              f'stages.{named.name} merges {name!r}, but before it the recipe '
              f'has only {", ".join(policies)}; name some of these.')
    if isinstance(named.stage, Training):
      _check_optimizer(named, before)
    if isinstance(named.stage, Training | merge_stage.MergeStage):
      before = named.stage
    if isinstance(named.stage, Training) and named.stage.start:
      if named.stage.start not in policies:
        raise types.UserError(
            f'stages.{named.name}.start={named.stage.start!r} is no policy '
            f'that the recipe has before it; use one of '
            f'{", ".join(policies)}.')
    if isinstance(named.stage, Training | merge_stage.MergeStage):
      policies.append(named.name)
    if isinstance(named.stage, Training) and names.count(named.name) > 1:
      raise types.UserError(
          f'recipe runs stage {named.name!r} twice; only evaluations may '
          'recur. Configure a second stage with another name.')
    if isinstance(named.stage, synth_stage.SynthStage):
      written = named.stage.splits()
    if isinstance(named.stage, selection.SelectStage):
      _check_seen(named, trained)
      written = [*written, named.name]
    if isinstance(named.stage, rl_stage.RlStage):
      trained.append(named.name)
    for split in splits_read(named.stage):
      if split not in written:
        there = (f'the synth stage before it writes {", ".join(written)}'
                 if written else 'no synth stage stands before it')
        raise types.UserError(
            f'stages.{named.name} reads the split {split!r}, but {there}.')


def _check_optimizer(named: Named, before: Stage | None) -> None:
  """Refuses to go on with moments that are not those of the policy."""
  assert isinstance(named.stage, Training)
  if not named.stage.optimizer.reset and (
      named.stage.start or not isinstance(before, Training)):
    raise types.UserError(
        f'stages.{named.name}.optimizer.reset=False goes on with the moments '
        'of the stage before, but its policy does not come from a training '
        'stage right before it; set it to True.')


def _check_seen(named: Named, trained: Sequence[str]) -> None:
  assert isinstance(named.stage, selection.SelectStage)
  for name in named.stage.seen:
    if name not in trained:
      raise types.UserError(
          f'stages.{named.name}.seen={named.stage.seen} names {name!r}, which '
          'is no RL stage before it; there are '
          f'{", ".join(trained) or "none"}.')


def kept(plan: Sequence[Named]) -> set[str]:
  """Names of the policies that a later stage merges or begins with."""
  names = set[str]()
  for named in plan:
    if isinstance(named.stage, merge_stage.MergeStage):
      names.update(named.stage.names)
    elif isinstance(named.stage, Training) and named.stage.start:
      names.add(named.stage.start)
  return names

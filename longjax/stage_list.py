"""The stages of a run in order: what each reads and what must precede it."""

import dataclasses
from collections.abc import Sequence

from longjax import types
from longjax.agents import memory as memory_lib
from longjax.evals import selection
from longjax.evals import stage as evals_stage
from longjax.synthesis import stage as synth_stage
from longjax.train import (
    gradient_stage,
    merge_stage,
    policies,
    rl_stage,
    sft_job,
)

Training = sft_job.PretrainStage | sft_job.SftStage | rl_stage.RlStage
# They make a policy.
Making = Training | merge_stage.MergeStage
# They look at the policy so far and leave it as it is.
Observing = (
    evals_stage.EvalsStage | selection.SelectStage
    | gradient_stage.GradientStage)
Stage = (
    synth_stage.SynthStage | Making | Observing)


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
  for index, named in enumerate(plan):
    _check_name(named, plan[:index])
    _check_policies(named, plan[:index])
    _check_examples(named, plan[:index])


def _check_name(named: Named, before: Sequence[Named]) -> None:
  """Refuses names that would stand for two things."""
  if isinstance(named.stage, evals_stage.EvalsStage):
    return  # Labelled by what they evaluate.
  if named.name in [n.name for n in before]:
    raise types.UserError(
        f'recipe runs stage {named.name!r} twice; only evaluations may '
        'recur. Configure a second stage with another name.')
  if isinstance(named.stage, Making) and named.name == policies.BASE:
    raise types.UserError(
        f'stages.{named.name} has the name of the model that the run begins '
        'with; choose another one.')


def _check_policies(named: Named, before: Sequence[Named]) -> None:
  """Refuses to begin with, or to merge, policies that are not there."""
  makers = [n for n in before if isinstance(n.stage, Making)]
  there = [policies.BASE, *(n.name for n in makers)]
  if isinstance(named.stage, merge_stage.MergeStage):
    for name in named.stage.names:
      if name not in there:
        raise types.UserError(
            f'stages.{named.name} merges {name!r}, but before it the recipe '
            f'has only {", ".join(there)}; name some of these.')
  if not isinstance(named.stage, Training):
    return
  start = named.stage.start
  if start and start not in there:
    raise types.UserError(
        f'stages.{named.name}.start={start!r} is no policy that the recipe '
        f'has before it; use one of {", ".join(there)}.')
  if not named.stage.optimizer.reset and (
      start or not makers or not isinstance(makers[-1].stage, Training)):
    raise types.UserError(
        f'stages.{named.name}.optimizer.reset=False goes on with the moments '
        'of the stage before, but its policy does not come from a training '
        'stage right before it; set it to True.')


def _check_examples(named: Named, before: Sequence[Named]) -> None:
  """Refuses splits that are not there, and tasks they do not have."""
  synth = next((n.stage for n in before
                if isinstance(n.stage, synth_stage.SynthStage)), None)
  selects = {n.name: n.stage for n in before
             if isinstance(n.stage, selection.SelectStage)}
  written = [*(synth.splits() if synth else []), *selects]
  for split in splits_read(named.stage):
    if split not in written:
      there = (f'the synth stage before it writes {", ".join(written)}'
               if written else 'no synth stage stands before it')
      raise types.UserError(
          f'stages.{named.name} reads the split {split!r}, but {there}.')
  trained = [n.name for n in before if isinstance(n.stage, rl_stage.RlStage)]
  match named.stage:
    case selection.SelectStage(seen=seen):
      for name in seen:
        if name not in trained:
          raise types.UserError(
              f'stages.{named.name}.seen={seen} names {name!r}, which is no RL '
              f'stage before it; there are {", ".join(trained) or "none"}.')
    case sft_job.SftStage(memory_tasks=tasks):
      _check_tasks(f'{named.name}.memory_tasks', tasks, synth)
    case evals_stage.EvalsStage(tasks=tasks):
      _check_tasks(f'{named.name}.tasks', tasks, synth)
    case rl_stage.RlStage(tasks=tasks, split=split, num_asked=num_asked):
      _check_tasks(f'{named.name}.tasks', tasks, synth)
      if split in selects and selects[split].size < num_asked:
        raise types.UserError(
            f'stages.{named.name} asks {num_asked} prompts a step, but '
            f'stages.{split}.size={selects[split].size} chooses fewer; raise '
            'it or lower num_prompts.')


def _check_tasks(
    field: str, tasks: Sequence[str], synth: synth_stage.SynthStage | None
) -> None:
  """Refuses tasks of which no example is made; a file may hold any."""
  if synth is None or synth.path:
    return
  for task in tasks:
    if task not in synth.examples.tasks:
      raise types.UserError(
          f'stages.{field} names {task!r}, of which no example is made; there '
          f'are {", ".join(synth.examples.tasks)}.')


def kept(plan: Sequence[Named]) -> set[str]:
  """Names of the policies that a later stage merges or begins with."""
  names = set[str]()
  for named in plan:
    if isinstance(named.stage, merge_stage.MergeStage):
      names.update(named.stage.names)
    elif isinstance(named.stage, Training) and named.stage.start:
      names.add(named.stage.start)
  return names

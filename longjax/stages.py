"""One stage of a recipe: what it reads, what it needs, how it is run."""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import optax
from absl import logging

from longjax import types
from longjax.agents import memory as memory_lib
from longjax.data import dataset, prompt_stats
from longjax.evals import selection
from longjax.evals import stage as evals_stage
from longjax.parallel import multihost
from longjax.reward import hybrid
from longjax.synthesis import stage as synth_stage
from longjax.train import (
  judges,
  merge_stage,
  partial,
  progress,
  rl_job,
  rl_stage,
  run_state,
  sft_job,
)
from longjax.train import optimizer as optimizer_lib

Training = sft_job.PretrainStage | sft_job.SftStage | rl_stage.RlStage
Stage = (
    synth_stage.SynthStage | Training | merge_stage.MergeStage
    | selection.SelectStage | evals_stage.EvalsStage)

DATA_FOLDER = 'data'


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
  for named in plan:
    if isinstance(named.stage, merge_stage.MergeStage):
      for name in named.stage.names:
        if name not in policies:
          raise types.UserError(
              f'stages.{named.name} merges {name!r}, but before it the recipe '
              f'has only {", ".join(policies)}; name some of these.')
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


def _check_seen(named: Named, trained: Sequence[str]) -> None:
  assert isinstance(named.stage, selection.SelectStage)
  for name in named.stage.seen:
    if name not in trained:
      raise types.UserError(
          f'stages.{named.name}.seen={named.stage.seen} names {name!r}, which '
          'is no RL stage before it; there are '
          f'{", ".join(trained) or "none"}.')


def check_mesh(stage: Stage, context: run_state.Context) -> None:
  """Refuses batches that do not divide over devices."""
  match stage:
    case rl_stage.RlStage():
      rl_stage.check(stage, context)
    case sft_job.PretrainStage() | sft_job.SftStage():
      sft_job.check(stage, context)
    case evals_stage.EvalsStage():
      evals_stage.check(stage, context.rules)


def kept(plan: Sequence[Named]) -> set[str]:
  """Names of the policies that a merge reads."""
  return {name for named in plan
          if isinstance(named.stage, merge_stage.MergeStage)
          for name in named.stage.names}


def optimizer(stage: Training) -> optax.GradientTransformation:
  """Of a stage, with the schedule of all its steps."""
  num_steps = stage.steps
  if isinstance(stage, rl_stage.RlStage):
    num_steps *= stage.num_minibatches * stage.num_epochs
  return optimizer_lib.make(stage.optimizer, num_steps=num_steps)


def carried(stage: Training) -> partial.Carried | None:
  """What a stage's checkpoints hold of unfinished responses."""
  return stage.carried() if isinstance(stage, rl_stage.RlStage) else None


def on_host(stage: Training, data: Any) -> dict[str, Any]:
  """What a stage's checkpoints hold beside arrays on devices.

  Args:
    stage: its configuration.
    data: `run_state.Place.data` of the checkpoint.

  Returns:
    Arguments of `run_state.abstract`.
  """
  if not isinstance(stage, rl_stage.RlStage):
    return {}
  return {'carried': stage.carried(),
          'prompt_stats': prompt_stats.nothing(data['num_examples'])}


def train(
    stage: Training,
    context: run_state.Context,
    state: run_state.RunState,
    place: run_state.Place,
    *,
    initial: Callable[[], types.Params],
) -> tuple[run_state.RunState, run_state.Place]:
  """Trains one stage to its end.

  Args:
    stage: its configuration.
    context: of the run.
    state: where to begin.
    place: where that is.
    initial: makes the parameters that the run began with.
  """
  if isinstance(stage, rl_stage.RlStage):
    with contextlib.ExitStack() as stack:
      judge = None
      if place.stage_step < stage.steps:  # Else nothing is left to grade.
        judge = judges.make(stage.judge, context, initial=initial)
      if judge is not None:
        stack.callback(judge.close)
      return rl_job.run(
          context, stage, state, place,
          examples=examples(context, stage.split, stage.tasks),
          score=hybrid.score,
          judge=judge)
  demonstrated = (
      examples(context, stage.split)
      if isinstance(stage, sft_job.SftStage) else None)
  return sft_job.run(context, stage, state, place, examples=demonstrated)


def examples(
    context: run_state.Context, split: str, tasks: Sequence[str] = ()
) -> Sequence[types.TaskExample]:
  """The examples of a split, be it synthesised or selected."""
  data = context.workdir / DATA_FOLDER
  if not selection.result(context.workdir, split).exists():
    return dataset.of_tasks(dataset.read(data, split), tasks)
  chosen = selection.load(context.workdir, split)
  return dataset.of_tasks(dataset.of_ids(
      {name: dataset.read(data, name) for name in {name for name, _ in chosen}},
      chosen), tasks)


def select(
    stage: selection.SelectStage,
    label: str,
    context: run_state.Context,
    params: types.Params,
    plan: Sequence[Named],
) -> None:
  """Chooses the examples of a later stage, once."""
  by_name = {named.name: named.stage for named in plan}
  seen: dict[str, tuple[str, str, float]] = {}
  for name in stage.seen:  # What a later stage saw is newer.
    earlier = by_name[name]
    assert isinstance(earlier, rl_stage.RlStage)
    task_of = {e.id: e.task for e in examples(context, earlier.split)}
    split_of = dict.fromkeys(task_of, earlier.split)
    if selection.result(context.workdir, earlier.split).exists():
      split_of = {example: split for split, example in selection.load(
          context.workdir, earlier.split)}
    for row in prompt_stats.read(
        context.workdir / rl_job.PROMPT_STATS_FOLDER / f'{name}.jsonl'):
      one = row['id']
      seen[one] = split_of[one], task_of[one], row['mean']
  candidates = list(examples(context, stage.split))
  tried = evals_stage.answer(
      evals_stage.EvalsStage(
          splits=(stage.split,), lengths=(stage.max_prompt_len,),
          num_samples=stage.num_samples, sampler=stage.sampler,
          prompts_at_once=stage.prompts_at_once),
      name=label, params=params, examples={stage.split: candidates},
      score=hybrid.score, model=context.model, tokenizer=context.tokenizer,
      rules=context.rules, compute=context.compute, seed=context.seed,
      progress=progress.Progress,
      check_stop=lambda: context.check_stop(f'during {label}'))
  content = selection.choose(
      stage, tried, candidates, seen,
      # Stages draw differently.
      seed=context.seed + zlib.crc32(label.encode()))
  multihost.on_primary(
      lambda: selection.save(context.workdir, label, content))
  context.publish()


def synthesise(
    stage: synth_stage.SynthStage,
    context: run_state.Context,
    plan: Sequence[Named],
) -> None:
  """Writes the data set once, and checks that `plan` can use it."""
  directory = context.workdir / DATA_FOLDER

  def check_stop() -> None:
    if context.stop:
      raise run_state.Stopped('stopped during synth')

  def write_once() -> None:
    if not dataset.is_complete(directory):
      synth_stage.run(
          stage, directory=directory, seed=context.seed,
          tokenizer=context.tokenizer, caps=caps(plan),
          progress=progress.Progress, log=logging.warning,
          check_stop=check_stop)

  multihost.on_primary(
      write_once, errors=(types.UserError, run_state.Stopped))
  context.publish()
  for named in plan:
    if isinstance(named.stage, rl_stage.RlStage) and sources(
        plan, named.stage.split) == [named.stage.split]:
      num_asked, split = named.stage.num_asked, named.stage.split
      num_examples = len(dataset.of_tasks(
          dataset.read(directory, split), named.stage.tasks))
      if num_examples < num_asked:
        times = (f' times oversample={named.stage.oversample}'
                 if named.stage.oversample > 1 else '')
        raise types.UserError(
            f'stages.{named.name}.num_prompts={named.stage.num_prompts}{times} '
            f'is more than the {num_examples} examples of split {split!r}; '
            'lower it or add examples.')


def evaluate(
    stage: evals_stage.EvalsStage,
    label: str,
    context: run_state.Context,
    params: types.Params,
) -> None:
  """Writes one evaluation."""
  evals_stage.run(
      stage, name=label, params=params,
      examples={
          s: dataset.of_tasks(
              dataset.read(context.workdir / DATA_FOLDER, s), stage.tasks)
          for s in stage.splits},
      score=hybrid.score, model=context.model, tokenizer=context.tokenizer,
      rules=context.rules, compute=context.compute, seed=context.seed,
      workdir=context.workdir, progress=progress.Progress,
      check_stop=lambda: context.check_stop(f'during evaluation {label}'))
  context.publish()

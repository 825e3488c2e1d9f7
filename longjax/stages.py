"""One stage of a recipe: what it needs and how it is run."""

import contextlib
import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import optax
from absl import logging

from longjax import stage_list, types
from longjax.data import dataset, prompt_stats
from longjax.evals import gradients, selection
from longjax.evals import stage as evals_stage
from longjax.parallel import mesh as mesh_lib
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib
from longjax.reward import hybrid
from longjax.synthesis import stage as synth_stage
from longjax.train import (
    gradient_stage,
    inprocess_judge,
    judges,
    partial,
    progress,
    rl_job,
    rl_stage,
    run_state,
    sft_job,
)
from longjax.train import optimizer as optimizer_lib

DATA_FOLDER = 'data'


def within(
    stage: stage_list.Stage, context: run_state.Context
) -> run_state.Context:
  """What stays the same while a stage runs: its own mesh, its own seed."""
  if not isinstance(stage, stage_list.Training):
    return context
  rules = context.rules
  if stage.mesh is not None:
    devices = sorted(rules.mesh.devices.flat, key=lambda device: device.id)
    rules = rules_lib.Rules(mesh_lib.make(stage.mesh, devices))
  return dataclasses.replace(
      context, seed=context.seed + stage.seed, rules=rules)


def check_mesh(stage: stage_list.Stage, context: run_state.Context) -> None:
  """Refuses batches that do not divide over devices."""
  match stage:
    case rl_stage.RlStage():
      rl_stage.check(stage, context)
    case sft_job.PretrainStage() | sft_job.SftStage():
      sft_job.check(stage, context)
    case evals_stage.EvalsStage():
      evals_stage.check(stage, context.rules)
      if stage.judge.mode == 'inprocess':
        inprocess_judge.check(
            stage.judge.inprocess, context.rules, name='evals.judge.inprocess')
    case selection.SelectStage():
      evals_stage.check(selection.attempts(stage), context.rules)
    case gradient_stage.GradientStage():
      rl_stage.check(stage.rl, context)


def optimizer(stage: stage_list.Training) -> optax.GradientTransformation:
  """Of a stage, with the schedule of all its steps."""
  num_steps = stage.steps
  if isinstance(stage, rl_stage.RlStage):
    num_steps *= stage.num_minibatches * stage.num_epochs
  return optimizer_lib.make(stage.optimizer, num_steps=num_steps)


def carried(stage: stage_list.Training) -> partial.Carried | None:
  """What a stage's checkpoints hold of unfinished responses."""
  return stage.carried() if isinstance(stage, rl_stage.RlStage) else None


def on_host(stage: stage_list.Training, data: Any) -> dict[str, Any]:
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
    stage: stage_list.Training,
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
    judge = None
    if place.stage_step < stage.steps:  # Else nothing is left to grade.
      judge = judges.make(stage.judge, context, initial=initial)
    with contextlib.closing(judge) if judge else contextlib.nullcontext():
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
    plan: Sequence[stage_list.Named],
) -> None:
  """Chooses the examples of a later stage, once."""
  by_name = {named.name: named.stage for named in plan}
  seen: dict[str, tuple[str, str, float]] = {}
  num_seen = stage.num_samples
  for name in stage.seen:  # What a later stage saw is newer.
    earlier = by_name[name]
    assert isinstance(earlier, rl_stage.RlStage)
    num_seen = earlier.num_samples
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
      selection.attempts(stage),
      name=label, params=params, examples={stage.split: candidates},
      score=hybrid.score, model=context.model, tokenizer=context.tokenizer,
      rules=context.rules, compute=context.compute, seed=context.seed,
      progress=progress.Progress,
      check_stop=lambda: context.check_stop(f'during {label}'))
  content = selection.choose(
      stage, tried, candidates, seen, num_seen=num_seen,
      # Stages draw differently.
      seed=context.seed + zlib.crc32(label.encode()))
  multihost.on_primary(
      lambda: selection.save(context.workdir, label, content))
  context.publish()


def synthesise(
    stage: synth_stage.SynthStage,
    context: run_state.Context,
    plan: Sequence[stage_list.Named],
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
          tokenizer=context.tokenizer, caps=stage_list.caps(plan),
          progress=progress.Progress, log=logging.warning,
          check_stop=check_stop)

  multihost.on_primary(
      write_once, errors=(types.UserError, run_state.Stopped))
  context.publish()
  for named in plan:
    asking = named.stage
    if isinstance(asking, gradient_stage.GradientStage):
      asking = asking.rl
    if isinstance(asking, rl_stage.RlStage) and stage_list.sources(
        plan, asking.split) == [asking.split]:
      num_asked, split = asking.num_asked, asking.split
      num_examples = len(dataset.of_tasks(
          dataset.read(directory, split), asking.tasks))
      if num_examples < num_asked:
        times = (f' times oversample={asking.oversample}'
                 if asking.oversample > 1 else '')
        raise types.UserError(
            f'stages.{named.name}.num_prompts={asking.num_prompts}{times} '
            f'is more than the {num_examples} examples of split {split!r}; '
            'lower it or add examples.')


def evaluate(
    stage: evals_stage.EvalsStage,
    label: str,
    context: run_state.Context,
    params: types.Params,
    *,
    initial: Callable[[], types.Params],
) -> None:
  """Writes one evaluation; `initial` is for its judge, see `train`."""
  judge = judges.make(stage.judge, context, initial=initial)
  with contextlib.closing(judge) if judge else contextlib.nullcontext():
    evals_stage.run(
        stage, name=label, params=params,
        examples={
            s: dataset.of_tasks(
                dataset.read(context.workdir / DATA_FOLDER, s), stage.tasks)
            for s in stage.splits},
        score=hybrid.score, judge=judge, model=context.model,
        tokenizer=context.tokenizer, rules=context.rules,
        compute=context.compute, seed=context.seed, workdir=context.workdir,
        progress=progress.Progress,
        check_stop=lambda: context.check_stop(f'during evaluation {label}'))
  context.publish()


def measure_gradients(
    stage: gradient_stage.GradientStage,
    label: str,
    context: run_state.Context,
    params: types.Params,
) -> None:
  """Writes how entropy goes with gradients."""
  measured = gradient_stage.run(
      stage, label, context, params,
      examples=examples(context, stage.rl.split, stage.rl.tasks),
      score=hybrid.score)
  multihost.on_primary(lambda: gradients.save(
      context.workdir, label, responses=measured.responses,
      tokens=measured.tokens))
  context.publish()


def result(workdir: pathlib.Path, named: stage_list.Named) -> pathlib.Path:
  """The file that an observing stage writes."""
  match named.stage:
    case evals_stage.EvalsStage():
      return evals_stage.result(workdir, named.label)
    case selection.SelectStage():
      return selection.result(workdir, named.label)
    case _:
      return gradients.result(workdir, named.label)


def warn_of_loss(path: pathlib.Path, stage: stage_list.Observing) -> None:
  """Says that a result is gone; a selection is needed, so that is an error."""
  gone = f'{path} is gone and cannot be made again: training went on since'
  if isinstance(stage, selection.SelectStage):
    raise types.UserError(f'{gone}; start anew in another --workdir.')
  logging.warning('%s.', gone)


def observe(
    stage: stage_list.Observing,
    label: str,
    context: run_state.Context,
    params: types.Params,
    plan: Sequence[stage_list.Named],
    *,
    initial: Callable[[], types.Params],
) -> None:
  """Looks at the policy so far and writes `result`."""
  match stage:
    case evals_stage.EvalsStage():
      evaluate(stage, label, context, params, initial=initial)
    case selection.SelectStage():
      select(stage, label, context, params, plan)
    case _:
      measure_gradients(stage, label, context, params)

"""One stage of a recipe: what it reads, what it needs, how it is run."""

import dataclasses
from collections.abc import Sequence

import optax
from absl import logging

from longjax import types
from longjax.data import dataset
from longjax.evals import stage as evals_stage
from longjax.parallel import multihost
from longjax.reward import hybrid
from longjax.synthesis import stage as synth_stage
from longjax.train import optimizer as optimizer_lib
from longjax.train import (
    partial,
    progress,
    rl_job,
    rl_stage,
    run_state,
    sft_job,
)

Training = sft_job.PretrainStage | sft_job.SftStage | rl_stage.RlStage
Stage = synth_stage.SynthStage | Training | evals_stage.EvalsStage

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
  if isinstance(stage, sft_job.SftStage | rl_stage.RlStage):
    return (stage.split,)
  return ()


def caps(plan: Sequence[Named]) -> list[synth_stage.Cap]:
  """What the examples of each split have to fit into."""
  found = []
  for named in plan:
    match named.stage:
      case sft_job.SftStage(row_len=max_len):
        field = 'row_len'
      case rl_stage.RlStage(max_prompt_len=max_len):
        field = 'max_prompt_len'
      case evals_stage.EvalsStage(lengths=lengths):
        field, max_len = 'lengths', max(lengths)
      case _:
        continue
    found += [
        synth_stage.Cap(
            split=split, field=f'stages.{named.name}.{field}', max_len=max_len,
            with_response=isinstance(named.stage, sft_job.SftStage))
        for split in splits_read(named.stage)]
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
  for named in plan:
    if isinstance(named.stage, Training) and names.count(named.name) > 1:
      raise types.UserError(
          f'recipe runs stage {named.name!r} twice; only evaluations may '
          'recur. Configure a second stage with another name.')
    if isinstance(named.stage, synth_stage.SynthStage):
      written = named.stage.splits()
    for split in splits_read(named.stage):
      if split not in written:
        there = (f'the synth stage before it writes {", ".join(written)}'
                 if written else 'no synth stage stands before it')
        raise types.UserError(
            f'stages.{named.name} reads the split {split!r}, but {there}.')


def check_mesh(stage: Stage, context: run_state.Context) -> None:
  """Refuses batches that do not divide over devices."""
  match stage:
    case rl_stage.RlStage():
      rl_stage.check(stage, context)
    case sft_job.PretrainStage() | sft_job.SftStage():
      sft_job.check(stage, context)
    case evals_stage.EvalsStage():
      evals_stage.check(stage, context.rules)


def optimizer(stage: Training) -> optax.GradientTransformation:
  """Of a stage, with the schedule of all its steps."""
  num_steps = stage.steps
  if isinstance(stage, rl_stage.RlStage):
    num_steps *= stage.num_minibatches * stage.num_epochs
  return optimizer_lib.make(stage.optimizer, num_steps=num_steps)


def carried(stage: Training) -> partial.Carried | None:
  """What a stage's checkpoints hold of unfinished responses."""
  return stage.carried() if isinstance(stage, rl_stage.RlStage) else None


def train(
    stage: Training,
    context: run_state.Context,
    state: run_state.RunState,
    place: run_state.Place,
) -> tuple[run_state.RunState, run_state.Place]:
  """Trains one stage to its end."""
  data = context.workdir / DATA_FOLDER
  if isinstance(stage, rl_stage.RlStage):
    return rl_job.run(
        context, stage, state, place, examples=dataset.read(data, stage.split),
        score=hybrid.score)
  examples = (
      dataset.read(data, stage.split)
      if isinstance(stage, sft_job.SftStage) else None)
  return sft_job.run(context, stage, state, place, examples=examples)


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
    if isinstance(named.stage, rl_stage.RlStage):
      num_prompts, split = named.stage.num_prompts, named.stage.split
      num_examples = len(dataset.read(directory, split))
      if num_examples < num_prompts:
        raise types.UserError(
            f'stages.{named.name}.num_prompts={num_prompts} is more than the '
            f'{num_examples} examples of split {split!r}; lower it or add '
            'examples.')


def evaluate(
    stage: evals_stage.EvalsStage,
    label: str,
    context: run_state.Context,
    params: types.Params,
) -> None:
  """Writes one evaluation."""
  evals_stage.run(
      stage, name=label, params=params,
      examples={s: dataset.read(context.workdir / DATA_FOLDER, s)
                for s in stage.splits},
      score=hybrid.score, model=context.model, tokenizer=context.tokenizer,
      rules=context.rules, compute=context.compute, seed=context.seed,
      workdir=context.workdir, progress=progress.Progress,
      check_stop=lambda: context.check_stop(f'during evaluation {label}'))
  context.publish()

"""The recipe: stages run in order, each resumable and skipped when done.

  synth --data set--> evals, sft --params--> evals, rl --params--> evals

A run lives in its work directory and is described by `RunConfig`. Every stage
is a function of the configuration and of what the stages before it left, so a
killed run started again ends with the same bits as one that was not.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
from absl import logging

from longjax import config as config_lib
from longjax import stages as stages_lib
from longjax import types
from longjax.evals import report, selection, summary
from longjax.evals import stage as evals_stage
from longjax.model import architecture, huggingface
from longjax.model import compute as compute_lib
from longjax.parallel import mesh as mesh_lib
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib
from longjax.synthesis import stage as synth_stage
from longjax.train import (
  checkpoint,
  initial,
  merge_stage,
  metrics,
  mirror,
  rl_stage,
  run_state,
)
from longjax.train import workdir as workdir_lib

# The final model, in Hugging Face's layout.
MODEL_FOLDER = 'model'


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
  """

  job: Literal[
      'recipe', 'synth', 'pretrain', 'sft', 'rl', 'evals'] = 'recipe'
  recipe: tuple[str, ...]
  stages: Mapping[str, stages_lib.Stage]
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
    for name, stage in self.trained():
      if isinstance(stage, rl_stage.RlStage) and not self.init_from and (
          stage.judge.mode == 'inprocess'):
        raise types.UserError(
            f"stages.{name}.judge.mode='inprocess' asks the model that the run "
            'begins with, which knows nothing here; set init_from, or use '
            "judge.mode='endpoint' or 'none'.")
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
    stages_lib.check_plan(plan)

  def plan(self) -> list[stages_lib.Named]:
    """What `job` runs, in order."""
    found: list[stages_lib.Named] = []
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
        label = f'{len(evaluated)}_{before}'
        if stage.memory is not None:
          label += '_agent'
        evaluated.add((name, before))
      elif isinstance(stage, stages_lib.Training | merge_stage.MergeStage):
        before = name
      found.append(stages_lib.Named(name=name, label=label, stage=stage))
    return found

  def trained(self) -> list[tuple[str, stages_lib.Training]]:
    """(label, stage) of those that train."""
    return [(n.label, n.stage) for n in self.plan()
            if isinstance(n.stage, stages_lib.Training)]


def run(
    config: RunConfig,
    workdir: str | os.PathLike[str],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> int:
  """Runs or resumes a recipe in `workdir`; reports one that is finished.

  Args:
    config: what to run.
    workdir: where; holds all results. A directory all processes share, or
      one on an object store, see `mirror`.
    devices: None means all.

  Returns:
    The exit code: 0, or 128 + signal number if a signal stopped the run.

  Raises:
    UserError: mistakes in the configuration, the data or the work directory.
  """
  if config.cpu_devices and devices is None:  # Before any use of a device.
    mesh_lib.split_cpu(config.cpu_devices)
  copy = mirror.Mirror(workdir)
  multihost.on_primary(lambda: workdir_lib.claim(
      copy.local, config_lib.resolved(config), name=copy.remote))
  copy.publish()
  workdir_lib.check_shared(copy)
  facts = workdir_lib.Facts(copy.local)
  if multihost.on_primary(
      lambda: facts.is_finished and _is_complete(config, copy.local)):
    logging.info(
        '%s holds this run, finished; another one needs another --workdir.',
        copy.remote)
    multihost.on_primary(lambda: _show(copy, is_report_new=True))
    copy.publish()
    return 0
  workdir_lib.use_compilation_cache(copy.remote)
  rules = rules_lib.Rules(mesh_lib.make(config.mesh, devices))
  facts.describe(rules.mesh.devices, seed=config.seed)
  with (
      config.compute.matmul_precision(),
      checkpoint.StopSignal() as stop,
      checkpoint.Checkpointer(
          copy.remote / 'checkpoints',
          keep=config.keep_checkpoints) as checkpointer,
  ):
    begin = _begin(config, copy, rules)
    context = run_state.Context(
        workdir=copy.local, publish=copy.publish, seed=config.seed, rules=rules,
        tokenizer=begin.tokenizer, model=begin.model,
        compute=config.compute,
        checkpoint_every=config.checkpoint_every,
        max_skipped_in_a_row=config.max_skipped_in_a_row,
        metrics=metrics.MetricsWriter(copy.local),
        rollouts=metrics.RolloutWriter(copy.local),
        checkpointer=checkpointer, stop=stop)
    try:
      for named in config.plan():
        stages_lib.check_mesh(named.stage, context)
      _run_stages(config, context, begin, facts)
    except run_state.Stopped as stopped:
      stop.settle()
      logging.info(
          '%s: %s; run the same command to resume.', stop.name, stopped)
      with contextlib.suppress(types.UserError):  # The state is saved.
        multihost.on_primary(lambda: _report(copy))
      context.close()
      copy.publish()
      return stop.exit_code
    finally:
      context.close()
  # Neither after an error, which a second one would hide.
  facts.finish()
  multihost.on_primary(lambda: _show(copy, is_report_new=False))
  copy.publish()
  return 0


def _run_stages(
    config: RunConfig,
    context: run_state.Context,
    begin: initial.Initial,
    facts: workdir_lib.Facts,
) -> None:
  """Runs what is left to do."""
  state, place = _restore(config, context)
  last_step = place.global_step if place else 0
  context.metrics.truncate(last_step)
  context.rollouts.truncate(last_step)
  trained = [label for label, _ in config.trained()]
  done = trained[:trained.index(place.stage)] if place else []
  # Makes the parameters the next stage begins with; None if they are gone.
  params: Callable[[], types.Params] | None = functools.cache(begin.load)
  kept = stages_lib.kept(config.plan())
  if merge_stage.BASE in kept:
    merge_stage.keep(merge_stage.BASE, begin.load, context, begin)
  if place is None and params:
    params()  # A damaged base model is told now, not after synthesis.

  for named in config.plan():
    label, stage = named.label, named.stage
    context.check_stop(f'before {label}')
    if isinstance(stage, synth_stage.SynthStage):
      with facts.timing(label):
        stages_lib.synthesise(stage, context, config.plan())
    elif isinstance(stage, evals_stage.EvalsStage):
      result = evals_stage.result(context.workdir, label)
      if multihost.on_primary(result.exists):
        continue
      if params is None:
        logging.warning('evals/%s.json is gone and cannot be made again: '
                        'training went on since.', label)
        continue
      with facts.timing(label):
        stages_lib.evaluate(stage, label, context, params())
    elif isinstance(stage, selection.SelectStage):
      chosen = selection.result(context.workdir, label)
      if not multihost.on_primary(chosen.exists):
        if params is None:
          raise types.UserError(
              f'{chosen} is gone and cannot be made again: training went on '
              'since; start anew in another --workdir.')
        with facts.timing(label):
          stages_lib.select(stage, label, context, params(), config.plan())
    elif isinstance(stage, merge_stage.MergeStage):
      with facts.timing(label):
        merge_stage.run(stage, label, context)
      params = functools.partial(merge_stage.load, label, context)
    elif label in done:
      params = functools.partial(
          merge_stage.load, label, context) if label in kept else None
    else:
      with facts.timing(label):
        if state is None or place is None or place.stage != label:
          assert params is not None, label
          state = run_state.fresh(
              params(), stages_lib.optimizer(stage), context,
              carried=stages_lib.carried(stage))
          place = run_state.Place(
              stage=label, stage_step=0,
              global_step=place.global_step if place else 0)
        params = None  # Training needs the memory.
        state, place = stages_lib.train(
            stage, context, state, place, initial=begin.load)
        params = functools.partial(getattr, state.train, 'params')
        if label in kept:
          merge_stage.keep(label, params, context, begin)
  context.checkpointer.wait()
  directory = context.workdir / MODEL_FOLDER
  if config.export and trained and params and not multihost.on_primary(
      directory.exists):
    huggingface.save(
        directory, params(), context.model,
        source=begin.tokenizer_directory,
        stop_ids=context.tokenizer.stop_ids, pad_id=context.tokenizer.pad_id)


def _restore(
    config: RunConfig, context: run_state.Context
) -> tuple[run_state.RunState | None, run_state.Place | None]:
  """The newest undamaged checkpoint."""
  trained = config.trained()
  if not trained:
    return None, None
  # All stages have optimizers of one structure; only their numbers differ.
  optimizer = stages_lib.optimizer(trained[0][1])
  stage_of = dict(trained)
  restored = context.checkpointer.restore_latest(
      lambda info: run_state.abstract(
          optimizer, context.model, context.rules,
          **stages_lib.on_host(stage_of[info['stage']], info['data'])))
  if restored is None:
    return None, None
  place = run_state.Place(**restored.info)
  logging.info('Resuming after step %d of stage %s.', place.stage_step,
               place.stage)
  return restored.tree, place


def _begin(
    config: RunConfig, copy: mirror.Mirror, rules: rules_lib.Rules
) -> initial.Initial:
  """Base model or fresh network."""
  if config.init_from:
    return initial.from_base(config.init_from, rules=rules)
  assert config.model is not None
  synth = [n.stage for n in config.plan()
           if isinstance(n.stage, synth_stage.SynthStage)]
  return initial.from_scratch(
      config.model, initialization=config.initialization,
      seed=config.seed, directory=copy.local / 'tokenizer',
      texts=lambda: synth_stage.tokenizer_texts(
          synth[0] if synth else None, seed=config.seed),
      rules=rules, publish=copy.publish)


def _is_complete(config: RunConfig, workdir: pathlib.Path) -> bool:
  """Whether every result of a finished run is still there."""
  results = [evals_stage.result(workdir, n.label) for n in config.plan()
             if isinstance(n.stage, evals_stage.EvalsStage)]
  if config.export and config.trained():
    results.append(workdir / MODEL_FOLDER)
  return all(result.exists() for result in results)


def _report(copy: mirror.Mirror) -> None:
  name = mirror.absolute(copy.remote).name
  report.write(copy.local, title=f'longjax run: {name}')


def _show(copy: mirror.Mirror, *, is_report_new: bool) -> None:
  """The table and where the report is."""
  if not is_report_new or not (copy.local / report.REPORT_FILE).exists():
    _report(copy)
  summary.show(copy.local, sys.stderr)
  logging.info('Report: %s', copy.remote / report.REPORT_FILE)

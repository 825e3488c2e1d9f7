"""The recipe: stages run in order, each resumable and skipped when done.

  synth --data set--> evals, sft --params--> evals, rl --params--> evals

A run lives in its work directory and is described by `run_config`. Every stage
is a function of the configuration and of what the stages before it left, so a
killed run started again ends with the same bits as one that was not.
"""

import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
from absl import logging

from longjax import config as config_lib
from longjax import run_config, stage_list, types
from longjax import stages as stages_lib
from longjax.evals import report, summary
from longjax.model import huggingface
from longjax.parallel import mesh as mesh_lib
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib
from longjax.planner import ahead
from longjax.synthesis import stage as synth_stage
from longjax.train import (
    checkpoint,
    initial,
    merge_stage,
    metrics,
    mirror,
    policies,
    run_state,
)
from longjax.train import state as state_lib
from longjax.train import workdir as workdir_lib

# The final model, in Hugging Face's layout.
MODEL_FOLDER = 'model'


def run(
    config: run_config.RunConfig,
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
        stages_lib.check_mesh(
            named.stage, stages_lib.within(named.stage, context))
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
    config: run_config.RunConfig,
    context: run_state.Context,
    begin: initial.Initial,
    facts: workdir_lib.Facts,
) -> None:
  """Runs what is left to do."""
  plan = config.plan()
  state, place = _restore(config, context)
  last_step = place.global_step if place else 0
  context.metrics.truncate(last_step)
  context.rollouts.truncate(last_step)
  trained = [label for label, _ in config.trained()]
  done = trained[:trained.index(place.stage)] if place else []
  # Makes the parameters the next stage begins with; None if they are gone.
  params: Callable[[], types.Params] | None = functools.cache(begin.load)
  kept = stage_list.kept(plan)
  if policies.BASE in kept:
    policies.keep(policies.BASE, begin.load, context, begin)
  if place is None and params:
    params()  # A damaged base model is told now, not after synthesis.

  for index, named in enumerate(plan):
    label, stage = named.label, named.stage
    context.check_stop(f'before {label}')
    if isinstance(stage, synth_stage.SynthStage):
      with facts.timing(label):
        stages_lib.synthesise(stage, context, plan)
    elif isinstance(stage, stage_list.Observing):
      path = stages_lib.result(context.workdir, named)
      if multihost.on_primary(path.exists):
        continue
      if params is None:
        stages_lib.warn_of_loss(path, stage)
        continue
      with facts.timing(label):
        stages_lib.observe(
            stage, label, context, params(), plan, initial=begin.load)
    elif isinstance(stage, merge_stage.MergeStage):
      with facts.timing(label):
        merge_stage.run(stage, label, context)
      params = functools.partial(policies.load, label, context)
    elif label in done:
      params = functools.partial(
          policies.load, label, context) if label in kept else None
    else:
      within = stages_lib.within(stage, context)
      with facts.timing(label):
        if state is None or place is None or place.stage != label:
          moments = None if stage.optimizer.reset or state is None else (
              state.train.opt_state)
          state = None  # Two stages need not be held at once.
          if stage.start:
            params = functools.partial(
                policies.load, stage.start, context)
          assert params is not None, label
          state = run_state.fresh(
              params(), stages_lib.optimizer(stage), within,
              carried=stages_lib.carried(stage), moments=moments)
          place = run_state.Place(
              stage=label, stage_step=0,
              global_step=place.global_step if place else 0)
        params = None  # Training needs the memory.
        with ahead.compiling(
            [later.stage for later in plan[index + 1:]], context,
            within=stages_lib.within):
          state, place = stages_lib.train(
              stage, within, state, place, initial=begin.load)
        params = functools.partial(
            jax.device_put, state.train.params,
            state_lib.param_shardings(context.model, context.rules))
        if label in kept:
          policies.keep(label, params, context, begin)
  context.checkpointer.wait()
  directory = context.workdir / MODEL_FOLDER
  if config.export and trained and params and not multihost.on_primary(
      directory.exists):
    huggingface.save(
        directory, params(), context.model,
        source=begin.tokenizer_directory,
        stop_ids=context.tokenizer.stop_ids, pad_id=context.tokenizer.pad_id)


def _restore(
    config: run_config.RunConfig, context: run_state.Context
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
          optimizer, context.model,
          stages_lib.within(stage_of[info['stage']], context).rules,
          **stages_lib.on_host(stage_of[info['stage']], info['data'])))
  if restored is None:
    return None, None
  place = run_state.Place(**restored.info)
  logging.info('Resuming after step %d of stage %s.', place.stage_step,
               place.stage)
  return restored.tree, place


def _begin(
    config: run_config.RunConfig, copy: mirror.Mirror, rules: rules_lib.Rules
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


def _is_complete(config: run_config.RunConfig, workdir: pathlib.Path) -> bool:
  """Whether every result of a finished run is still there."""
  results = [stages_lib.result(workdir, n) for n in config.plan()
             if isinstance(n.stage, stage_list.Observing)]
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

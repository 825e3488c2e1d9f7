"""Every file in configs/ builds and can be traced; its values are reviewed.

A changed default shows as a changed line under tests/testdata/configs. After
looking at it, accept it with:

  LONGJAX_UPDATE_GOLDEN=1 python -m pytest tests/configs_test.py
"""

import ast
import functools
import importlib.util
import os
import pathlib
import types as python_types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from longjax import config, rows, run_config, stages, types
from longjax.ask import settings
from longjax.bench import suite
from longjax.model import huggingface_config
from longjax.parallel import mesh as mesh_lib
from longjax.parallel import rules as rules_lib
from longjax.train import (
    convert_job,
    initial,
    merge_job,
    rl_job,
    rl_stage,
    sft_job,
)
from longjax.train import state as state_lib
from longjax.train import step as step_lib

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / 'tests' / 'testdata' / 'configs'


def load(path: pathlib.Path):
  spec = importlib.util.spec_from_file_location(f'configs_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def cases() -> list[tuple[pathlib.Path, str]]:
  """Each config file with each of the variants it lists in VARIANTS."""
  return [
      (path, variant)
      for path in sorted((ROOT / 'configs').glob('*.py'))
      for variant in ('', *getattr(load(path), 'VARIANTS', ()))]


def name(case: tuple[pathlib.Path, str]) -> str:
  path, variant = case
  return f'{path.stem}-{variant}' if variant else path.stem


# What other jobs than a run are made of.
OTHERS = {
    'convert': convert_job.ConvertConfig,
    'merge': merge_job.MergeJobConfig,
    'bench': suite.BenchConfig,
    'ask': settings.AskConfig,
}


def build(path: pathlib.Path, variant: str) -> Any:
  values = load(path).get_config(*([variant] if variant else []))
  made = OTHERS.get(values.get('job'), run_config.RunConfig)
  return config.build(made, values, 'config')


def resolved_text(path: pathlib.Path, variant: str) -> str:
  """One line for each value, from the file through the dataclasses."""
  return ''.join(
      f'{key} = {value!r}\n'
      for key, value in config.flat(build(path, variant)).items())


@functools.cache  # Variants share stages.
def trace_update(model, stage, compute):
  """Shape-evaluates one optimizer step; the states before and after."""
  rules = rules_lib.Rules(
      mesh_lib.make(mesh_lib.MeshConfig(), jax.devices()[:1]))
  context = python_types.SimpleNamespace(
      model=model, rules=rules, compute=compute)
  optimizer = stages.optimizer(stage)

  def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  if isinstance(stage, rl_stage.RlStage):
    loss = functools.partial(rl_job.loss, stage=stage, context=context)
    shapes = [(rl_stage.rows_at_once(stage, rules), row_len)
              for row_len in stage.row_lens]
    num_responses = stage.num_prompts * stage.num_samples
    by_token = f32(num_responses, stage.sampler.max_response_len)
    extras = {
        'advantages': f32(num_responses), 'token_weights': by_token,
        'sampler_logprobs': by_token, 'old_logprobs': by_token}
  else:
    loss = functools.partial(sft_job.loss, context=context)
    shapes = [(stage.rows_at_once or stage.num_rows, stage.row_len)]
    extras = {'num_tokens': f32()}
  update = step_lib.make_update(loss, optimizer, config=model, rules=rules)
  before = state_lib.abstract(model, optimizer, rules)
  made = [rows.empty(*shape) for shape in shapes]
  total = jax.eval_shape(update.start, before.params, made[0], extras)
  for part in made:
    total = jax.eval_shape(
        update.accumulate, before.params, total, part, extras)
  after, metrics = jax.eval_shape(update.apply, before, total, True)
  assert {'loss', 'grad_norm', 'skipped_in_a_row'} <= metrics.keys()
  return before, after


def test_there_are_configs():
  assert 'tiny' in map(name, cases())


@pytest.mark.parametrize('case', cases(), ids=name)
def test_resolved_values_are_those_last_reviewed(case):
  got = resolved_text(*case)
  golden = GOLDEN / f'{name(case)}.txt'
  if os.environ.get('LONGJAX_UPDATE_GOLDEN'):
    golden.write_text(got)
  assert golden.exists(), f'{golden} is missing; see the docstring above'
  assert got == golden.read_text()


@pytest.mark.parametrize('case', cases(), ids=name)
def test_every_training_stage_can_be_traced(case):
  built = build(*case)
  if isinstance(built, tuple(OTHERS.values())):
    return  # It trains nothing.
  model = built.model or huggingface_config.load(initial.find(built.init_from))
  assert built.trained()
  for _, stage in built.trained():
    before, after = trace_update(model, stage, built.compute)
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)


def test_no_reviewed_text_is_left_over():
  assert {p.stem for p in GOLDEN.glob('*.txt')} == set(map(name, cases()))


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_a_config_tells_its_command_hardware_time_and_score(path):
  text = (ast.get_docstring(ast.parse(path.read_text())) or '').lower()
  for word in ('--config=configs/', 'hardware', 'time', 'score'):
    assert word in text, f'the docstring of {path} lacks {word!r}'


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_a_variant_that_is_not_listed_is_refused(path):
  with pytest.raises(types.UserError, match='nonsense'):
    load(path).get_config('nonsense')

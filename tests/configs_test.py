"""Every file in configs/ builds, and its resolved values are reviewed.

A changed default shows as a changed line under tests/testdata/configs. After
looking at it, accept it with:

  LONGJAX_UPDATE_GOLDEN=1 python -m pytest tests/configs_test.py
"""

import ast
import importlib.util
import os
import pathlib

import pytest

from longjax import config, recipe, types

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


def resolved_text(path: pathlib.Path, variant: str) -> str:
  """One line for each value, from the file through the dataclasses."""
  values = load(path).get_config(*([variant] if variant else []))
  built = config.build(recipe.RunConfig, values, 'config')
  return ''.join(
      f'{key} = {value!r}\n' for key, value in config.flat(built).items())


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

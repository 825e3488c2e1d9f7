"""Imports point downward: a module can be read knowing only what is below."""

import ast
import graphlib
import pathlib

import longjax

ROOT = pathlib.Path(longjax.__file__).parent

# An import points to a smaller number, or stays inside its own package.
LAYERS = {
    'main': 8, '__main__': 8, 'command_line': 8, 'other_jobs': 8, 'recipe': 8,
    'run_config': 8, 'stage_list': 8, 'stages': 8, 'log': 8,
    'bench': 7,
    'planner': 6, 'ask': 6,
    'train': 5, 'evals': 5,
    'agents': 4,
    'rollout': 3,
    'model': 2, 'synthesis': 2,
    'data': 1, 'parallel': 1, 'reward': 1, 'rl': 1,
    'types': 0, 'rows': 0, 'config': 0, 'overrides': 0, 'reductions': 0,
}
# Single files beside the packages; within each row they may use each other.
ENTRY = {
    'main', '__main__', 'command_line', 'other_jobs', 'recipe', 'run_config',
    'stage_list', 'stages', 'log'}
LEAVES = {'types', 'rows', 'config', 'overrides', 'reductions'}


def module_name(path: pathlib.Path) -> str:
  """'longjax/rl/loss.py' -> 'rl.loss'."""
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imported(source: str, modules: set[str]) -> set[str]:
  """Our modules that a file names in an import, wherever it stands."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, 'relative imports hide where a name comes from'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    for name in names:
      if name == 'longjax' or not name.startswith('longjax.'):
        continue
      inner = name.removeprefix('longjax.')
      assert inner in modules, f'{name} is no module; import modules only'
      found.add(inner)
  return found


def import_graph() -> dict[str, set[str]]:
  paths = {module_name(path): path for path in ROOT.rglob('*.py')}
  return {
      name: imported(path.read_text(), set(paths))
      for name, path in paths.items() if name}


def violations(graph: dict[str, set[str]]) -> list[str]:
  """Imports that point upward or sideways."""
  found = []
  for module, targets in graph.items():
    for target in targets:
      here, there = module.split('.')[0], target.split('.')[0]
      same_group = here == there or any(
          {here, there} <= row for row in (ENTRY, LEAVES))
      if not same_group and LAYERS[there] >= LAYERS[here]:
        found.append(f'{module} -> {target}')
  return sorted(found)


def test_every_package_has_a_layer():
  assert {name.split('.')[0] for name in import_graph()} <= set(LAYERS)


def test_imports_point_downward():
  assert violations(import_graph()) == []


def test_there_are_no_import_cycles():
  # Raises CycleError naming the cycle.
  list(graphlib.TopologicalSorter(import_graph()).static_order())


def test_a_sideways_and_an_upward_import_would_be_caught():
  graph = {
      'rl.loss': {'reductions', 'rl.clipping'}, 'data.chat': {'rl.loss'},
      'rows': {'types'}, 'model.head': {'train.state'}}
  assert violations(graph) == [
      'data.chat -> rl.loss', 'model.head -> train.state']


def test_imports_inside_functions_are_seen():
  source = 'def f():\n  from longjax.rl import loss\n'
  assert imported(source, {'rl.loss'}) == {'rl.loss'}

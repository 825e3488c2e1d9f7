"""Every notebook runs from its first cell to its last and shows its point."""

import ast
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
MAX_BYTES = 300_000

# What a reader is told, as a last cell run in the notebook's own kernel.
_CHECKS = {
    '1_one_rl_step': '''
assert 0.0 < rewards.mean() < 1.0 and rewards[shown].std() > 0.0
assert set(modes) == set(entropy_control.Mode)
assert kept[0].all()
np.testing.assert_array_equal(kept[1], by_method['task_std'][shown] > 0)
assert np.abs(before - sampled).max() < 1e-3
better, worse = change[advantages > 0], change[advantages < 0]
assert better.mean() > 0.0 > worse.mean()
assert np.mean(better > 0) > 0.5 and np.mean(worse < 0) > 0.5
''',
    '2_memory_agent': '''
assert 0.2 < rewards.mean() < 1.0 and rewards[shown].std() > 0.0
assert len(parts) > 3 and all(len(p) <= PART_LEN for p in parts)
assert alone > 2.5 * of_step.num_needed
assert np.abs(trainer - sampled).max() < 1e-3
assert better.mean() > 0.0 > worse.mean()
for other in (params, after_step):
  assert 0.0 < distance(merged, other) < distance(params, after_step)
''',
}


def name(path: pathlib.Path) -> str:
  return path.stem


def test_every_notebook_is_checked():
  assert set(_CHECKS) == set(map(name, NOTEBOOKS))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_a_notebook_runs_and_shows_what_it_says(path, tmp_path, monkeypatch):
  notebook = nbformat.read(path, as_version=4)
  notebook.cells.append(nbformat.v4.new_code_cell(_CHECKS[name(path)]))
  # As a reader has it: whatever devices there are, and no particular folder.
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  # The kernel warns of its open port, whoever starts it.
  client = nbclient.NotebookClient(notebook, timeout=600)
  client.execute(cwd=str(tmp_path))
  warnings = [
      output['text'] for cell in notebook.cells
      for output in cell.get('outputs', []) if output.get('name') == 'stderr']
  assert not warnings


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_a_notebook_is_committed_with_small_and_whole_outputs(path):
  assert path.stat().st_size < MAX_BYTES
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert [cell.execution_count for cell in code] == list(
      range(1, len(code) + 1))
  kinds = {output.output_type for cell in code for output in cell.outputs}
  assert kinds <= {'stream', 'display_data', 'execute_result'}
  # Nothing of the machine it was made on.
  assert '/tmp/' not in path.read_text() and '/home/' not in path.read_text()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_a_notebook_imports_longjax_and_defines_next_to_nothing(path):
  source = '\n'.join(
      cell.source for cell in nbformat.read(path, as_version=4).cells
      if cell.cell_type == 'code')
  tree = ast.parse(source)
  definitions = [
      node for node in ast.walk(tree)
      if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
  assert all(node.end_lineno - node.lineno < 12 for node in definitions)
  assert sum('longjax' in ast.unparse(node) for node in ast.walk(tree)
             if isinstance(node, (ast.Import, ast.ImportFrom))) >= 5

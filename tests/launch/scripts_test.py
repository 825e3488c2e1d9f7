"""All scripts parse and are clean; CI runs one of them."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_ci_runs_what_a_person_runs():
  text = (ROOT / '.ci' / 'run').read_text()
  assert text.splitlines()[-1] == (
      'exec bash "$(dirname "$0")/../launch/test.sh"')
  assert os.access(ROOT / '.ci' / 'run', os.X_OK)


@pytest.mark.parametrize(
    'script', sorted((ROOT / 'launch').glob('*.sh')), ids=lambda p: p.name)
def test_scripts_parse(script):
  subprocess.run(['bash', '-n', str(script)], check=True)


def test_scripts_are_clean_for_shellcheck():
  program = shutil.which('shellcheck') or shutil.which(
      'shellcheck', path=os.path.dirname(sys.executable))
  if program is None:
    pytest.skip('shellcheck comes with the dev extra')
  done = subprocess.run(
      [program, *sorted(map(str, (ROOT / 'launch').glob('*.sh')))],
      capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout

"""All that is installed is pinned."""

import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_every_requirement_is_pinned_once():
  def canonical(name):
    return re.sub(r'[-_.]+', '-', name).lower()

  lines = (ROOT / 'launch' / 'constraints.txt').read_text().splitlines()
  pins = [line for line in lines if line and not line.startswith('#')]
  assert all(re.fullmatch(r'[\w.-]+==[\w.]+( ;.*)?', pin) for pin in pins)
  names = [canonical(pin.partition('==')[0]) for pin in pins]
  assert len(names) == len(set(names))
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  wanted = project['dependencies'] + [
      r for extra in ('dev', 'report')
      for r in project['optional-dependencies'][extra]]
  for requirement in wanted:
    name = canonical(re.match(r'[\w.-]+', requirement)[0])
    assert name in names, f'{name} has no pin in launch/constraints.txt'


def test_no_tensorflow_is_asked_for():
  text = (ROOT / 'launch' / 'constraints.txt').read_text()
  assert not re.search(r'^tensorflow(-cpu)?==', text, re.MULTILINE)


def test_the_interpreter_running_this_is_one_we_support():
  assert (3, 11) <= sys.version_info[:2] < (3, 14)

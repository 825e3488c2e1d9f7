"""Mistakes end in one line and exit code 2, and nothing is lost.

Whole command lines, each in a fork of one process that has done the imports.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from longjax import config as config_lib
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import architecture, huggingface, parameters
from longjax.train import manifest
from tests import tiny_recipe

ROOT = pathlib.Path(__file__).parent.parent

# `full_at` makes the disk full when a checkpoint is saved for the n-th time:
# no file may grow past a size from then on.
DRIVER = """
import json, os, resource, sys
from longjax import main, recipe
from longjax.train import checkpoint
from tests import tiny_recipe

def fill_disk(count):
  save, calls = checkpoint.Checkpointer.save, []
  def wrapped(self, *args):
    calls.append(args)
    if len(calls) == count:
      self.wait()
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    save(self, *args)
  checkpoint.Checkpointer.save = wrapped

codes = []
for i, line in enumerate(json.load(sys.stdin)):
  # A pipe, which no full disk fills.
  reader, writer = os.pipe()
  if not os.fork():
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)
    if line['full_at']:
      fill_disk(line['full_at'])
    sys.argv = ['longjax', *line['arguments']]
    main.run()
  os.close(writer)
  with open(reader, 'rb') as pipe, open(f'{i}.log', 'wb') as log:
    log.write(pipe.read())
  codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
print(json.dumps(codes))
"""

CONFIG = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from ml_collections import config_dict
from tests import tiny_recipe
def get_config(variant=''):
  changes = {{}}
  if variant == 'base':
    changes = {{'model': None, 'recipe': ('synth', 'evals')}}
  if variant == 'own':
    changes = {{
        'recipe': ('synth', 'sft', 'rl'), 'stages.synth.examples': {{}}}}
  if variant == 'pretrain':
    changes = {{'recipe': ('pretrain',), 'stages.pretrain.steps': 6}}
  return config_dict.ConfigDict(tiny_recipe.values(changes))
"""

# Command line -> what the one line says. There are eight devices.
MISTAKES = {
    'an unknown key':
        ('conf.py --config.stages.rl.stpes=3',
         'config.stages.rl.stpes does not exist; the nearest valid key is '
         'config.stages.rl.steps.'),
    'an ill-typed value':
        ('conf.py --config.stages.sft.steps=many',
         "config.stages.sft.steps='many' should be an int."),
    'rows that do not divide over the mesh':
        ('conf.py --config.stages.sft.num_rows=12',
         'num_rows=12 does not divide over the 8 data shards'),
    'prompts that do not divide over the mesh':
        ('conf.py --config.stages.rl.num_prompts=12',
         'rl.num_prompts=12 does not divide over the 8 data shards'),
    'evaluations that do not divide over the mesh':
        ('conf.py --config.stages.evals.prompts_at_once=12',
         'evals.prompts_at_once=12 does not divide over the 8 data shards'),
    'rows of training that cannot be split over seq':
        ('conf.py --config.mesh.data=2 --config.mesh.seq=4 '
         '--config.stages.rl.row_lens=(330,)',
         'rl.row_lens=330 cannot be split over mesh.seq=4; use a multiple of '
         '4'),
    'demonstrations that cannot be split over seq':
        ('conf.py --config.mesh.data=2 --config.mesh.seq=4 '
         '--config.stages.sft.row_len=330', 'row_len=330 cannot be split'),
    'a mesh of more devices than there are':
        ('conf.py --config.mesh.data=3', 'mesh (data=3, '),
    'a prompt longer than the cap':
        ('conf.py --config.stages.rl.max_prompt_len=100',
         'tokens, more than stages.rl.max_prompt_len=100; raise it, or lower '
         "max_tokens=200 of split 'rl'."),
    'a demonstration longer than a row':
        ('conf.py --config.stages.sft.row_len=100',
         'tokens, more than stages.sft.row_len=100'),
    'an evaluation longer than its lengths':
        ('conf.py --config.stages.evals.lengths=(64,100)',
         'tokens, more than stages.evals.lengths=100'),
    'rows too short for a prompt and a response':
        ('conf.py --config.stages.rl.row_lens=(280,290)',
         'rl.row_lens=(280, 290) cannot hold a prompt of max_prompt_len=280 '
         'and a response of 12 tokens; the longest must be at least 291.'),
    'an entropy band upside down':
        ('conf.py --config.stages.rl.aepo.entropy_low=0.5 '
         '--config.stages.rl.aepo.entropy_high=0.3', 'entropy_low'),
    'a group of one with group statistics':
        ('conf.py --config.stages.rl.num_samples=1',
         'num_samples=1: advantages compare the responses to one prompt'),
    'no such config':
        ('cnf.py', 'cannot read --config=cnf.py: No such file or directory; '
         'did you mean conf.py?'),
    'a config that is a directory':
        ('folder', 'cannot read --config=folder: Is a directory'),
    'no such base model':
        ('conf.py:base --config.init_from=nowhere',
         "init_from='nowhere' does not exist, neither in "),
    'a base model with damaged tensors':
        ('conf.py:base --config.init_from=damaged',
         'cannot read damaged/model.safetensors: '),
    'a base model with a damaged config':
        ('conf.py:base --config.init_from=misconfigured',
         'misconfigured/config.json'),
    'a base model without its tokenizer':
        ('conf.py:base --config.init_from=mute',
         'no tokenizer.model in mute'),
    'no such examples':
        ('conf.py:own --config.stages.synth.path=none.jsonl',
         'path=none.jsonl of the synth stage does not exist; '),
    'an example without answers':
        ('conf.py:own --config.stages.synth.path=bad.jsonl',
         'bad.jsonl:2: field answers: is missing'),
    'examples that are no text':
        ('conf.py:own --config.stages.synth.path=binary.jsonl',
         'binary.jsonl:1: field (line): '),
    'fewer examples than prompts of a batch':
        ('conf.py:own --config.stages.synth.path=few.jsonl '
         '--config.stages.rl.num_prompts=16',
         'stages.rl.num_prompts=16 is more than the 8 examples of split '
         "'rl'; lower it or add examples."),
    'a work directory of another config':
        ('conf.py --workdir=taken',
         '--workdir=taken holds a run of a different config: seed: 7 -> 0. '
         'Use another --workdir, or the same config to resume.'),
    'a work directory that is a file':
        ('conf.py --workdir=conf.py/x', 'cannot write to --workdir=conf.py/x'),
    'steps that are not finite':
        ('conf.py:pretrain --config.stages.pretrain.optimizer.learning_rate='
         '1e30 --config.max_skipped_in_a_row=3',
         'stage pretrain stopped at step 5: 3 steps in a row had a loss or '
         'gradient that is not finite (max_skipped_in_a_row=3)'),
}
FULL = 'conf.py:pretrain --workdir=full'
WHOLE = 'conf.py:pretrain --workdir=whole'


@dataclasses.dataclass(frozen=True)
class Outcome:
  code: int
  log: str


def base_model(directory: pathlib.Path) -> None:
  """A model and its tokenizer, as a user would download them."""
  tokenizer = tokenizer_lib.train(
      ['Some words. ' * 9], vocab_size=400, directory=directory / 'tokenizer')
  model = architecture.ModelConfig(
      vocab_size=tokenizer.vocab_size, embed_dim=16, ffn_dim=16, num_layers=1,
      num_heads=2, num_kv_heads=1, head_dim=8)
  huggingface.save(
      directory / 'base', parameters.init(model, jax.random.key(0)), model,
      source=directory / 'tokenizer')
  for name in ('damaged', 'misconfigured', 'mute'):
    shutil.copytree(directory / 'base', directory / name)
  tensors = directory / 'damaged' / 'model.safetensors'
  tensors.write_bytes(tensors.read_bytes()[:-100])
  (directory / 'misconfigured' / 'config.json').write_text('{"vocab')
  (directory / 'mute' / 'tokenizer.model').unlink()


def own_files(directory: pathlib.Path) -> None:
  """JSON-lines files, most of them defective."""

  def line(i: int, **changes) -> str:
    fields = {'documents': [f'The code of room {i} is {i}.'], 'kind': 'numeric',
              'question': f'What is the code of room {i}?', 'answers': str(i)}
    return json.dumps({k: v for k, v in (fields | changes).items() if v})

  (directory / 'bad.jsonl').write_text(
      f'{line(1)}\n{line(2, answers=None)}\n')
  (directory / 'binary.jsonl').write_bytes(b'\x1f\x8b\x00\xff')
  (directory / 'few.jsonl').write_text('\n'.join(map(line, range(10))))


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  made = tmp_path_factory.mktemp('mistakes')
  (made / 'conf.py').write_text(CONFIG)
  (made / 'folder').mkdir()
  (made / 'taken').mkdir()
  base_model(made)
  own_files(made)
  (made / 'taken' / 'config.json').write_text(
      json.dumps(config_lib.resolved(tiny_recipe.config({'seed': 7}))))
  (made / 'taken' / 'metrics.jsonl').write_text('precious\n')
  return made


@pytest.fixture(scope='module')
def outcomes(directory):
  """What each command line did."""
  lines = [
      f'{text} --workdir={i}' if '--workdir' not in text else text
      for i, (text, _) in enumerate(MISTAKES.values())]
  lines += [WHOLE, FULL, FULL]
  full_at = [0] * (len(lines) - 2) + [2, 0]
  done = subprocess.run(
      [sys.executable, '-c', DRIVER], cwd=directory, text=True, check=True,
      stdout=subprocess.PIPE, input=json.dumps([
          {'arguments': f'--config={text}'.split(), 'full_at': count}
          for text, count in zip(lines, full_at, strict=True)]),
      env=os.environ | {
          'PYTHONPATH': str(ROOT),
          'JAX_COMPILATION_CACHE_DIR': str(directory / 'programs'),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'})
  return [
      Outcome(code, (directory / f'{i}.log').read_text())
      for i, code in enumerate(json.loads(done.stdout))]


def error_of(outcome: Outcome) -> str:
  """The one line a mistake ends with; checks that it is alone."""
  assert outcome.code == 2, outcome.log
  assert 'Traceback' not in outcome.log
  lines = outcome.log.splitlines()
  errors = [x for x in lines if x.startswith('longjax: error: ')]
  assert len(errors) == 1, outcome.log
  assert lines[-1] == errors[0], outcome.log
  return errors[0]


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_two(outcomes, name):
  number = list(MISTAKES).index(name)
  assert MISTAKES[name][1] in error_of(outcomes[number])


@pytest.mark.parametrize('name', [
    'rows that do not divide over the mesh',
    'prompts that do not divide over the mesh',
    'evaluations that do not divide over the mesh',
    'a prompt longer than the cap', 'a base model with damaged tensors',
    'an example without answers'])
def test_nothing_is_computed_before_a_mistake_is_told(
    outcomes, directory, name):
  workdir = directory / str(list(MISTAKES).index(name))
  assert not (workdir / 'data').exists() or 'base' in name
  assert not (workdir / 'metrics.jsonl').exists()
  assert not (workdir / 'evals').exists()


def test_the_work_directory_of_another_config_is_not_touched(
    outcomes, directory):
  assert {p.name for p in (directory / 'taken').iterdir()} == {
      'config.json', 'metrics.jsonl'}
  assert (directory / 'taken' / 'metrics.jsonl').read_text() == 'precious\n'
  assert json.loads(
      (directory / 'taken' / 'config.json').read_text())['seed'] == 7


def test_steps_that_are_not_finite_are_skipped_and_counted(
    outcomes, directory):
  number = list(MISTAKES).index('steps that are not finite')
  records = tiny_recipe.metrics(directory / str(number))
  in_a_row = [float(r['values']['skipped_in_a_row']) for r in records]
  # The second update ruins the parameters; warm-up spared them the first.
  assert in_a_row == [0.0, 0.0, 1.0, 2.0, 3.0]
  assert not np.isfinite(float(records[2]['values']['loss']))
  told = [x for x in outcomes[number].log.splitlines() if 'step skipped' in x]
  assert len(told) == 3
  assert told[0].startswith('longjax: warning: Step 3 of pretrain: ')


def test_a_full_disk_is_told_and_costs_only_what_was_not_saved(
    outcomes, directory):
  whole, failed, resumed = outcomes[-3:]
  assert whole.code == 0, whole.log
  error = error_of(failed)
  assert 'cannot save checkpoint ' in error
  assert 'full/checkpoints/4: File too large; free space and run the same ' in (
      error)
  assert resumed.code == 0, resumed.log
  assert 'Resuming after step 2 of stage pretrain.' in resumed.log
  assert tiny_recipe.metrics(directory / 'full') == tiny_recipe.metrics(
      directory / 'whole')
  for name in ('full', 'whole'):
    newest = directory / name / 'checkpoints' / '6'
    assert manifest.damage(newest) == ''
  assert (directory / 'full' / 'model' / 'model.safetensors').read_bytes() == (
      directory / 'whole' / 'model' / 'model.safetensors').read_bytes()

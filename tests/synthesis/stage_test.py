"""Tests for a user's own examples in longjax.synthesis.stage."""

import json
import pathlib

import pytest

from longjax import types
from longjax.data import chat, dataset, documents
from longjax.data import tokenizer as tokenizer_lib
from longjax.reward import hybrid
from longjax.synthesis import python_lookup
from longjax.synthesis import stage as stage_lib
from longjax.train import progress


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> tuple[pathlib.Path, tokenizer_lib.Tokenizer]:
  """A file of real examples, and a tokenizer trained on it."""
  folder = tmp_path_factory.mktemp('own')
  path = folder / 'lookup.jsonl'
  python_lookup.write(str(path), num=60, seed=0, context_chars=300)
  texts = stage_lib.tokenizer_texts(
      stage_lib.SynthStage(path=str(path)), seed=0)
  return path, tokenizer_lib.train(
      texts, vocab_size=512, directory=folder / 'tokenizer')


def write(path, directory, tokenizer, *, max_len=4096, **stage):
  lines = []
  stage_lib.run(
      stage_lib.SynthStage(path=str(path), **stage), directory=directory,
      seed=0, tokenizer=tokenizer, progress=progress.Progress,
      check_stop=lambda: None, log=lines.append, caps=[stage_lib.Cap(
          split='rl', field='stages.rl.max_prompt_len', max_len=max_len)])
  return lines


def test_own_examples_become_every_split_that_the_stage_promises(
    made, tmp_path):
  path, tokenizer = made
  assert write(path, tmp_path / 'data', tokenizer) == []
  splits = {
      name: [e.id for e in dataset.read(tmp_path / 'data', name)]
      for name in stage_lib.SynthStage(path=str(path)).splits()}
  assert splits['sft'] == splits['rl']
  dealt = splits['rl'] + splits['validation'] + splits['test']
  assert len(dealt) == len(set(dealt)) == 60
  assert (len(splits['validation']), len(splits['test'])) == (6, 6)


def test_examples_that_are_too_long_are_an_error_or_left_out(made, tmp_path):
  path, tokenizer = made
  lengths = [len(chat.render_prompt(e, tokenizer))
             for e in stage_lib.read_own(str(path))]
  cap = sorted(lengths)[40]
  num_long = sum(length > cap for length in lengths)
  message = f'{num_long} of 60 examples are too long'
  with pytest.raises(types.UserError, match=message):
    write(path, tmp_path / 'a', tokenizer, max_len=cap)
  assert not (tmp_path / 'a').exists()
  line, = write(
      path, tmp_path / 'b', tokenizer, max_len=cap, drop_too_long=True)
  assert f'left out {num_long} of 60 examples' in line
  kept = [e for name in ('rl', 'validation', 'test')
          for e in dataset.read(tmp_path / 'b', name)]
  assert 0 < len(kept) == 60 - num_long < 60


@pytest.mark.parametrize('kind, answer', [
    ('numeric', 'between 5 and 6'), ('count', '7 or 8'),
    ('list', ['Oslo, in Norway; east', 'Bergen'])])
def test_an_answer_that_its_own_rule_rejects_is_refused(
    made, tmp_path, kind, answer):
  path = tmp_path / 'own.jsonl'
  fields = dict(documents=['Text.'], question='?', answers=answer, kind=kind)
  path.write_text(json.dumps(fields))
  with pytest.raises(
      types.UserError, match=f"'own-1': its answer .*kind '{kind}'"):
    write(path, tmp_path / 'data', made[1])


def test_every_kind_that_may_be_given_can_be_graded():
  assert set(documents.KINDS) == set(hybrid.KINDS)


def test_a_file_that_is_not_there_names_the_command_that_makes_one(
    tmp_path, made):
  path = tmp_path / 'absent.jsonl'
  with pytest.raises(
      types.UserError, match=f'python_lookup --output={path}$'):
    write(path, tmp_path / 'data', made[1])

"""Inquiries from the files to the answers."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from longjax import command_line, types
from longjax.agents import memory, query
from longjax.ask import job, saved, settings
from longjax.data import chat, prompts
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import compute, huggingface, huggingface_config
from longjax.parallel import mesh as mesh_lib
from longjax.rollout import decode, engine
from tests import tiny_model

ROOT = pathlib.Path(__file__).parent.parent.parent
MODEL = str(ROOT / 'configs' / 'tiny_base')
TOKENIZER = tokenizer_lib.load(MODEL)
SAMPLER = decode.SamplerConfig(temperature=0.7, max_response_len=16)
MEMORY = memory.MemoryConfig(
    part_len=64, memory_len=24, plan_len=0, wording='short')
QUESTIONS = ('Who came to Oslo?', 'What is the code? Answer in one word.')


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  rng = np.random.default_rng(0)
  for name, num_lines in (('a.txt', 32), ('b.md', 12)):
    (folder / name).write_text(''.join(
        f'{name} day {i}: {rng.choice(["Ada", "Bo", "Cy"])} came to Oslo with '
        f'{rng.integers(100)} coins.\n' for i in range(num_lines)))
  return folder


def config(texts, *, documents='*', question=QUESTIONS, **fields):
  return settings.AskConfig(**dict(
      model=MODEL, documents=f'{texts}/{documents}', question=question,
      window=640, memory=MEMORY, sampler=SAMPLER,
      mesh=mesh_lib.MeshConfig(data=1)) | fields)


def ask(workdir, asked):
  """Runs the job; what it saved."""
  workdir.mkdir(exist_ok=True)
  before = set(workdir.glob(f'*/{saved.FILE}'))
  assert job.run(asked, workdir, devices=jax.devices()[:1]) == 0
  [path] = set(workdir.glob(f'*/{saved.FILE}')) - before
  return json.loads(path.read_text())


def test_a_document_read_whole_is_answered_as_the_engine_does(
    texts, tmp_path, capsys):
  (tmp_path / 'short.txt').write_text('Ada came to Oslo.\n')
  got = ask(tmp_path / 'w', config(
      tmp_path, documents='short.txt', show_thinking=True))
  rules = tiny_model.rules()
  model = huggingface_config.load(MODEL)
  asked = [types.TaskExample(
      id=q, task='', kind='qa', question=q, answers=(), documents=(
          types.Document(title='short.txt', text='Ada came to Oslo.\n'),))
      for q in QUESTIONS]
  given = [types.Prompt(
      example=e, number=prompts.number(e.question),
      tokens=tuple(chat.render_prompt(e, TOKENIZER))) for e in asked]
  rollouts = engine.Engine(
      model=model, sampler=SAMPLER, stop_ids=TOKENIZER.stop_ids, rules=rules,
      engine=engine.EngineConfig(prompt_buckets=(624,), prompts_at_once=2),
      compute=compute.Compute()).sample(
          huggingface.load(MODEL, rules=rules)[0], given, jax.random.key(0),
          num_samples=1)
  want = [engine.response_text(TOKENIZER, rollouts, i, 0) for i in range(2)]
  assert [r['answer']['text'] for r in got['readings']] == want
  shown = capsys.readouterr().out
  for question, text in zip(QUESTIONS, want, strict=True):
    assert question in shown
    assert text.partition('</think>')[0].strip() in shown


def test_questions_and_files_at_once_are_answered_as_one_by_one(
    texts, tmp_path, monkeypatch):
  stats = []
  forget = engine.Session.forget

  def watched(self):
    stats.append(self.stats)
    forget(self)

  monkeypatch.setattr(engine.Session, 'forget', watched)
  together = ask(tmp_path, config(texts, mode='memory', each_file=True))
  # The second question does not read the part again.
  assert stats[-1].reused_tokens > 0.1 * stats[-1].prompt_tokens
  alone = [
      ask(tmp_path, config(
          texts, mode='memory', documents=name, question=question))
      for name, question in zip(('a.txt', 'b.md'), QUESTIONS, strict=True)]
  assert together['sizes'] == [alone[0]['sizes'][0], alone[1]['sizes'][0]]
  assert together['sizes'][0]['num_parts'] > (
      together['sizes'][1]['num_parts']) > 3
  first_and_last = together['readings'][::3]
  for got, want in zip(first_and_last, alone, strict=True):
    [want] = want['readings']
    assert want['memory'] and want['answer']['text']
    assert got == want


def test_auto_reads_whole_what_fits_and_in_parts_what_does_not(
    texts, tmp_path, caplog, capsys):
  (tmp_path / 'short.txt').write_text('Ada came to Oslo.\n')
  caplog.set_level('INFO')
  got = ask(tmp_path / 'w', config(
      texts, documents='a.txt,' + str(tmp_path / 'short.txt'), each_file=True,
      question=QUESTIONS[0], memory=memory.MemoryConfig(
          part_len=256, memory_len=24, plan_len=0, wording='short')))
  assert [r['turn'] for r in got['readings']] == [
      got['sizes'][0]['num_parts'] + 1, 0]
  assert re.search(r'a.txt: [\d,]+ tokens, read in \d+ part', caplog.text)
  assert re.search(r'short.txt: \d+ tokens, read whole', caplog.text)
  # Answered later, shown first: as the files are given.
  shown = capsys.readouterr().out
  assert re.findall(r'^\S*\.txt$', shown, re.MULTILINE) == [
      f'{texts}/a.txt', f'{tmp_path}/short.txt']
  assert f'\n\n{tmp_path}/short.txt\n' in shown
  assert shown.index('came from:') < shown.index('short.txt')


@pytest.mark.parametrize('fields, message', [
    (dict(model=''), 'model is empty; set --ask.model=DIRECTORY'),
    (dict(documents=''), 'documents is empty; set --ask.documents='),
    (dict(question=('', ' ')), 'question is empty; set --ask.question='),
    (dict(model='/nowhere'), 'model=/nowhere holds no readable config.json'),
    (dict(mode='whole'), 'tokens do not fit into a window of 640 with a'),
    (dict(window=12), 'max_response_len=16 leaves no prompt in a window of'),
    (dict(window=120, mode='memory'), 'window of 120 tokens is too small'),
    (dict(window=-1), 'window=-1 must be'), (dict(seed=-1), 'seed=-1 must'),
    (dict(at_once=0), 'at_once=0 must be'),
])
def test_mistakes_are_told(texts, tmp_path, fields, message):
  with pytest.raises(types.UserError, match=message):
    if fields.get('documents') == '':
      config(texts, **fields)
      fields = dict(fields, documents=())
      asked = settings.AskConfig(
          model=MODEL, question='?', sampler=SAMPLER, **fields)
    else:
      asked = config(texts, **fields)
    job.run(asked, tmp_path, devices=jax.devices()[:1])


def test_the_window_is_the_models(tmp_path):
  asked = settings.AskConfig(sampler=SAMPLER)
  assert settings.window(asked, pathlib.Path(MODEL)) == 262_144
  assert settings.window(asked, tmp_path) == 32_768
  yarn = {'factor': 4.0, 'original_max_position_embeddings': 100}
  for content, want in (
      ({'max_position_embeddings': 100, 'rope_scaling': yarn}, 400),
      ({'max_position_embeddings': 100, 'rope_parameters': yarn}, 400),
      ({'max_position_embeddings': 100, 'rope_scaling': 'yarn'}, 100),
      ({'max_position_embeddings': 100, 'rope_scaling': None}, 100),
      ({'max_position_embeddings': None, 'rope_scaling': {
          'factor': 4.0, 'original_max_position_embeddings': None}}, 32_768)):
    (tmp_path / 'config.json').write_text(json.dumps(content))
    assert settings.window(asked, tmp_path) == want, content
  assert settings.window(
      settings.AskConfig(sampler=SAMPLER, window=7), tmp_path) == 7


def test_flags_of_ask_are_keys_of_its_config():
  rest, found = command_line.split_overrides([
      '--config=ask.py', '--ask.question', 'Who?', '--ask.question=a=b, c',
      '--noask.each_file', '--ask.show_memory'])
  assert rest == ['--config=ask.py']
  assert found == [
      ('ask.question', 'Who?'), ('ask.question', 'a=b, c'),
      ('ask.each_file', 'false'), ('ask.show_memory', 'true')]


def test_an_inquiry_inside_the_models_directory_is_found_again(
    texts, tmp_path, caplog):
  model = tmp_path / 'model'
  shutil.copytree(MODEL, model)
  asked = config(texts, documents='b.md', question='Who?', model=str(model))
  caplog.set_level('INFO')
  ask(model, asked)
  assert job.run(asked, model, devices=jax.devices()[:1]) == 0
  assert 'Answered before' in caplog.text
  # Another model is another inquiry.
  (model / 'README.md').write_text('Trained on.')
  caplog.clear()
  ask(model, asked)
  assert 'Answered before' not in caplog.text


@pytest.fixture(scope='module')
def runs(texts, tmp_path_factory):
  """Command lines, some of them killed; their folder and exit codes."""
  folder = tmp_path_factory.mktemp('runs')
  (folder / 'zero.txt').write_bytes(b'a\0')
  one = [
      '--config=configs/ask.py:tiny', f'--ask.model={MODEL}',
      f'--ask.documents={texts}/*', '--ask.memory.part_len=40',
      '--ask.memory.memory_len=24', '--ask.sampler.temperature=0.7',
      '--config.sampler.max_response_len=16', '--ask.mode=memory',
      *(f'--ask.question={question}' for question in QUESTIONS)]
  killed = [*one, f'--workdir={folder}/killed']
  attempts = [
      ([*one, f'--workdir={folder}/whole'], 0),
      (killed, 4), (killed, -11), (killed, 0), (killed, 0),
      ([*one, '--ask.documents=zero.txt'], 0),
      ([*one, '--ask.qestion=zero.txt'], 0),
      (['--config=configs/tiny.py', '--ask.seed=1'], 0),
      (killed, 'head')]
  (folder / 'configs').symlink_to(ROOT / 'configs')
  done = subprocess.run(
      [sys.executable, str(ROOT / 'tests' / 'ask' / 'driver.py')],
      input=json.dumps(attempts), cwd=folder, stdout=subprocess.PIPE,
      text=True, check=True, env=dict(
          os.environ, PYTHONPATH=str(ROOT),
          XLA_FLAGS='--xla_backend_optimization_level=0',
          JAX_COMPILATION_CACHE_DIR=str(folder / 'programs')))
  return folder, json.loads(done.stdout)


def output(folder, number, name='out'):
  return (folder / f'{number}.{name}').read_text()


def test_a_killed_inquiry_ends_as_if_it_had_not_been(runs):
  folder, codes = runs
  assert codes[:5] == [0, -9, -9, 0, 0]
  found = []
  for name in ('whole', 'killed'):
    [path] = (folder / name).glob(f'*/{saved.FILE}')
    found.append(json.loads(path.read_text()))
  assert 25 < found[0]['sizes'][0]['num_parts'] < 60
  assert found[0] == found[1]
  assert output(folder, 0) == output(folder, 3) != ''
  assert output(folder, 1) == output(folder, 2) == ''
  [began] = re.findall(r'reading: (\d+)/.* \(\d+%\)\n', output(
      folder, 3, 'err'))[:1]
  assert began == '10'


def test_a_finished_inquiry_is_shown_again(runs):
  folder, _ = runs
  assert output(folder, 4) == output(folder, 3)
  assert 'Answered before' in output(folder, 4, 'err')
  assert 'reading' not in output(folder, 4, 'err')


def test_who_reads_no_further_ends_it_without_a_word(runs):
  folder, codes = runs
  assert codes[8] == 141
  assert output(folder, 8, 'err').splitlines()[-1].startswith('Answered')


@pytest.mark.parametrize('number, message', [
    (5, 'zero.txt:1: holds a NUL byte, so the file is binary'),
    (6, 'config.qestion does not exist; the nearest valid key is '
        'config.question.'),
    (7, '--ask.seed does not go with job=recipe; use it with '
        '--config=configs/ask.py.')])
def test_a_mistake_is_one_line_and_exit_code_2(runs, number, message):
  folder, codes = runs
  assert codes[number] == 2
  last = output(folder, number, 'err').splitlines()[-1]
  assert last.startswith('longjax: error: ') and message in last
  assert 'Traceback' not in output(folder, number, 'err')


def test_a_model_may_split_questions_and_rules_do_where_it_fails(
    texts, tmp_path, monkeypatch):
  by_rules = ask(tmp_path, config(texts, mode='memory'))
  # The small model only writes what it was trained on.
  by_model = ask(tmp_path, config(texts, mode='memory', split='model'))

  def answers(saved_inquiry):
    return [reading['answer'] for reading in saved_inquiry['readings']]

  assert answers(by_model) == answers(by_rules)
  asked = []

  def read_split(response, question):
    asked.append((response, question))
    return question, 'Answer in capitals.'

  monkeypatch.setattr(query, 'read_split', read_split)
  changed = ask(tmp_path, config(texts, mode='memory', split='model', seed=1))
  assert [question for _, question in asked] == list(QUESTIONS)
  assert all(response for response, _ in asked)
  assert answers(changed) != answers(by_rules)

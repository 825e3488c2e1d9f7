"""Questions about the installed standard library."""

import collections
import functools
import importlib
import inspect
import json
import pathlib
import re
import subprocess
import sys

import pytest

from longjax import types
from longjax.data import documents
from longjax.synthesis import python_lookup

# Harmless to import, and rich in functions.
_SAFE = {'base64', 'textwrap', 'functools', 'inspect', 'logging', 'heapq',
         'bisect', 'calendar', 'shutil', 'string', 'statistics', 'copy',
         'tempfile', 'traceback', 'warnings', 'pprint', 'random', 'platform',
         'posixpath', 'gettext', 'locale', 'glob', 'dataclasses', 'typing',
         'subprocess', 'tokenize', 'mimetypes', 'contextlib', 'ast', 'gzip'}


@functools.cache
def lines(num=300, seed=0):
  return tuple(python_lookup.generate(num=num, seed=seed))


def test_two_hundred_and_more_different_questions_are_found():
  asked = {line['question'] for line in lines()}
  assert len(asked) == len(lines()) == 300
  forms = collections.Counter(question.split()[0] for question in asked)
  assert min(forms['Which'], forms['What']) > 100


def test_no_answer_is_so_common_that_guessing_pays():
  for num in (300, 600):
    counts = collections.Counter(
        line['answers'][0] for line in lines(num=num))
    assert counts.most_common(1)[0][1] < 50


def test_every_answer_is_unique_in_its_context():
  for line in lines():
    text = '\n'.join(d['text'] for d in line['documents'])
    name = re.findall(r'`(\w+)`', line['question'])[-1]
    assert len(re.findall(rf'^def {name}\(', text, re.MULTILINE)) == 1
    assert python_lookup.solve(line['documents'], line['question']) == {
        line['answers'][0]}
    titles = [d['title'] for d in line['documents']]
    assert len(set(titles)) == len(titles) >= 3
    assert sum(map(len, titles)) + len(text) < 1500


def test_answers_agree_with_the_running_interpreter():
  num_checked = 0
  for line in lines():
    asked = re.findall(r'`(\w+)`', line['question'])
    module = next(d['title'] for d in line['documents']
                  if re.search(rf'^def {asked[-1]}\(', d['text'], re.M))
    if module not in _SAFE:
      continue
    function = inspect.unwrap(
        getattr(importlib.import_module(module), asked[-1]))
    if line['question'].startswith('Which'):
      assert line['answers'] == [module]
    elif inspect.isfunction(function):
      default = inspect.signature(function).parameters[asked[0]].default
      assert str(default) == line['answers'][0]
    num_checked += 1
  assert num_checked > 30


def test_the_same_seed_gives_the_same_lines():
  assert lines.__wrapped__(num=20) == lines()[:20]
  assert lines.__wrapped__(num=20, seed=1) != lines()[:20]


def test_signatures_drop_annotations_and_long_lines():
  source = '''
def keep(a: int, *, width: float = 1.5) -> str:
  """First line.

  More.
  """
def twice(): pass
def twice(): pass
def _private(): pass
def long(''' + ', '.join(f'argument_{i}' for i in range(20)) + '''): pass
'''
  function, = python_lookup.functions_of('some', source)
  assert function.lines() == 'def keep(a, *, width=1.5)\nFirst line.'
  assert function.defaults == (('width', '1.5'),)


def test_the_command_writes_a_file_that_the_reader_accepts(tmp_path):
  path = tmp_path / 'new_folder' / 'lookup.jsonl'
  subprocess.run(
      [sys.executable, '-m', 'longjax.synthesis.python_lookup',
       f'--output={path}', '--num=200'], check=True,
      cwd=pathlib.Path(__file__).parents[2])
  examples = list(documents.read_jsonl(path))
  assert len({example.question for example in examples}) == 200
  assert [p.name for p in path.parent.iterdir()] == ['lookup.jsonl']
  for example in examples:
    span, = example.evidence
    quote = example.documents[span.document].text[span.start:span.end]
    assert quote.startswith('def ') and quote in example.reasoning
  assert examples[0].question == json.loads(
      path.read_text().splitlines()[0])['question']


def test_too_many_questions_and_unwritable_files_are_user_errors(tmp_path):
  with pytest.raises(types.UserError, match='num=1000000'):
    list(python_lookup.generate(num=10**6))
  (tmp_path / 'file').touch()
  with pytest.raises(types.UserError, match='x.jsonl cannot be written'):
    python_lookup.write(
        str(tmp_path / 'file' / 'x.jsonl'), num=1, seed=0,
        context_chars=100)

import itertools
import json

import pytest

from longjax import types
from longjax.data import documents

GOOD = dict(
    documents=['Plain text.', {'title': 'Report', 'text': 'Ada signed it.'}],
    question='Who signed?', answers='Ada', kind='qa')


def write(tmp_path, *lines, name='own.jsonl'):
  path = tmp_path / name
  path.write_text('\n'.join(
      line if isinstance(line, str) else json.dumps(line) for line in lines))
  return path


def test_a_minimal_line_becomes_an_example(tmp_path):
  example, = documents.read_jsonl(write(tmp_path, GOOD))
  assert example == types.TaskExample(
      id='own-1', task='reading', kind='qa',
      documents=(
          types.Document(title='', text='Plain text.'),
          types.Document(title='Report', text='Ada signed it.')),
      question='Who signed?', answers=('Ada',))


def test_a_full_line_becomes_an_example(tmp_path):
  example, = documents.read_jsonl(write(tmp_path, GOOD | dict(
      id='a', task='contracts', kind='qa', instruction='Be brief.',
      reasoning='It says so.', answers=['Ada', 'Ada L.'],
      evidence=['Ada signed', 'text'], hops=2, meta={'unit': 'km'})))
  assert (example.id, example.task, example.hops) == ('a', 'contracts', 2)
  assert example.answers == ('Ada', 'Ada L.')
  assert example.instruction == 'Be brief.'
  assert example.reasoning == 'It says so.'
  assert example.meta == {'unit': 'km'}
  assert [example.documents[s.document].text[s.start:s.end]
          for s in example.evidence] == ['Ada signed', 'text']


@pytest.mark.parametrize('kind, answers, task', [
    ('mc', ['B', 'Ada'], 'mc'),
    ('qa', 'Ada', 'reading'),
    ('numeric', '-1,234.5', 'numeric'),
    ('count', '3', 'numeric'),
    ('list', ['Ada', 'Bob'], 'reading'),
    ('mrcr', 'Dear Ada,\nhello', 'dialogue'),
])
def test_the_task_follows_from_the_kind(tmp_path, kind, answers, task):
  example, = documents.read_jsonl(
      write(tmp_path, GOOD | dict(kind=kind, answers=answers)))
  assert (example.kind, example.task) == (kind, task)


def test_blank_lines_byte_order_marks_and_carriage_returns_are_fine(tmp_path):
  path = tmp_path / 'own.jsonl'
  line = json.dumps(GOOD | dict(question='¿Quién?'), ensure_ascii=False)
  path.write_bytes(f'\ufeff{line}\r\n\r\n{line}\n\n'.encode())
  assert [e.id for e in documents.read_jsonl(path)] == ['own-1', 'own-3']


def without(field):
  return {k: v for k, v in GOOD.items() if k != field}


DEFECTS = {
    'bad JSON': ('{"question": ', r'\(line\): is not JSON'),
    'too deep': ('[' * 100_000, r'\(line\): is not JSON'),
    'not an object': ('[1]', r'\(line\): is a list'),
    'a number': ('NaN', r'\(line\): is the number nan'),
    'an endless number': ('9' * 5000, r'\(line\): is not JSON \(Exceeds'),
    'no documents': (without('documents'), 'documents: is missing'),
    'no question': (without('question'), 'question: is missing'),
    'no answers': (without('answers'), 'answers: is missing'),
    'no kind': (without('kind'), 'kind: is missing'),
    'unknown field': (
        GOOD | {'anwsers': 'x'}, "'anwsers': is unknown; .*'answers'"),
    'documents as text': (GOOD | dict(documents='x'), 'documents: is a str'),
    'empty documents': (GOOD | dict(documents=[]), 'documents: is an empty l'),
    'document of a number': (
        GOOD | dict(documents=['x', 3]), r'documents\[1\]: is the number 3'),
    'empty document': (
        GOOD | dict(documents=[' \n']), r'documents\[0\]: has no text'),
    'document without text': (
        GOOD | dict(documents=[{'title': 'a'}]), r'documents\[0\]: has the k'),
    'document with more': (
        GOOD | dict(documents=[{'text': 'a', 'url': 'b'}]),
        r"documents\[0\]: .*'url'"),
    'title null': (
        GOOD | dict(documents=[{'text': 'a', 'title': None}]),
        r'documents\[0\].title: is null'),
    'question list': (GOOD | dict(question=['x']), 'question: is a list'),
    'empty question': (GOOD | dict(question='  '), 'question: is empty'),
    'no accepted answer': (GOOD | dict(answers=[]), 'answers: is an empty l'),
    'empty answer': (GOOD | dict(answers=['a', '']), r'answers\[1\]: is empty'),
    'answer of a number': (GOOD | dict(answers=7), 'answers: is the number 7'),
    'answers of numbers': (
        GOOD | dict(answers=[True]), r'answers\[0\]: is true or false'),
    'answer of two lines': (
        GOOD | dict(answers='a\nb'), r"answers\[0\]: spans .*'mrcr'"),
    'wordy number': (
        GOOD | dict(kind='numeric', answers='seven'),
        r"answers\[0\]: 'seven' holds no number"),
    'letter missing': (
        GOOD | dict(kind='mc', answers=['Ada']),
        r"answers\[0\]: 'Ada' is not an option letter"),
    'unknown kind': (
        GOOD | dict(kind='numerical'),
        r"kind: 'numerical' is unknown; did you mean 'numeric'\?"),
    'kind null': (GOOD | dict(kind=None), 'kind: is null'),
    'empty task': (GOOD | dict(task=''), 'task: is empty'),
    'instruction list': (GOOD | dict(instruction=[]), 'instruction: is an emp'),
    'hops zero': (GOOD | dict(hops=0), 'hops: is the number 0'),
    'hops true': (GOOD | dict(hops=True), 'hops: is true or false'),
    'meta list': (GOOD | dict(meta=[1]), 'meta: is a list'),
    'meta of numbers': (
        GOOD | dict(meta={'a': 1}), r"meta\['a'\]: is the number 1"),
    'evidence text': (GOOD | dict(evidence='Ada'), 'evidence: is a string'),
    'evidence elsewhere': (
        GOOD | dict(evidence=['Bob']), r"evidence\[0\]: 'Bob' stands in no"),
    'evidence empty': (GOOD | dict(evidence=['']), r'evidence\[0\]: is empty'),
    'surrogate': (
        json.dumps(GOOD | dict(question='\ud83d')), 'question: holds half'),
}


@pytest.mark.parametrize('name', DEFECTS)
def test_a_defect_names_file_line_and_field(tmp_path, name):
  line, problem = DEFECTS[name]
  path = write(tmp_path, GOOD, '', line, GOOD)
  with pytest.raises(
      types.UserError, match=rf'own\.jsonl:3: field {problem}') as caught:
    list(documents.read_jsonl(path))
  assert '\n' not in str(caught.value)
  assert ';' in str(caught.value)


def test_a_repeated_id_names_both_lines(tmp_path):
  path = write(tmp_path, GOOD | dict(id='a'), GOOD, GOOD | dict(id='a'))
  with pytest.raises(
      types.UserError, match=r":3: field id: 'a' was used on line 1"):
    list(documents.read_jsonl(path))


@pytest.mark.parametrize('content', [b'', b'\n \n', b'\xef\xbb\xbf\n'])
def test_an_empty_file_is_refused(tmp_path, content):
  path = tmp_path / 'own.jsonl'
  path.write_bytes(content)
  with pytest.raises(types.UserError, match=r'own.jsonl:1: .*empty'):
    list(documents.read_jsonl(path))


def test_a_binary_file_is_refused(tmp_path):
  path = tmp_path / 'own.jsonl'
  path.write_bytes(b'\x1f\x8b\x08\x00\xff\xfe\x00\n')
  with pytest.raises(types.UserError, match=r'own.jsonl:1: .*not UTF-8'):
    list(documents.read_jsonl(path))


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
  with pytest.raises(types.UserError, match=r'no.jsonl: cannot be read'):
    list(documents.read_jsonl(tmp_path / 'no.jsonl'))
  with pytest.raises(types.UserError, match=r'cannot be read .*directory'):
    list(documents.read_jsonl(tmp_path))


def test_lines_are_read_one_at_a_time(tmp_path):
  examples = documents.read_jsonl(write(tmp_path, GOOD, '{"torn'))
  assert next(examples).id == 'own-1'
  with pytest.raises(types.UserError, match=r':2: field \(line\): is not JSON'):
    next(examples)


def make_ids(num):
  return [f'own-{i}' for i in range(num)]


def test_splits_share_nothing_and_leave_nothing_out():
  splits = documents.split_ids(make_ids(205), seed=0)
  assert {k: len(v) for k, v in splits.items()} == {
      'train': 164, 'validation': 20, 'test': 21}
  dealt = itertools.chain(*splits.values())
  assert sorted(dealt) == sorted(make_ids(205))


def test_splits_depend_on_the_ids_and_the_seed_alone():
  splits = documents.split_ids(make_ids(60), seed=3)
  assert documents.split_ids(iter(make_ids(60)[::-1]), seed=3) == splits
  assert documents.split_ids(make_ids(60), seed=4) != splits


@pytest.mark.parametrize('num', [3, 4, 5, 9])
def test_every_split_has_an_example(num):
  splits = documents.split_ids(make_ids(num), seed=1)
  assert all(splits.values())
  assert sum(map(len, splits.values())) == num


def test_impossible_splits_are_refused():
  with pytest.raises(types.UserError, match=r'2 examples cannot fill .*train'):
    documents.split_ids(make_ids(2), seed=0)
  for fractions in ({'a': 0.5}, {'a': 1.2, 'b': -0.2}, {}):
    with pytest.raises(types.UserError, match='add up to 1'):
      documents.split_ids(make_ids(9), seed=0, fractions=fractions)

import os

import hypothesis
import pytest
import tensorflow_datasets as tfds
from hypothesis import strategies as st

from longjax import types
from longjax.data import dataset


def make_example(i=0, **changes):
  fields = dict(
      id=f'example-{i}', task='multihop', kind='qa',
      documents=(
          types.Document(title='Log', text=f'Ship {i} left\nBergen. é😀\0'),
          types.Document(title='', text='x')),
      question='Where from?', instruction='Say it.',
      answers=('Bergen', 'the port of Bergen'),
      evidence=(types.Span(document=0, start=3, end=9),),
      reasoning='"left Bergen"', hops=2, meta={'unit': '', 'b': 'ü'})
  return types.TaskExample(**(fields | changes))


text = st.text(max_size=8)
any_example = st.builds(
    types.TaskExample,
    id=text, task=text, kind=text, question=text, instruction=text,
    reasoning=text,
    documents=st.lists(
        st.builds(types.Document, title=text, text=text), max_size=3
    ).map(tuple),
    answers=st.lists(text, max_size=3).map(tuple),
    evidence=st.lists(
        st.builds(types.Span, document=st.integers(0, 9),
                  start=st.integers(0, 2**40), end=st.integers(0, 2**40)),
        max_size=3).map(tuple),
    hops=st.integers(1, 9),
    meta=st.dictionaries(text, text, max_size=3))


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(examples=st.lists(any_example, min_size=1, max_size=12))
def test_what_is_written_is_read(tmp_path_factory, examples):
  directory = tmp_path_factory.mktemp('data') / 'set'
  dataset.write(directory, {'train': iter(examples)})
  assert list(dataset.read(directory, 'train')) == examples


def test_examples_are_read_at_random(tmp_path):
  examples = [make_example(i) for i in range(1300)]
  dataset.write(
      tmp_path / 'set', {'train': iter(examples), 'test': examples[:2]})
  got = dataset.read(tmp_path / 'set', 'train')
  assert len(got) == 1300
  for i in (1299, 0, 511, 512, -1):
    assert got[i] == examples[i]
  assert got[3:5] == examples[3:5]
  assert len(dataset.read(tmp_path / 'set', 'test')) == 2
  with pytest.raises(IndexError):
    got[1300]
  assert dataset.split_names(tmp_path / 'set') == ['test', 'train']


def test_examples_are_chosen_by_split_and_id_in_the_order_asked(tmp_path):
  splits = {
      name: [make_example(i, task=name) for i in range(4)] for name in 'ab'}
  dataset.write(tmp_path / 'set', splits)
  got = dataset.of_ids(
      {name: dataset.read(tmp_path / 'set', name) for name in splits},
      [('b', 'example-3'), ('a', 'example-0'), ('b', 'example-0')])
  want = [splits['b'][3], splits['a'][0], splits['b'][0]]
  assert list(got) == got[:] == want
  assert (got[-1], got[1:], len(got)) == (want[-1], want[1:], 3)
  with pytest.raises(IndexError):
    got[3]


def test_examples_are_chosen_by_task_and_read_when_asked_for(tmp_path):
  examples = [make_example(i, task='abc'[i % 3]) for i in range(9)]
  assert dataset.of_tasks(examples, ()) is examples
  got = dataset.of_tasks(examples, ('c', 'a'))
  assert list(got) == [e for e in examples if e.task != 'b']
  examples[2] = make_example(99)
  assert got[1].id == 'example-99'
  with pytest.raises(
      types.UserError, match='no examples of d, only of a, b, c'):
    dataset.of_tasks(examples[:2] + examples[3:], ('a', 'd'))


def test_any_tfds_program_reads_the_data_set(tmp_path):
  dataset.write(tmp_path / 'set', {'train': [make_example()]}, name='harbour')
  source = tfds.data_source(
      'harbour', data_dir=tmp_path / 'set', split='train')
  assert source[0]['question'] == b'Where from?'
  assert list(source[0]['answers']) == [b'Bergen', b'the port of Bergen']
  files = {p.name for p in (tmp_path / 'set' / 'harbour' / '1.0.0').iterdir()}
  assert files == {
      'dataset_info.json', 'features.json',
      'harbour-train.array_record-00000'}


def test_equal_examples_give_equal_files(tmp_path):
  for d in 'ab':
    dataset.write(tmp_path / d, {'train': [make_example(i) for i in range(9)]})
  a, b = ({p.relative_to(tmp_path / d): p.read_bytes()
           for p in (tmp_path / d).rglob('*') if p.is_file()} for d in 'ab')
  assert a == b


def test_an_interrupted_write_leaves_nothing_to_read(tmp_path):
  def interrupted():
    yield make_example()
    raise KeyboardInterrupt

  path = tmp_path / 'set'
  with pytest.raises(KeyboardInterrupt):
    dataset.write(path, {'train': interrupted()})
  assert not path.exists()
  assert not dataset.is_complete(path)
  dataset.write(path, {'train': [make_example(1)]})
  assert dataset.is_complete(path)
  assert list(dataset.read(path, 'train')) == [make_example(1)]
  assert os.listdir(tmp_path) == ['set']


def test_a_data_set_is_not_overwritten(tmp_path):
  dataset.write(tmp_path / 'set', {'train': [make_example()]})
  with pytest.raises(types.UserError, match='exists already; delete it'):
    dataset.write(tmp_path / 'set', {'train': [make_example(1)]})
  assert dataset.read(tmp_path / 'set', 'train')[0].id == 'example-0'


def test_an_empty_split_is_refused(tmp_path):
  with pytest.raises(types.UserError, match=r"split 'test' .* no examples"):
    dataset.write(
        tmp_path / 'set', {'train': [make_example()], 'test': iter(())})
  assert not (tmp_path / 'set').exists()


@pytest.mark.parametrize('split', ['all', 'a b', 'a+b', 'a[', 'a.b', ''])
def test_a_split_that_could_not_be_read_back_is_refused(tmp_path, split):
  with pytest.raises(types.UserError, match='cannot be named'):
    dataset.write(tmp_path / 'set', {split: [make_example()]})
  assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_reported(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(types.UserError, match='set cannot be written'):
    dataset.write(tmp_path / 'file' / 'set', {'train': [make_example()]})


def test_a_missing_split_names_those_there_are(tmp_path):
  dataset.write(
      tmp_path / 'set', {'train': [make_example()], 'test': [make_example()]})
  with pytest.raises(
      types.UserError, match="no split 'validation'; it has test, train"):
    dataset.read(tmp_path / 'set', 'validation')


def test_a_missing_directory_is_named(tmp_path):
  with pytest.raises(types.UserError, match='nowhere holds no data set'):
    dataset.read(tmp_path / 'nowhere', 'train')
  assert not dataset.is_complete(tmp_path / 'nowhere')


@pytest.mark.parametrize('name, keep', [
    ('longjax_examples-train.array_record-00000', 0.5),
    ('longjax_examples-train.array_record-00000', 0.0),
    ('dataset_info.json', 0.5),
    ('features.json', 0.5),
])
def test_damage_is_reported(tmp_path, name, keep):
  path = tmp_path / 'set'
  dataset.write(path, {'train': [make_example(i) for i in range(50)]})
  file = path / 'longjax_examples' / '1.0.0' / name
  content = file.read_bytes()
  file.write_bytes(content[:int(len(content) * keep)])
  with pytest.raises(types.UserError, match='damaged; delete the directory'):
    list(dataset.read(path, 'train'))


def test_a_full_disk_is_reported_and_freed(tmp_path, monkeypatch):
  def full(self, examples):
    raise RuntimeError('write() failed: No space left on device\nat byte 9')

  monkeypatch.setattr(tfds.core.SequentialWriter, 'add_examples', full)
  with pytest.raises(types.UserError, match='No space left on device') as e:
    dataset.write(tmp_path / 'set', {'train': [make_example()]})
  assert '\n' not in str(e.value)
  assert os.listdir(tmp_path) == []


def test_an_error_of_the_generator_is_not_taken_for_a_full_disk(tmp_path):
  def broken():
    yield make_example()
    raise RuntimeError('a bug in synthesis')

  with pytest.raises(RuntimeError, match='a bug in synthesis'):
    dataset.write(tmp_path / 'set', {'train': broken()})

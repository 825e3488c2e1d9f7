import errno
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longjax import types
from longjax.data import records


def test_what_is_appended_is_read_back_bit_for_bit(tmp_path):
  path = tmp_path / 'deep' / 'a.jsonl'
  values = [0.1 + 0.2, 1e-320, -0.0, 2**0.5, math.inf, 'line\n\u2028\ud800']
  appender = records.Appender(path)
  appender.append({'values': values})
  appender.append({'values': [math.nan]})
  appender.close()
  first, second = records.read(path)
  assert repr(first['values']) == repr(values)
  assert math.isnan(second['values'][0])


def test_a_missing_file_holds_no_records(tmp_path):
  assert records.read(tmp_path / 'none.jsonl') == []
  records.truncate(tmp_path / 'none.jsonl', step=3)


@given(cut=st.integers(0, 60), text=st.text(max_size=20))
def test_a_file_cut_at_any_byte_keeps_its_whole_lines(
    tmp_path_factory, cut, text
):
  path = tmp_path_factory.mktemp('cut') / 'a.jsonl'
  whole = [{'step': i, 'text': text} for i in range(3)]
  appender = records.Appender(path)
  for record in whole:
    appender.append(record)
  appender.close()
  content = path.read_bytes()
  cut = min(cut, len(content))
  path.write_bytes(content[:len(content) - cut])
  num_whole = content[:len(content) - cut].count(b'\n')
  assert records.read(path) == whole[:num_whole]
  # A writer that continues does not glue its record to the torn one.
  appender = records.Appender(path)
  appender.append({'step': 9})
  appender.close()
  assert records.read(path) == [*whole[:num_whole], {'step': 9}]


def test_a_torn_line_longer_than_the_search_window_is_dropped(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"step": 1}\n{"text": "' + b'x' * 200_000)
  records.Appender(path).close()
  assert path.read_bytes() == b'{"step": 1}\n'
  path.write_bytes(b'{"text": "' + b'x' * 200_000)
  records.Appender(path).close()
  assert path.read_bytes() == b''


def test_truncation_keeps_the_bytes_of_what_stays(tmp_path):
  path = tmp_path / 'a.jsonl'
  lines = [b'{"step":1,  "x":0.10}\n', b'{"step":2}\n', b'{"step":3}\n']
  path.write_bytes(b''.join(lines) + b'{"step":1, "torn')
  records.truncate(path, step=2)
  assert path.read_bytes() == b''.join(lines[:2])
  assert [p.name for p in tmp_path.iterdir()] == ['a.jsonl']


def test_a_kill_while_truncating_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"step": 1}\n{"step": 2}\n')

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(records.os, 'replace', killed)
  with pytest.raises(KeyboardInterrupt):
    records.truncate(path, step=1)
  assert [r['step'] for r in records.read(path)] == [1, 2]
  monkeypatch.undo()
  records.truncate(path, step=1)
  assert [r['step'] for r in records.read(path)] == [1]


@pytest.mark.parametrize('line', [b'{"a": ]', b'[1]', b'\x00\x00', b'\xff'])
def test_a_damaged_line_is_named(tmp_path, line):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"step": 1}\n' + line + b'\n')
  with pytest.raises(types.UserError, match=r'a\.jsonl:2 is damaged'):
    records.read(path)


class _FullDisk:
  """Accepts three bytes, then nothing."""

  def __init__(self, file):
    self._file = file
    self.fileno = file.fileno

  def write(self, line):
    self._file.write(line[:3])
    raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_full_disk_is_reported_and_harms_no_earlier_record(tmp_path):
  path = tmp_path / 'a.jsonl'
  appender = records.Appender(path)
  appender.append({'step': 1})
  appender._file = _FullDisk(appender._file)
  with pytest.raises(types.UserError, match='No space left') as caught:
    appender.append({'step': 2})
  assert '\n' not in str(caught.value)
  assert path.read_bytes() == b'{"step": 1}\n'


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
  path = tmp_path / 'a.json'
  records.write_text(path, json.dumps({'old': 1}))
  path.with_name('a.json.tmp').mkdir()  # The temporary name is taken.
  with pytest.raises(types.UserError, match=r'cannot write .*a\.json'):
    records.write_text(path, 'new')
  assert json.loads(path.read_text()) == {'old': 1}

"""Files are read line by line, and what is no text is told in one line."""

import errno
import io
import json
import os
import re

import pytest

from longjax import types
from longjax.ask import files


def texts(path):
  return [''.join(line.text for line in document.lines)
          for document in files.documents(path)]


def read_all(directory, name):
  """As the job does: find, then read to the end."""
  paths = files.find([str(directory / name)], field='documents')
  for _ in files.lines(paths):
    pass


@pytest.mark.parametrize('name', ['a.txt', 'a.md', 'a.py'])
def test_text_is_read_as_it_is_with_its_name_as_title(tmp_path, name):
  text = '# Ada\r\nnaïve 漢字\n\n  end'
  (tmp_path / name).write_bytes(b'\xef\xbb\xbf' + text.encode())
  [document] = files.whole([tmp_path / name])
  assert document == types.Document(title=name, text=text)
  got = [(line.text, line.number) for line in files.lines([tmp_path / name])]
  assert got == [
      (f'[{name}]\n', 1), ('# Ada\r\n', 1), ('naïve 漢字\n', 2), ('\n', 3),
      ('  end', 4), ('\n', 4)]


def test_jsonl_holds_documents_or_examples_of_a_run(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('\n'.join(map(json.dumps, [
      {'text': 'one\ntwo', 'title': 'T', 'more': 1},
      {'documents': ['three', {'title': 'U', 'text': 'four'}],
       'question': '?', 'answers': 'x', 'kind': 'qa'}])) + '\n\n')
  got = [(d.title, d.number) for d in files.documents(path)]
  assert got == [('T', 1), ('a.jsonl 2', 2), ('U', 2)]
  assert texts(path) == ['one\ntwo', 'three', 'four']
  assert {line.number for line in files.lines([path])} == {1, 2}


@pytest.mark.parametrize('line', [
    'x' * 100_000, 'ab ' * 40_000, '漢' * 30_000,
    ('y' * 8190 + '</memory>') * 5])
def test_a_long_line_is_cut_but_not_within_a_tag(tmp_path, line):
  (tmp_path / 'a.txt').write_text(f'{line}\nlast')
  pieces = [p for p in files.lines([tmp_path / 'a.txt']) if p.number == 1][1:]
  assert ''.join(p.text for p in pieces) == line + '\n'
  assert max(len(p.text) for p in pieces) <= 2 * 8192
  assert sum(p.text.count('</memory>') for p in pieces) == line.count('</m')


def test_a_long_line_of_json_text_is_cut_too(tmp_path):
  (tmp_path / 'a.jsonl').write_text(json.dumps({'text': 'word ' * 9000}))
  [document] = files.documents(tmp_path / 'a.jsonl')
  pieces = [line.text for line in document.lines]
  assert ''.join(pieces) == 'word ' * 9000 and len(pieces) > 4


MISTAKES = {
    'zeros.txt': (b'text\nmore\0', 'zeros.txt:2: holds a NUL byte'),
    'latin.txt': (b'caf\xe9 and on\n', 'latin.txt:1: byte 4 is not UTF-8'),
    'late.txt': (b'x\n' * 9000 + b'\xff', 'late.txt:9001: byte 18001 is not'),
    'cut.txt': ('漢'.encode()[:2], 'cut.txt:1: byte .* is not UTF-8'),
    'utf16.txt': ('text'.encode('utf-16'), 'utf16.txt:1: byte 1 is not UTF-8'),
    'image.png': (b'\x89PNG\r\n\x1a\n\0\0', 'image.png:1: byte 1 is not'),
    'bad.jsonl': (b'{"text": "a"}\n{oh', 'bad.jsonl:2: is not JSON'),
    'list.jsonl': (b'[1]\n', 'list.jsonl:1: holds no document'),
    'other.jsonl': (b'{"question": "?"}', 'other.jsonl:1: holds no document'),
    'none.jsonl': (b'{"documents": []}', 'none.jsonl:1: holds no document'),
    'blank.jsonl': (b'{"text": " "}', 'blank.jsonl:1: the document is empty'),
    'half.jsonl': (b'{"text": "\\ud800"}', 'half.jsonl:1: .* surrogate'),
    'odd.jsonl': (b'\xff', 'odd.jsonl:1: byte 1 of the line is not UTF-8'),
    'nothing.txt': (b'', 'nothing.txt: the file is empty'),
    'spaces.md': (b' \n\t\n', 'spaces.md: the file is empty'),
    'nothing.jsonl': (b'\n', 'nothing.jsonl: the file is empty'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_what_is_no_text_is_told_in_one_line(tmp_path, name):
  content, message = MISTAKES[name]
  (tmp_path / name).write_bytes(content)
  with pytest.raises(types.UserError, match=message) as caught:
    read_all(tmp_path, name)
  assert '\n' not in str(caught.value)
  assert re.search(r'; (save|convert|write|fill|name|leave)', str(caught.value))


@pytest.mark.parametrize('name, message', [
    ('no.txt', 'no.txt: cannot be read \\(No such file'),
    ('*.pdf', r'documents=.*\*.pdf matches no file in '),
    ('pipe', 'documents=.*pipe is no regular file'),
    ('folder', "documents=.*folder is a directory; name its files"),
])
def test_what_cannot_be_found_is_told(tmp_path, name, message):
  (tmp_path / 'folder').mkdir()
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(types.UserError, match=message):
    read_all(tmp_path, name)


def test_a_file_that_may_not_be_read_is_told(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('x')
  path.chmod(0)
  if os.access(path, os.R_OK):
    pytest.skip('root may read everything')
  with pytest.raises(types.UserError, match='Permission denied'):
    read_all(tmp_path, 'a.txt')


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl'])
def test_a_disk_that_fails_later_is_told(tmp_path, name, monkeypatch):
  class Failing(io.BytesIO):

    def readline(self, size=-1):
      raise OSError(errno.EIO, os.strerror(errno.EIO))

    read = readline

  monkeypatch.setattr('builtins.open', lambda *_: Failing())
  path = tmp_path / name
  for read in (lambda: read_all(tmp_path, name), lambda: texts(path)):
    with pytest.raises(types.UserError, match='cannot be read .Input/output'):
      read()


def test_names_that_are_no_text_or_steer_terminals_are_shown(tmp_path):
  path = tmp_path / 'a\x1b[2J\n漢.txt'
  path.write_text('x')
  [first, *_] = files.lines([path])
  assert first.text == '[a\ufffd[2J\ufffd漢.txt]\n'
  assert first.file == f'{tmp_path}/a\ufffd[2J\ufffd漢.txt'
  assert files.shown(os.fsdecode(b'caf\xe9 \x9b.txt')) == (
      'caf\ufffd \ufffd.txt')


def test_patterns_may_be_several_and_match_each_file_once(tmp_path):
  for name in ('b.txt', 'a.txt', 'c.md', 'd,e.txt'):
    (tmp_path / name).write_text('x')
  (tmp_path / 'empty.txt').write_text('')
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub' / 'f.py').write_text('x')

  def found(*patterns):
    return [p.relative_to(tmp_path).as_posix() for p in files.find(
        [','.join(f'{tmp_path}/{x}' for x in p.split(' ')) for p in patterns],
        field='documents')]

  assert found('*.txt') == ['a.txt', 'b.txt', 'd,e.txt']  # None is empty.
  assert found('b.txt *.txt', 'c.md') == ['b.txt', 'a.txt', 'd,e.txt', 'c.md']
  assert found('d,e.txt') == ['d,e.txt']
  assert found('**/*.py') == ['sub/f.py']
  with pytest.raises(types.UserError, match='names no file with text'):
    found('emp*.txt')

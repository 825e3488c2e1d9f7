"""Files as text, a line at a time: none is ever held as a whole.

  .jsonl     an object a line: {"text": .., "title": ..}, or an example of a
             run, whose documents are read (see `data.documents`)
  any other  UTF-8 text: .txt, .md, .py; its name is its title

In memory is a line at most, and of text without line breaks a few kilobytes.
"""

import codecs
import contextlib
import dataclasses
import glob
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from absl import logging

from longjax import types

# Longer lines of text are cut; a line of JSON has to be parsed as a whole.
_MAX_LINE_BYTES = 1 << 13
_MAX_JSON_BYTES = 1 << 26
# Where a line is cut no tag may begin: see `agents.memory`.
_MAX_TAG_CHARS = 64
_CONTROL = re.compile(r'[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """A line of a file, or a piece of a long one.

  Attributes:
    text: with its line break, if it ends there.
    file: its path, see `shown`.
    number: of the line in the file, from 1.
  """

  text: str
  file: str
  number: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """A document that can be read once.

  Attributes:
    title: shown above it in a prompt.
    file: the path of the one it is in, see `shown`.
    number: of the line of the file that it begins with.
    lines: its text.
  """

  title: str
  file: str
  number: int
  lines: Iterable[Line]


def find(patterns: Sequence[str], *, field: str) -> list[pathlib.Path]:
  """Files that patterns name, each once, those of a pattern in order.

  Empty files that are not named but matched are left out.

  Args:
    patterns: paths or globs ('**' is any folders); each may be several with
      commas between them.
    field: the flag, for messages.

  Raises:
    UserError: nothing is there, or it cannot be read as text.
  """
  found: dict[pathlib.Path, None] = {}
  for pattern in _separated(patterns):
    path = pathlib.Path(pattern).expanduser()
    is_named = path.exists() or not glob.has_magic(pattern)
    matches = [path] if is_named else sorted(
        p for p in map(pathlib.Path, glob.glob(str(path), recursive=True))
        if p.is_file())
    if not matches:
      raise types.UserError(
          f'{field}={pattern} matches no file in {pathlib.Path.cwd()}; check '
          "the pattern, for example 'texts/*.txt'.")
    for match in matches:
      if _is_empty(match, field) and not is_named:
        logging.warning('%s is empty and left out.', shown(match))
      else:
        found[match] = None
  if not found:
    raise types.UserError(
        f'{field}={",".join(patterns)} names no file with text; name one.')
  return list(found)


def shown(path: str | os.PathLike[str]) -> str:
  """A path as text; a name may have bytes that are none or steer terminals."""
  return _CONTROL.sub('\ufffd', os.fsencode(path).decode(errors='replace'))


def _separated(patterns: Sequence[str]) -> Iterator[str]:
  for pattern in patterns:
    if os.path.exists(os.path.expanduser(pattern)):  # Commas in its name.
      yield pattern
    else:
      yield from filter(None, map(str.strip, pattern.split(',')))


def _is_empty(path: pathlib.Path, field: str) -> bool:
  if path.is_dir():
    raise types.UserError(
        f'{field}={path} is a directory; name its files, for example '
        f"'{path}/*.txt'.")
  if path.exists() and not path.is_file():
    raise types.UserError(
        f'{field}={path} is no regular file, and documents are read twice; '
        'write its text to a file.')
  with _opened(path) as file:
    blocks = iter(lambda: file.read(_MAX_LINE_BYTES), b'')
    return all(block.isspace() for block in blocks)


def documents(path: pathlib.Path) -> Iterator[Document]:
  """The documents of a file; each is read before the next is asked for.

  Raises:
    UserError: a line is no text or, of .jsonl, no document; names it. The
      file is empty.
  """
  if path.suffix == '.jsonl':
    yield from _json_documents(path)
    return
  yield Document(title=shown(path.name), file=shown(path), number=1,
                 lines=_text_lines(path))


def lines(paths: Iterable[pathlib.Path]) -> Iterator[Line]:
  """All documents as they stand in a prompt, see `data.chat.document_text`."""
  for path in paths:
    for document in documents(path):
      file, number = document.file, document.number
      yield Line(text=f'[{document.title}]\n', file=file, number=number)
      for line in document.lines:
        yield line
        number = line.number
      yield Line(text='\n', file=file, number=number)


def whole(paths: Iterable[pathlib.Path]) -> tuple[types.Document, ...]:
  """Documents short enough to be held."""
  return tuple(
      types.Document(
          title=document.title, text=''.join(x.text for x in document.lines))
      for path in paths for document in documents(path))


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[BinaryIO]:
  try:
    with open(path, 'rb') as file:
      yield file
  except OSError as error:  # Of a disk or a network also later.
    raise types.UserError(
        f'{path}: cannot be read ({error.strerror}); name a file that is '
        'there and that you may read.') from error


def _text_lines(path: pathlib.Path) -> Iterator[Line]:
  """Lines of text, long ones in pieces."""
  number, waiting, has_text = 1, '', False
  for raw, text in _decoded(path):
    has_text = has_text or not text.isspace()
    waiting += text
    if raw.endswith(b'\n'):
      yield Line(text=waiting, file=shown(path), number=number)
      number, waiting = number + 1, ''
    elif len(raw) == _MAX_LINE_BYTES:
      end = _end_of_piece(waiting)
      if end:
        yield Line(text=waiting[:end], file=shown(path), number=number)
      waiting = waiting[end:]
  if waiting:
    yield Line(text=waiting, file=shown(path), number=number)
  if not has_text:
    raise types.UserError(
        f'{path}: the file is empty; fill it or leave it out.')


def _decoded(path: pathlib.Path) -> Iterator[tuple[bytes, str]]:
  """Lines as bytes, and the text that they complete."""
  decoder = codecs.getincrementaldecoder('utf-8-sig')()
  number, offset = 1, 0
  with _opened(path) as file:
    while True:
      try:
        raw = file.readline(_MAX_LINE_BYTES)
        text = decoder.decode(raw, final=not raw)
      except UnicodeDecodeError as error:
        raise types.UserError(
            f'{path}:{number}: byte {offset + error.start + 1} is not UTF-8 '
            'text; save the file as UTF-8, or leave it out if it is binary.'
        ) from error
      if '\0' in text:
        raise types.UserError(
            f'{path}:{number}: holds a NUL byte, so the file is binary; '
            'convert it to UTF-8 text or leave it out.')
      if not raw:
        return
      if text:
        yield raw, text
      number += raw.endswith(b'\n')
      offset += len(raw)


def _end_of_piece(text: str) -> int:
  """Where to cut a long line: after a space, or else in no tag."""
  earliest = max(len(text) - _MAX_TAG_CHARS, 0)
  space = text.rfind(' ', earliest)
  if space >= 0:
    return space + 1
  tag = text.rfind('<', earliest)
  return len(text) if tag < 0 else tag


def _json_documents(path: pathlib.Path) -> Iterator[Document]:
  is_empty = True
  name = shown(path.name)
  with _opened(path) as file:
    number = 0
    while raw := file.readline(_MAX_JSON_BYTES + 1):
      number += 1
      where = f'{path}:{number}'
      if len(raw) > _MAX_JSON_BYTES:
        raise types.UserError(
            f'{where}: the line has more than {_MAX_JSON_BYTES >> 20} MiB; '
            'write its text to a .txt file.')
      if number == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)
      if not raw.strip():
        continue
      for i, (title, text) in enumerate(_texts(raw, where), start=1):
        is_empty = False
        yield Document(
            title=title or f'{name} {number}' + (f'.{i}' if i > 1 else ''),
            file=shown(path), number=number,
            lines=_lines_of(text, shown(path), number))
  if is_empty:
    raise types.UserError(
        f'{path}: the file is empty; fill it or leave it out.')


def _texts(raw: bytes, where: str) -> Iterator[tuple[str, str]]:
  """Titles and texts of the object in a line."""
  try:
    value = json.loads(raw.decode())
  except UnicodeDecodeError as error:
    raise types.UserError(
        f'{where}: byte {error.start + 1} of the line is not UTF-8 text; save '
        'the file as UTF-8, or leave it out if it is binary.') from error
  except (ValueError, RecursionError) as error:
    raise types.UserError(
        f'{where}: is not JSON ({error}); write one JSON object per line.'
    ) from error
  given: list[Any] = []
  if isinstance(value, dict):
    several = value.get('documents')
    given = several if isinstance(several, list) else [value]
  for item in given or [None]:
    fields = {'text': item} if isinstance(item, str) else item
    fields = fields if isinstance(fields, dict) else {}
    title, text = fields.get('title', ''), fields.get('text')
    if not isinstance(title, str) or not isinstance(text, str):
      raise types.UserError(
          f'{where}: holds no document; write {{"text": "..."}} or '
          '{"documents": ["...", ...]} in each line.')
    if not text.strip():
      raise types.UserError(
          f'{where}: the document is empty; fill it or drop the line.')
    try:
      (title + text).encode()
    except UnicodeEncodeError as error:
      raise types.UserError(
          f'{where}: the text holds half a surrogate pair; write valid '
          'Unicode.') from error
    yield title, text


def _lines_of(text: str, file: str, number: int) -> Iterator[Line]:
  """Lines of a document that is in one line of a file."""
  for line in text.splitlines(keepends=True):
    while line:
      end = len(line)
      if end > _MAX_LINE_BYTES:
        end = _end_of_piece(line[:_MAX_LINE_BYTES]) or _MAX_LINE_BYTES
      yield Line(text=line[:end], file=file, number=number)
      line = line[end:]

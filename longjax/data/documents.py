"""A user's own examples: one JSON object per line.

  {"documents": ["text", {"title": "Report", "text": "..."}],
   "question": "Who signed?", "answers": "Ada", "kind": "qa"}

Required: `documents` (strings or {title, text}), `question`, `answers` (a
string or several accepted ones, the canonical first; 'list': one cell each;
'mc': the letter, then the option's text), `kind` (`KINDS`). Optional: `task`
(what batches are balanced over; follows from the kind), `instruction`,
`reasoning`, `evidence` (quotes from the documents), `id`, `hops`, and `meta`
(an object of strings). Every defect names file, line, field and remedy.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from longjax import config as config_lib
from longjax import types

# Rule that grades an answer -> the task it counts for, unless the line says.
_TASK_OF_KIND = {
    'mc': 'mc',
    'qa': 'reading',
    'numeric': 'numeric',
    'count': 'numeric',
    'list': 'reading',
    'mrcr': 'dialogue',
}
KINDS = tuple(_TASK_OF_KIND)

_REQUIRED = ('documents', 'question', 'answers', 'kind')
_OPTIONAL = (
    'task', 'instruction', 'reasoning', 'evidence', 'id', 'hops', 'meta')

DEFAULT_FRACTIONS: Mapping[str, float] = {
    'train': 0.8, 'validation': 0.1, 'test': 0.1}


class _FieldError(Exception):
  """A field of the line at hand is wrong."""

  def __init__(self, field: str, problem: str, remedy: str):
    super().__init__(f'field {field}: {problem}; {remedy}')


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[types.TaskExample]:
  """Reads and checks a file of examples, line by line; blank ones are skipped.

  Raises:
    UserError: 'FILE:LINE: field NAME: problem; remedy' at the first defect.
  """
  path = pathlib.Path(path)
  line_of_id: dict[str, int] = {}
  for number, line in enumerate(_lines(path), start=1):
    where = f'{path}:{number}'
    if number == 1:
      line = line.removeprefix(b'\xef\xbb\xbf')
    if not line.strip():
      continue
    try:
      fields = _parse(line)
      example = _to_example(fields, default_id=f'{path.stem}-{number}')
      if example.id in line_of_id:
        raise _FieldError(
            'id', f'{example.id!r} was used on line {line_of_id[example.id]}',
            'give every line its own, or none')
    except _FieldError as e:
      raise types.UserError(f'{where}: {e}.') from e
    line_of_id[example.id] = number
    yield example
  if not line_of_id:
    raise types.UserError(
        f'{path}:1: the file is empty; write one JSON object per line.')


def _lines(path: pathlib.Path) -> Iterator[bytes]:
  try:
    with open(path, 'rb') as file:
      yield from file
  except OSError as e:
    raise types.UserError(
        f'{path}: cannot be read ({e.strerror}); give a readable file with '
        'one JSON object per line.') from e


def _parse(line: bytes) -> dict[str, Any]:
  """The JSON object of a line, without odd fields."""
  try:
    text = line.decode()
  except UnicodeDecodeError as e:
    raise _FieldError(
        '(line)', f'byte {e.start + 1} is not UTF-8 text',
        'save the file as UTF-8; it may be binary or compressed') from e
  try:
    fields = json.loads(text)
  except (ValueError, RecursionError) as e:  # An integer may be too long.
    raise _FieldError(
        '(line)', f'is not JSON ({e})',
        'write one JSON object per line') from e
  if not isinstance(fields, dict):
    raise _FieldError(
        '(line)', f'is {_name(fields)}', 'write a JSON object, {...}')
  for field in fields:
    if field not in _REQUIRED + _OPTIONAL:
      near = config_lib.nearest(field, _REQUIRED + _OPTIONAL)
      raise _FieldError(
          repr(field), 'is unknown', f'did you mean {near!r}? Otherwise drop '
          'it or put it into meta')
  for field in _REQUIRED:
    if field not in fields:
      raise _FieldError(field, 'is missing', 'every line needs it')
  return fields


def _to_example(
    fields: Mapping[str, Any], *, default_id: str) -> types.TaskExample:
  kind = _text(fields, 'kind')
  if kind not in KINDS:
    raise _FieldError(
        'kind', f'{kind!r} is unknown',
        f'did you mean {config_lib.nearest(kind, KINDS)!r}? Known: '
        f'{", ".join(KINDS)}')
  documents = _documents(fields['documents'])
  answers = _answers(fields, kind)
  hops = fields.get('hops', 1)
  if type(hops) is not int or hops < 1:
    raise _FieldError('hops', f'is {_name(hops)}', 'give an integer >= 1')
  meta = fields.get('meta', {})
  if not isinstance(meta, dict):
    raise _FieldError('meta', f'is {_name(meta)}', 'give an object of strings')
  return types.TaskExample(
      id=_text(fields, 'id', default_id),
      task=_text(fields, 'task', _TASK_OF_KIND[kind]),
      kind=kind,
      documents=documents,
      question=_text(fields, 'question'),
      instruction=_text(fields, 'instruction', '', may_be_empty=True),
      answers=answers,
      evidence=_evidence(fields, documents),
      reasoning=_text(fields, 'reasoning', '', may_be_empty=True),
      hops=hops,
      meta={_string('meta', k): _string(f'meta[{k!r}]', v)
            for k, v in meta.items()},
  )


def _documents(value: Any) -> tuple[types.Document, ...]:
  if not isinstance(value, list) or not value:
    raise _FieldError(
        'documents', f'is {_name(value)}',
        'give a list of at least one text or {"title", "text"}')
  documents = []
  for i, item in enumerate(value):
    field = f'documents[{i}]'
    if isinstance(item, dict):
      unknown = sorted(set(item) - {'title', 'text'})
      if unknown or 'text' not in item:
        raise _FieldError(
            field, f'has the keys {sorted(item)}', 'use "title" and "text"')
      title, text = item.get('title', ''), item['text']
    else:
      title, text = '', item
    title = _string(f'{field}.title', title)
    text = _string(f'{field}.text' if isinstance(item, dict) else field, text)
    if not text.strip():
      raise _FieldError(field, 'has no text', 'drop it or fill it')
    documents.append(types.Document(title=title, text=text))
  return tuple(documents)


def _answers(fields: Mapping[str, Any], kind: str) -> tuple[str, ...]:
  value = fields['answers']
  answers = [value] if isinstance(value, str) else value
  if not isinstance(answers, list) or not answers:
    raise _FieldError(
        'answers', f'is {_name(value)}',
        'give a string or a list of at least one')
  for i, answer in enumerate(answers):
    if not _string(f'answers[{i}]', answer).strip():
      raise _FieldError(f'answers[{i}]', 'is empty', 'drop it or fill it')
    if kind != 'mrcr' and '\n' in answer.strip():
      raise _FieldError(
          f'answers[{i}]', 'spans several lines',
          'an answer is graded up to the end of its line; shorten it or use '
          "kind 'mrcr'")
    if kind in ('numeric', 'count') and not re.search('[0-9]', answer):
      raise _FieldError(
          f'answers[{i}]', f'{answer!r} holds no number',
          f"kind {kind!r} compares numbers; write one or use kind 'qa'")
  if kind == 'mc' and not re.fullmatch('[A-Z]', answers[0]):
    raise _FieldError(
        'answers[0]', f'{answers[0]!r} is not an option letter',
        "kind 'mc' wants the letter first, then the option's text")
  return tuple(answers)


def _evidence(
    fields: Mapping[str, Any], documents: Sequence[types.Document]
) -> tuple[types.Span, ...]:
  """Where the quotes stand, each at its first occurrence."""
  quotes = fields.get('evidence', [])
  if not isinstance(quotes, list):
    raise _FieldError(
        'evidence', f'is {_name(quotes)}', 'give a list of quotes')
  spans = []
  for i, quote in enumerate(quotes):
    field = f'evidence[{i}]'
    if not _string(field, quote):
      raise _FieldError(field, 'is empty', 'drop it or fill it')
    starts = [d.text.find(quote) for d in documents]
    found = [n for n, start in enumerate(starts) if start >= 0]
    if not found:
      raise _FieldError(
          field, f'{quote[:40]!r} stands in no document', 'quote verbatim')
    start = starts[found[0]]
    spans.append(types.Span(
        document=found[0], start=start, end=start + len(quote)))
  return tuple(spans)


def _text(
    fields: Mapping[str, Any], field: str, default: str = '', *,
    may_be_empty: bool = False) -> str:
  """A string field; `default` where the line leaves it out."""
  if field not in fields:
    return default
  value = _string(field, fields[field])
  if not may_be_empty and not value.strip():
    raise _FieldError(field, 'is empty', 'fill it')
  return value


def _string(field: str, value: Any) -> str:
  if not isinstance(value, str):
    raise _FieldError(field, f'is {_name(value)}', 'give a string')
  if re.search('[\ud800-\udfff]', value):
    raise _FieldError(
        field, 'holds half a surrogate pair', 'write valid Unicode')
  return value


def _name(value: Any) -> str:
  """What JSON value it is, for a message."""
  if value == [] and isinstance(value, list):
    return 'an empty list'
  names = {dict: 'an object', list: 'a list', str: 'a string',
           bool: 'true or false', type(None): 'null'}
  return names.get(type(value), f'the number {value}')


def split_ids(
    ids: Iterable[str],
    *,
    seed: int,
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
) -> dict[str, frozenset[str]]:
  """Deals examples out to splits, by their ids alone.

  Args:
    ids: of the examples, unique; their order changes nothing.
    seed: another seed deals differently.
    fractions: share of each split; they add up to 1.

  Returns:
    The ids of each split, at least one each.

  Raises:
    UserError: fractions that do not add up, or too few examples.
  """
  if min(fractions.values(), default=0) <= 0 or abs(
      sum(fractions.values()) - 1) > 1e-6:
    raise types.UserError(
        f'fractions={dict(fractions)} must be positive and add up to 1.')

  def rank(example_id: str) -> bytes:
    return hashlib.sha256(f'{seed}:{example_id}'.encode()).digest()

  ranked = sorted(ids, key=rank)
  if len(ranked) < len(fractions):
    raise types.UserError(
        f'{len(ranked)} examples cannot fill the splits '
        f'{", ".join(fractions)}; give at least {len(fractions)}.')
  result = {}
  start, share = 0, 0.0
  for number, (split, fraction) in enumerate(fractions.items(), start=1):
    share += fraction
    # Leaves one at least for each later split.
    most = len(ranked) - (len(fractions) - number)
    end = min(most, max(start + 1, round(share * len(ranked))))
    result[split] = frozenset(ranked[start:end])
    start = end
  return result

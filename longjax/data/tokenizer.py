"""The tokenizer of a model directory: read, trained or written.

Two kinds, told apart by the file that is there:

  tokenizer.model  SentencePiece, as `train` makes it; `sentencepiece_tokenizer`
  tokenizer.json   byte-level BPE of Qwen and others; `byte_level_tokenizer`

Where both are, tokenizer.model counts: only our own runs write one that can be
used, and what they trained knows its ids.
"""

import collections
import contextlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import sentencepiece

from longjax import types
from longjax.data import (
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    turns,
    utf8,
)

MODEL_FILE = 'tokenizer.model'
CONFIG_FILE = byte_level_tokenizer.CONFIG_FILE

# Control symbols, the unknown piece and 256 bytes are always there.
_NUM_RESERVED = len(sentencepiece_tokenizer.SPECIAL_TOKENS) + 1 + 256
# The trainer drops tabs' whole sentence and counts lengths in bytes.
_TRAINING_CHUNK_CHARS = 1 << 16


class Tokenizer(Protocol):
  """Encodes and decodes; immutable.

  Special tokens are asked for by name or through a template, and never arise
  from text: a document that spells out '<|im_end|>' cannot end a turn.

  Attributes:
    vocab_size: every id is in [0, vocab_size).
    pad_id: fills places that hold no token.
    stop_ids: each ends a response; the first is the end of a turn, which
      demonstrations end with.
    turns: what stands around a question and its answer.
  """

  vocab_size: int
  pad_id: int
  stop_ids: tuple[int, ...]
  turns: turns.TurnTemplate

  def ordinary_ids(self) -> np.ndarray:  # i32[...]
    """Ids that stand for text of their own, not for parts of characters."""

  def special(self, name: str) -> int:
    """Id of a special token; KeyError if there is none of that name."""

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; special tokens spelled out in it stay text.

    Raises:
      UserError: the text holds half a surrogate pair, which no Unicode
        encoding can store.
    """

  def encode_template(self, text: str) -> list[int]:
    """Ids of a string of `turns`: special tokens in it are themselves."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of ids; special tokens are written out.

    Bytes that form no character, and ids past the vocabulary (a model may
    have a padded embedding table), become U+FFFD.
    """


def load(directory: str | os.PathLike[str]) -> Tokenizer:
  """Reads the tokenizer of a model directory.

  Raises:
    UserError: there is none, or it is unreadable.
  """
  path = pathlib.Path(directory)
  try:
    if (path / MODEL_FILE).is_file():
      return sentencepiece_tokenizer.SentencePieceTokenizer(
          _read(path / MODEL_FILE))
    if (path / byte_level_tokenizer.JSON_FILE).is_file():
      return _load_byte_level(path)
  except types.UserError as e:
    raise types.UserError(f'{path}: {e}') from e
  raise types.UserError(
      f'no {MODEL_FILE} in {path} and no {byte_level_tokenizer.JSON_FILE} '
      'either; give a model directory that holds a tokenizer.')


def _load_byte_level(path: pathlib.Path) -> Tokenizer:
  """Reads tokenizer.json and, where they are, the files beside it."""
  configs = []
  for name in (CONFIG_FILE, byte_level_tokenizer.GENERATION_FILE):
    config: Any = {}
    if (path / name).is_file():
      try:
        config = json.loads(_read(path / name))
      except ValueError as e:
        raise types.UserError(
            f'{name} is no JSON ({e}); restore the file.') from e
    if not isinstance(config, dict):
      raise types.UserError(f'{name} holds no JSON object; restore the file.')
    configs.append(config)
  return byte_level_tokenizer.ByteLevelTokenizer(
      _read(path / byte_level_tokenizer.JSON_FILE),
      config=configs[0], generation_config=configs[1])


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as e:
    raise types.UserError(
        f'{path.name} cannot be read ({e.strerror}); check its permissions.'
    ) from e


def train(
    texts: Iterable[str],
    *,
    vocab_size: int,
    directory: str | os.PathLike[str],
) -> sentencepiece_tokenizer.SentencePieceTokenizer:
  """Trains a tokenizer and saves it; equal texts give equal bytes.

  Args:
    texts: the corpus, in an order that is part of the result.
    vocab_size: ids wanted, special tokens and 256 bytes included. A corpus
      too small to fill them gives fewer.
    directory: where to save.

  Returns:
    The tokenizer.

  Raises:
    UserError: `vocab_size` leaves no room for characters, or no text.
  """
  room = vocab_size - _NUM_RESERVED
  if room < 32:
    raise types.UserError(
        f'vocab_size={vocab_size} leaves {room} ids beside bytes and special '
        f'tokens; use at least {_NUM_RESERVED + 32}.')
  corpus = list(texts)
  counts = collections.Counter[str]()
  for text in corpus:
    counts.update(text)
  # Every character asks for an id of its own. If they would take more than
  # half of the room, the rarest are left to byte fallback.
  by_count = sorted(counts, key=lambda c: (-counts[c], c))
  alphabet = {c for c in by_count[:room // 2] if c not in '\t\0\u2581'}
  alphabet -= {c for c in alphabet if utf8.SURROGATE.match(c)}
  if not any(c.strip() for c in alphabet):
    raise types.UserError(
        'the tokenizer has no text to train on; give at least one document '
        'that is not empty.')
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.Train(
      sentence_iterator=_pieces_of(corpus, alphabet),
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      character_coverage=1.0,
      byte_fallback=True,
      split_digits=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      pad_id=0, pad_piece=turns.END_OF_TEXT,
      unk_id=1, unk_piece='<unk>',
      eos_id=2, eos_piece=turns.TURN_END,
      bos_id=-1,
      control_symbols=[turns.TURN_START, turns.THINK_START, turns.THINK_END],
      max_sentence_length=8 * _TRAINING_CHUNK_CHARS,
      input_sentence_size=0,
      shuffle_input_sentence=False,
      num_threads=1,
      minloglevel=2,
  )
  tokenizer = sentencepiece_tokenizer.SentencePieceTokenizer(model.getvalue())
  save(tokenizer, directory)
  return tokenizer


def _pieces_of(corpus: Sequence[str], alphabet: set[str]) -> Iterator[str]:
  """The corpus cut where a character outside the alphabet stands."""
  outside = re.compile(f'[^{re.escape("".join(sorted(alphabet)))}]+')
  for text in corpus:
    for part in outside.split(text):
      for start in range(0, len(part), _TRAINING_CHUNK_CHARS):
        yield part[start:start + _TRAINING_CHUNK_CHARS]


def save(
    tokenizer: sentencepiece_tokenizer.SentencePieceTokenizer,
    directory: str | os.PathLike[str],
) -> None:
  """Writes its two files; each appears complete or not at all.

  Raises:
    UserError: they cannot be written.
  """
  path = pathlib.Path(directory)
  config = {
      'tokenizer_class': 'LlamaTokenizer',
      'add_bos_token': False,
      'add_eos_token': False,
      'add_prefix_space': False,
      'clean_up_tokenization_spaces': False,
      'legacy': False,
      'bos_token': None,
      'eos_token': turns.TURN_END,
      'pad_token': turns.END_OF_TEXT,
      'additional_special_tokens': [
          turns.TURN_START, turns.THINK_START, turns.THINK_END],
  }
  _replace(path / MODEL_FILE, tokenizer.model_bytes)
  _replace(
      path / CONFIG_FILE, (json.dumps(config, indent=2) + '\n').encode())


def _replace(path: pathlib.Path, content: bytes) -> None:
  """Writes under a temporary name, then renames."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, 'wb') as f:
      f.write(content)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except OSError as e:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise types.UserError(
        f'{path} cannot be written ({e.strerror}); make room or choose '
        'another directory.') from e

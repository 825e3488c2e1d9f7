"""Text to token ids and back, exactly.

A SentencePiece BPE model with byte fallback and no normalisation: decoding
what was encoded gives the same string, whatever it holds. Special tokens are
control symbols: they are asked for by name (`special`) and never arise from
text, so a document that spells out '<|im_end|>' cannot end a turn.

The files lie in a Hugging Face model directory: `tokenizer.model` and
`tokenizer_config.json`.
"""

import collections
import contextlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

from longjax import types

END_OF_TEXT = '<|endoftext|>'
TURN_START = '<|im_start|>'
TURN_END = '<|im_end|>'
THINK_START = '<think>'
THINK_END = '</think>'
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, THINK_START, THINK_END)

MODEL_FILE = 'tokenizer.model'
CONFIG_FILE = 'tokenizer_config.json'

# SentencePiece writes a space as this character, so a genuine one would come
# back as a space; it is encoded by its bytes instead.
_SPACE_MARK = '\u2581'
_SURROGATE = re.compile('[\ud800-\udfff]')
# Control symbols, the unknown piece and 256 bytes are always there.
_NUM_RESERVED = len(SPECIAL_TOKENS) + 1 + 256
# The trainer drops tabs' whole sentence and counts lengths in bytes.
_TRAINING_CHUNK_CHARS = 1 << 16


class Tokenizer:
  """Encodes and decodes; immutable.

  Attributes:
    vocab_size: number of ids; every id is in [0, vocab_size).
    pad_id: fills places that hold no token ('<|endoftext|>').
    stop_id: ends a response ('<|im_end|>').
  """

  def __init__(self, model_bytes: bytes):
    """Makes a tokenizer from the content of a `tokenizer.model`.

    Raises:
      UserError: the bytes are no SentencePiece model, or one without the
        special tokens or byte pieces.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
      processor.LoadFromSerializedProto(model_bytes)
    except (RuntimeError, OSError) as e:
      raise types.UserError(
          f'{MODEL_FILE} is not a SentencePiece model ({len(model_bytes)} '
          'bytes, torn or of another kind); restore the file or train a new '
          'tokenizer.') from e
    self._model_bytes = model_bytes
    self._processor = processor
    self.vocab_size: int = processor.GetPieceSize()
    pieces = [processor.IdToPiece(i) for i in range(self.vocab_size)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    bytes_of = {f'<0x{b:02X}>': bytes([b]) for b in range(256)}
    self._special = {
        name: ids[name] for name in SPECIAL_TOKENS
        if name in ids and processor.IsControl(ids[name])
    }
    missing = [name for name in SPECIAL_TOKENS if name not in self._special]
    missing += [name for name in bytes_of if name not in ids][:1]
    if missing:
      raise types.UserError(
          f'{MODEL_FILE} lacks the pieces {missing}; use a tokenizer trained '
          'with byte fallback and these control symbols.')
    self._byte_ids = [ids[f'<0x{b:02X}>'] for b in range(256)]
    self._text_of_id = [
        bytes_of[piece] if processor.IsByte(i)
        else b'\xff' if processor.IsUnknown(i)
        else piece.encode() if processor.IsControl(i)
        else piece.replace(_SPACE_MARK, ' ').encode()
        for i, piece in enumerate(pieces)
    ]
    self.pad_id: int = self._special[END_OF_TEXT]
    self.stop_id: int = self._special[TURN_END]

  def ordinary_ids(self) -> np.ndarray:  # i32[...]
    """Ids that stand for text of their own: no control or byte pieces."""
    return np.asarray([
        i for i in range(self.vocab_size)
        if not self._processor.IsControl(i)
        and not self._processor.IsByte(i)
        and not self._processor.IsUnknown(i)], np.int32)

  def special(self, name: str) -> int:
    """Id of one of `SPECIAL_TOKENS`."""
    return self._special[name]

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; special tokens spelled out in it stay text.

    Raises:
      UserError: the text holds half a surrogate pair, which no Unicode
        encoding can store.
    """
    broken = _SURROGATE.search(text)
    if broken:
      raise types.UserError(
          f'text holds the lone surrogate {broken.group()!r} at character '
          f'{broken.start()}; repair or drop it where the text is read.')
    ids: list[int] = []
    for i, part in enumerate(text.split(_SPACE_MARK)):
      if i:
        ids.extend(self._byte_ids[b] for b in _SPACE_MARK.encode())
      if part:
        ids.extend(self._processor.EncodeAsIds(part))
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Text of ids; special tokens are written out.

    Bytes that form no character, and ids past the vocabulary (a model may
    have a padded embedding table), become U+FFFD.
    """
    parts = []
    for i in ids:
      if i < 0:
        raise ValueError(f'token id {i} is negative.')
      parts.append(
          self._text_of_id[i] if i < self.vocab_size else b'\xff')
    return b''.join(parts).decode('utf-8', errors='replace')

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes the two files; each appears complete or not at all.

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
        'eos_token': TURN_END,
        'pad_token': END_OF_TEXT,
        'additional_special_tokens': [TURN_START, THINK_START, THINK_END],
    }
    _replace(path / MODEL_FILE, self._model_bytes)
    _replace(
        path / CONFIG_FILE, (json.dumps(config, indent=2) + '\n').encode())


def load(directory: str | os.PathLike[str]) -> Tokenizer:
  """Reads the tokenizer of a model directory.

  Raises:
    UserError: there is none, or it is unreadable.
  """
  path = pathlib.Path(directory) / MODEL_FILE
  if not path.is_file():
    raise types.UserError(
        f'no {MODEL_FILE} in {path.parent}; give a model directory that '
        'holds a SentencePiece tokenizer.')
  try:
    return Tokenizer(path.read_bytes())
  except types.UserError as e:
    raise types.UserError(f'{path.parent}: {e}') from e
  except OSError as e:
    raise types.UserError(
        f'{path} cannot be read ({e.strerror}); check its permissions.'
    ) from e


def train(
    texts: Iterable[str],
    *,
    vocab_size: int,
    directory: str | os.PathLike[str],
) -> Tokenizer:
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
  alphabet -= {c for c in alphabet if _SURROGATE.match(c)}
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
      pad_id=0, pad_piece=END_OF_TEXT,
      unk_id=1, unk_piece='<unk>',
      eos_id=2, eos_piece=TURN_END,
      bos_id=-1,
      control_symbols=[TURN_START, THINK_START, THINK_END],
      max_sentence_length=8 * _TRAINING_CHUNK_CHARS,
      input_sentence_size=0,
      shuffle_input_sentence=False,
      num_threads=1,
      minloglevel=2,
  )
  tokenizer = Tokenizer(model.getvalue())
  tokenizer.save(directory)
  return tokenizer


def _pieces_of(corpus: Sequence[str], alphabet: set[str]) -> Iterator[str]:
  """The corpus cut where a character outside the alphabet stands."""
  outside = re.compile(f'[^{re.escape("".join(sorted(alphabet)))}]+')
  for text in corpus:
    for part in outside.split(text):
      for start in range(0, len(part), _TRAINING_CHUNK_CHARS):
        yield part[start:start + _TRAINING_CHUNK_CHARS]


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

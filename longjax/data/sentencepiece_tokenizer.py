"""Text to token ids and back through a SentencePiece model, exactly.

BPE with byte fallback and no normalisation: decoding what was encoded gives
the same string, whatever it holds. Special tokens are control symbols, which
never arise from text.
"""

from collections.abc import Iterable

import numpy as np
import sentencepiece

from longjax import types
from longjax.data import turns, utf8

SPECIAL_TOKENS = (
    turns.END_OF_TEXT, turns.TURN_START, turns.TURN_END, turns.THINK_START,
    turns.THINK_END)

# SentencePiece writes a space as this character, so a genuine one would come
# back as a space; it is encoded by its bytes instead.
_SPACE_MARK = '\u2581'


class SentencePieceTokenizer:
  """A `tokenizer.Tokenizer` with `turns.COMPACT`.

  Attributes:
    model_bytes: the content of its `tokenizer.model`.
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
          f'tokenizer.model is not a SentencePiece model ({len(model_bytes)} '
          'bytes, torn or of another kind); restore the file or train a new '
          'tokenizer.') from e
    self.model_bytes = model_bytes
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
          f'tokenizer.model lacks the pieces {missing}; use a tokenizer '
          'trained with byte fallback and these control symbols.')
    self._byte_ids = [ids[f'<0x{b:02X}>'] for b in range(256)]
    self._bytes_of_id = [
        bytes_of[piece] if processor.IsByte(i)
        else utf8.UNDECODABLE if processor.IsUnknown(i)
        else piece.encode() if processor.IsControl(i)
        else piece.replace(_SPACE_MARK, ' ').encode()
        for i, piece in enumerate(pieces)
    ]
    self.turns = turns.COMPACT
    self.pad_id: int = self._special[turns.END_OF_TEXT]
    self.stop_ids: tuple[int, ...] = (self._special[self.turns.stop],)

  def ordinary_ids(self) -> np.ndarray:  # i32[...]
    """See `tokenizer.Tokenizer`: no control or byte pieces."""
    return np.asarray([
        i for i in range(self.vocab_size)
        if not self._processor.IsControl(i)
        and not self._processor.IsByte(i)
        and not self._processor.IsUnknown(i)], np.int32)

  def special(self, name: str) -> int:
    """Id of one of `SPECIAL_TOKENS`."""
    return self._special[name]

  def encode(self, text: str) -> list[int]:
    """See `tokenizer.Tokenizer`."""
    utf8.check(text)
    ids: list[int] = []
    for i, part in enumerate(text.split(_SPACE_MARK)):
      if i:
        ids.extend(self._byte_ids[b] for b in _SPACE_MARK.encode())
      if part:
        ids.extend(self._processor.EncodeAsIds(part))
    return ids

  def encode_template(self, text: str) -> list[int]:
    """See `tokenizer.Tokenizer`."""
    return turns.encode(
        text, special=self._special, encode_text=self.encode)

  def decode(self, ids: Iterable[int]) -> str:
    """See `tokenizer.Tokenizer`."""
    return utf8.join(ids, self._bytes_of_id)

"""Text to token ids and back as a Hugging Face `tokenizer.json` says.

Byte-level BPE, as Qwen and its descendants have it: text is normalised (NFC
for Qwen), cut by a regular expression, and the bytes of each piece are merged.
Decoding what was encoded gives the normalised text.

Text never becomes a special token. The `tokenizers` library matches added
tokens anywhere in a text, and its `encode_special_tokens=True` spares only
those flagged "special", which Qwen3's '</think>' is not. So text is encoded by
a copy that has the model but no added tokens.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers

from longjax import types
from longjax.data import turns, utf8

JSON_FILE = 'tokenizer.json'
CONFIG_FILE = 'tokenizer_config.json'
GENERATION_FILE = 'generation_config.json'


def _byte_alphabet() -> dict[str, int]:
  """The printable character that stands for each byte in a vocabulary."""
  own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in own]
  return {chr(b): b for b in own} | {
      chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class ByteLevelTokenizer:
  """A `tokenizer.Tokenizer` with the turns its special tokens allow."""

  def __init__(
      self,
      tokenizer_json: bytes,
      *,
      config: Mapping[str, Any],
      generation_config: Mapping[str, Any],
  ):
    """Makes a tokenizer from the content of its files.

    Args:
      tokenizer_json: of tokenizer.json.
      config: of tokenizer_config.json; 'eos_token' and 'pad_token' are read.
      generation_config: of generation_config.json; 'eos_token_id' and
        'pad_token_id' are read.

    Raises:
      UserError: a file is damaged, of another kind of tokenizer, or names
        tokens that are not there.
    """
    whole = _parse(tokenizer_json)
    text_ids = whole.get_vocab(with_added_tokens=False)
    self._special = {
        token.content: i
        for i, token in whole.get_added_tokens_decoder().items()}
    self._plain = tokenizers.Tokenizer(whole.model)
    if whole.normalizer is not None:
      self._plain.normalizer = whole.normalizer
    self._plain.pre_tokenizer = whole.pre_tokenizer

    bytes_of = {i: _piece_bytes(piece) for piece, i in text_ids.items()}
    # Some files list special tokens among the pieces, too.
    self._ordinary = sorted(
        i for i in set(bytes_of) - set(self._special.values())
        if _is_text(bytes_of[i]))
    bytes_of |= {i: name.encode() for name, i in self._special.items()}
    self.vocab_size: int = max(bytes_of) + 1
    self._bytes_of_id = [
        bytes_of.get(i, utf8.UNDECODABLE) for i in range(self.vocab_size)]

    absent = [c for c in _BYTE_OF if c not in text_ids]
    if absent:
      raise types.UserError(
          f'{JSON_FILE} lacks the pieces of {len(absent)} bytes, {absent[0]!r} '
          'first; use a byte-level BPE tokenizer, as Qwen has.')
    byte_ids = {b: text_ids[c] for c, b in _BYTE_OF.items()}
    # A name among the pieces may be the outcome of merges; see `encode`.
    self._spelled = {
        i: [byte_ids[b] for b in name.encode()]
        for name, i in self._special.items() if name in text_ids}

    end = _token_name(config, 'eos_token')
    self.turns = turns.find(self._special, end_token=end)
    stop_ids = [self._special[self.turns.stop]]
    if end is not None:
      stop_ids.append(self._id(end, 'eos_token'))
    stop_ids += self._ids(generation_config, 'eos_token_id')
    self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stop_ids))
    pad = _token_name(config, 'pad_token')
    pad_ids = [] if pad is None else [self._id(pad, 'pad_token')]
    pad_ids += self._ids(generation_config, 'pad_token_id')
    self.pad_id: int = [*pad_ids, self.stop_ids[-1]][0]

  def ordinary_ids(self) -> np.ndarray:  # i32[...]
    """See `tokenizer.Tokenizer`: no special tokens or parts of characters."""
    return np.asarray(self._ordinary, np.int32)

  def special(self, name: str) -> int:
    """Id of an added token."""
    return self._special[name]

  def encode(self, text: str) -> list[int]:
    """See `tokenizer.Tokenizer`."""
    utf8.check(text)
    ids = self._plain.encode(text, add_special_tokens=False).ids
    if not self._spelled.keys().isdisjoint(ids):
      ids = [j for i in ids for j in self._spelled.get(i, (i,))]
    return ids

  def encode_template(self, text: str) -> list[int]:
    """See `tokenizer.Tokenizer`."""
    return turns.encode(
        text, special=self._special, encode_text=self.encode)

  def decode(self, ids: Iterable[int]) -> str:
    """See `tokenizer.Tokenizer`."""
    return utf8.join(ids, self._bytes_of_id)

  def _id(self, name: str, field: str) -> int:
    """Id of a token that tokenizer_config.json names."""
    if name not in self._special:
      raise types.UserError(
          f'{CONFIG_FILE}: {field}={name!r} is not among the added tokens of '
          f'{JSON_FILE}; take both files from one model, or correct the '
          'field.')
    return self._special[name]

  def _ids(self, config: Mapping[str, Any], field: str) -> list[int]:
    """An id, or a list of them, that generation_config.json names."""
    value = config.get(field)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
      if type(i) is not int or not 0 <= i < self.vocab_size:
        raise types.UserError(
            f'{GENERATION_FILE}: {field}={value!r} names no token of '
            f'{JSON_FILE}, whose ids are 0 to {self.vocab_size - 1}; take both '
            'files from one model, or correct the field.')
    return ids


def _parse(tokenizer_json: bytes) -> tokenizers.Tokenizer:
  """Reads tokenizer.json and checks that we understand it."""
  try:
    content = json.loads(tokenizer_json)
    whole = tokenizers.Tokenizer.from_buffer(tokenizer_json)
  except Exception as e:  # The library raises nothing more specific.
    raise types.UserError(
        f'{JSON_FILE} is not a Hugging Face tokenizer ({len(tokenizer_json)} '
        f'bytes, torn or of another kind: {e}); download it again.'
    ) from e
  splitter = content.get('pre_tokenizer') or {}
  steps = splitter.get('pretokenizers', [splitter])
  byte_level = [step for step in steps if step.get('type') == 'ByteLevel']
  kind = content['model'].get('type')
  if kind != 'BPE' or not byte_level:
    raise types.UserError(
        f'{JSON_FILE}: model.type={kind!r} with pre_tokenizer '
        f'{[step.get("type") for step in steps]} is not supported; use a '
        'byte-level BPE tokenizer, as Qwen has.')
  if byte_level[0].get('add_prefix_space'):
    raise types.UserError(
        f'{JSON_FILE}: pre_tokenizer add_prefix_space=true is not supported, '
        'it would put a space before every document; use false.')
  for token in content.get('added_tokens', []):
    # The library gives a token another id, without an error, if the one in
    # the file does not follow the ids before it.
    if whole.token_to_id(token['content']) != token['id']:
      raise types.UserError(
          f'{JSON_FILE}: added token {token["content"]!r} has id '
          f'{token["id"]}, but its place is '
          f'{whole.token_to_id(token["content"])}; restore the file.')
  return whole


def _piece_bytes(piece: str) -> bytes:
  """The bytes a piece of the vocabulary stands for."""
  if all(c in _BYTE_OF for c in piece):
    return bytes(_BYTE_OF[c] for c in piece)
  return piece.encode()


def _is_text(content: bytes) -> bool:
  """Whether bytes are whole characters."""
  return '\ufffd' not in content.decode('utf-8', errors='replace')


def _token_name(config: Mapping[str, Any], field: str) -> str | None:
  """A token's name, written as a string or with its properties."""
  value = config.get(field)
  name = value.get('content') if isinstance(value, dict) else value
  if name is not None and not isinstance(name, str):
    raise types.UserError(
        f'{CONFIG_FILE}: {field}={value!r} is no token; write its name.')
  return name

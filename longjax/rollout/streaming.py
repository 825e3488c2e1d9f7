"""Text of responses while they are being written."""

import dataclasses
from collections.abc import Iterable, Iterator

from longjax.data import tokenizer as tokenizer_lib
from longjax.rollout import engine

# What a tokenizer shows in place of half a character.
_HALF = '\ufffd'
# Tokens that wait, at most, for a character to be whole; it has four bytes at
# most, so that after three more tokens it is certain whether it will be.
_MOST_WAITING = 8
_MOST_MISSING = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPiece:
  """Some characters of a response.

  Attributes:
    prompt: index of the prompt.
    sample: number of the sample.
    text: '' only where a response ends without more text.
    is_last: whether the response ends here.
  """

  prompt: int
  sample: int
  text: str
  is_last: bool


def pieces(
    tokens: Iterable[engine.Token], tokenizer: tokenizer_lib.Tokenizer
) -> Iterator[TextPiece]:
  """Turns tokens into text, whole characters only.

  Args:
    tokens: of `Session.generate`.
    tokenizer: of the model.

  Yields:
    A piece as soon as its characters are certain, or certainly broken. Those of
    a response make up `engine.response_text`.
  """
  readers: dict[tuple[int, int], _Reader] = {}
  for token in tokens:
    sample = token.prompt, token.sample
    reader = readers.setdefault(sample, _Reader(tokenizer))
    text = '' if token.is_stop else reader.read(token.token)
    if token.is_last:
      text += reader.rest()
      del readers[sample]
    if text or token.is_last:
      yield TextPiece(
          prompt=token.prompt, sample=token.sample, text=text,
          is_last=token.is_last)


class _Reader:
  """Decodes one response token by token.

  A token's text may depend on the one before it (a leading space), and a
  character may take several tokens. So each time, the tokens shown last are
  decoded with those not yet shown, and what they add is new.
  """

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
    self._decode = tokenizer.decode
    self._shown: list[int] = []  # The last ones only.
    self._waiting: list[int] = []

  def read(self, token: int) -> str:
    """What is certain now."""
    self._waiting.append(token)
    text = self._new()
    if text and not text.endswith(_HALF):
      self._shown, self._waiting = self._waiting, []
      return text
    if len(self._waiting) < _MOST_WAITING:
      return ''
    return self._broken(text)

  def _broken(self, text: str) -> str:
    """What is certain of text that ends with half a character, as all before.

    Otherwise ever more tokens would be decoded again with each one.
    """
    latest = len(self._waiting) - _MOST_MISSING
    for end in range(latest, latest - _MOST_MISSING - 1, -1):
      begin = self._new(end)
      if text.startswith(begin):  # It ends within no character.
        self._shown, self._waiting = self._waiting[:end], self._waiting[end:]
        return begin
    return ''

  def rest(self) -> str:
    """What no token follows any more."""
    return self._new() if self._waiting else ''

  def _new(self, end: int | None = None) -> str:
    """What the first `end` waiting tokens add; None is all."""
    before = self._decode(self._shown)
    return self._decode([*self._shown, *self._waiting[:end]])[len(before):]

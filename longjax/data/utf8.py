"""Where text meets bytes: what cannot be encoded, what cannot be decoded."""

import re
from collections.abc import Iterable, Sequence

from longjax import types

SURROGATE = re.compile('[\ud800-\udfff]')
# No text holds this byte.
UNDECODABLE = b'\xff'


def check(text: str) -> None:
  """Refuses text that no Unicode encoding can store.

  Raises:
    UserError: it holds half a surrogate pair.
  """
  broken = SURROGATE.search(text)
  if broken:
    raise types.UserError(
        f'text holds the lone surrogate {broken.group()!r} at character '
        f'{broken.start()}; repair or drop it where the text is read.')


def join(ids: Iterable[int], bytes_of_id: Sequence[bytes]) -> str:
  """Text of ids.

  Args:
    ids: token ids.
    bytes_of_id: what each id of the vocabulary stands for.

  Returns:
    The text. Bytes that form no character, and ids past the vocabulary (a
    model may have a padded embedding table), become U+FFFD.
  """
  parts = []
  for i in ids:
    if i < 0:
      raise ValueError(f'token id {i} is negative.')
    parts.append(bytes_of_id[i] if i < len(bytes_of_id) else UNDECODABLE)
  return b''.join(parts).decode('utf-8', errors='replace')

"""The fields of a JSON file, taken one by one until none is left."""

from collections.abc import Mapping
from typing import Any, NoReturn

from longjax import types


class Fields:
  """The fields of a file that are not yet understood."""

  def __init__(self, content: Mapping[str, Any], path: object):
    self._left = dict(content)
    self.path = path

  def take_any(self, name: str, default: Any = None) -> Any:
    """A field's value, of any type."""
    return self._left.pop(name, default)

  def take(self, name: str, kind: type, default: Any = None) -> Any:
    """A field's value; an int may stand for a float."""
    value = self._left.pop(name, None)
    if value is None:
      value = default
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind:
      raise types.UserError(
          f'{self.path}: {name}={value!r} must be given, as '
          f'{kind.__name__}.')
    return value

  def take_optional(self, name: str, kind: type) -> Any:
    """A field's value; None if it is absent or null."""
    if self._left.get(name) is None:
      return self._left.pop(name, None)
    return self.take(name, kind)

  def take_table(self, name: str) -> 'Fields | None':
    """A field that holds fields; None if it is absent or null."""
    value = self._left.pop(name, None)
    if value is None:
      return None
    if not isinstance(value, dict):
      self.refuse(name, value, 'an object')
    return Fields(value, f'{self.path}: {name}')

  def drop(self, *names: str) -> None:
    """Leaves fields unread."""
    for name in names:
      self._left.pop(name, None)

  def refuse(self, name: str, value: Any, implemented: str) -> NoReturn:
    """Raises UserError for a value that the network does not implement."""
    raise types.UserError(
        f'{self.path}: {name}={value!r} is not supported, only '
        f'{implemented}.')

  def end(self) -> None:
    """Raises UserError if a field is left."""
    for name, value in self._left.items():
      shown = repr(value)
      shown = shown if len(shown) <= 60 else shown[:57] + '...'
      raise types.UserError(
          f'{self.path}: the field {name}={shown} is not understood; it may '
          'change what the network computes. Remove it if it does not.')

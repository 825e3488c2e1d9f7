"""Command-line overrides: `--config.rl.steps=50` sets one key by its path.

The config dataclass knows every key and its type, so keys that a config file
leaves at their default can be set too, and a wrong one is refused by name.
"""

import ast
import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any

from ml_collections import config_dict

from longjax import config as config_lib
from longjax import types


def apply(cls: type, config: Any, key: str, text: str) -> None:
  """Sets one dotted key of `config` from the text of a command line.

  Args:
    cls: the dataclass `config` is meant for; knows every key and type.
    config: an unlocked ConfigDict, changed in place. Holders that the config
      file leaves out are added.
    key: e.g. 'rl.steps', 'stages[0].lr' or 'stages.0.lr'.
    text: the value; Python literals, true, false and none, bare strings, and
      'a,b' for tuples.

  Raises:
    UserError: an unknown key or an ill-typed value.
  """
  parts = re.sub(r'\[(\w+)\]', r'.\1', key).split('.')
  field_type, holder = config_lib.member_of(cls, config), config
  for depth, part in enumerate(parts):
    inner = _child_type(field_type, holder, part)
    if inner is None:
      valid = list(_paths(cls, config))
      raise types.UserError(f'config.{key} does not exist; the nearest valid '
                            f'key is config.{config_lib.nearest(key, valid)}.')
    if depth < len(parts) - 1:
      holder = _descend(holder, part)
      field_type = config_lib.member_of(inner, holder)
    elif not isinstance(holder, config_lib.MAPPINGS):
      raise types.UserError(
          f'config.{key} cannot be replaced as a whole; set its keys one by '
          'one.')
    else:
      value = _from_text(inner, text, f'config.{key}')
      with config.ignore_type():
        holder[part] = value


def _child_type(field_type: Any, holder: Any, part: str) -> Any:
  """The type of key or index `part`; None if there is no such key."""
  args = typing.get_args(field_type)
  if dataclasses.is_dataclass(field_type):
    return typing.get_type_hints(field_type).get(part)
  if typing.get_origin(field_type) in config_lib.MAPPING_TYPES:
    return args[1]
  if typing.get_origin(field_type) in config_lib.SEQUENCE_TYPES:
    if part.isdecimal() and int(part) < len(holder or ()):
      return args[0] if args[-1] is Ellipsis else args[int(part)]
  return None


def _descend(holder: Any, part: str) -> Any:
  """The value under a key, added empty where it is absent or None."""
  if not isinstance(holder, config_lib.MAPPINGS):
    return holder[int(part)]
  if part not in holder or holder[part] is None:
    holder[part] = config_dict.ConfigDict()
  return holder[part]


def _paths(field_type: Any, value: Any) -> Iterator[str]:
  """Every dotted key below a type; `value` tells indices and mapping keys."""
  field_type = config_lib.member_of(field_type, value)
  children: dict[str, Any] = {}
  if dataclasses.is_dataclass(field_type):
    children = typing.get_type_hints(field_type)
  elif isinstance(value, config_lib.MAPPINGS):
    children = {k: _child_type(field_type, value, k) for k in value.keys()}
  elif isinstance(value, (tuple, list)):
    indices = map(str, range(len(value)))
    children = {i: _child_type(field_type, value, i) for i in indices}
  for name, child in children.items():
    yield name
    inner = None
    if isinstance(value, (tuple, list)):
      inner = value[int(name)]
    elif isinstance(value, config_lib.MAPPINGS) and name in value:
      inner = value[name]
    for path in _paths(child, inner):
      yield f'{name}.{path}'


def _from_text(field_type: Any, text: str, path: str) -> Any:
  """The value a command line's text means for a field of this type."""
  for value in (_literal(text), text, tuple(map(_literal, text.split(',')))):
    try:
      config_lib.convert(field_type, value, path)
      return value
    except types.UserError as error:
      if isinstance(value, dict):
        raise error  # It names the key inside that is wrong.
  raise config_lib.ill_typed(field_type, text, path)


def _literal(text: str) -> Any:
  """The Python literal that `text` spells, or `text`."""
  words = {'true': 'True', 'false': 'False', 'none': 'None'}
  try:
    return ast.literal_eval(words.get(text.lower(), text))
  except (SyntaxError, ValueError):
    return text

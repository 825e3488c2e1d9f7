"""Turns a `ConfigDict` into frozen dataclasses, and back into text.

`ConfigDict` is for command lines and `configs/*.py`; `build` is the door. The
dataclasses hold every default, every type and every check, so a key that a
config file leaves out can still be overridden, and a key that no dataclass
knows is refused by name.
"""

import collections.abc
import dataclasses
import difflib
import enum
import numbers
import types as python_types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from ml_collections import config_dict

from longjax import types

_T = TypeVar('_T')
# What counts as a mapping, and the origins of annotations for one, for a
# sequence and for a union.
MAPPINGS: tuple[Any, ...] = (collections.abc.Mapping, config_dict.ConfigDict)
MAPPING_TYPES = (dict, collections.abc.Mapping)
SEQUENCE_TYPES = (tuple, collections.abc.Sequence)
UNION_TYPES = (typing.Union, python_types.UnionType)
_SCALARS = {
    bool: 'true or false',
    int: 'an int',
    float: 'a float',
    str: 'a string',
    type(None): 'None',
}


def build(cls: type[_T], config: Any, path: str = '') -> _T:
  """Builds a dataclass, and those inside it, from nested mappings.

  A field may be a bool, int, float, str, Literal, Enum, dataclass, Optional or
  other union of these, a tuple of them, or a mapping from str. An int is
  accepted for a float, never a float for an int. In a union of dataclasses
  their Literal fields tell which one is meant.

  Args:
    cls: a dataclass.
    config: a ConfigDict or dict; or a `cls`, which is returned as it is.
    path: the dotted name of `config` in messages; '' at the root.

  Returns:
    A `cls`.

  Raises:
    UserError: an unknown or missing key, an ill-typed value, or a value that
      `__post_init__` refuses; one line naming the dotted key.
  """
  return convert(cls, config, path)


def nearest(key: str, valid: Iterable[str]) -> str:
  """The valid key most like `key`; '' if none is valid.

  Keys with the same last part come first: 'steps' is nearest to 'rl.steps'.
  """

  def likeness(candidate: str) -> tuple[float, float]:
    def ratio(a, b):
      return difflib.SequenceMatcher(None, a, b).ratio()

    last = ratio(key.rpartition('.')[2], candidate.rpartition('.')[2])
    return ratio(key, candidate) + last, -len(candidate)

  return max(valid, key=likeness, default='')


def resolved(config: Any) -> Any:
  """The plain dicts, lists and scalars of a built config, ready for JSON."""
  if dataclasses.is_dataclass(config):
    return {
        field.name: resolved(getattr(config, field.name))
        for field in dataclasses.fields(config)
    }
  if isinstance(config, MAPPINGS):
    return {str(key): resolved(value) for key, value in config.items()}
  if isinstance(config, (tuple, list)):
    return [resolved(value) for value in config]
  return config.value if isinstance(config, enum.Enum) else config


def flat(config: Any) -> dict[str, Any]:
  """Dotted key -> scalar, of a built config or of what `resolved` returned."""
  out: dict[str, Any] = {}

  def visit(value: Any, path: str):
    if isinstance(value, (dict, list)) and value:
      items = value.items() if isinstance(value, dict) else enumerate(value)
      for key, inner in items:
        visit(inner, join(path, key))
    else:
      out[path] = value

  visit(resolved(config), '')
  return out


def differences(old: Any, new: Any) -> list[str]:
  """Lines 'rl.steps: 10 -> 20' where two configs differ, built or resolved."""
  before, after = flat(old), flat(new)
  absent = '(absent)'
  return [
      f'{key}: {before.get(key, absent)!r} -> {after.get(key, absent)!r}'
      for key in sorted(before.keys() | after.keys())
      if before.get(key, absent) != after.get(key, absent)
  ]


def join(path: str, key: Any) -> str:
  """The dotted name of a key below `path`."""
  return f'{path}.{key}' if path else str(key)


def convert(field_type: Any, value: Any, path: str) -> Any:
  """`value` as a `field_type`; see `build` for what is accepted."""
  origin, args = typing.get_origin(field_type), typing.get_args(field_type)
  if field_type is Any:
    return value
  if dataclasses.is_dataclass(field_type):
    if isinstance(value, typing.cast(type, field_type)):
      return value
    if isinstance(value, MAPPINGS):
      return _convert_dataclass(field_type, value, path)
  elif origin in UNION_TYPES:
    return _convert_union(field_type, value, path)
  elif origin is typing.Literal:
    for allowed in args:
      if type(value) is type(allowed) and value == allowed:
        return allowed
  elif origin in SEQUENCE_TYPES or field_type is tuple:
    if isinstance(value, (tuple, list)):
      inner = args or (Any, ...)
      if inner[-1] is Ellipsis:
        inner = (inner[0],) * len(value)
      if len(inner) == len(value):
        return tuple(
            convert(t, v, join(path, i))
            for i, (t, v) in enumerate(zip(inner, value, strict=True)))
  elif origin in MAPPING_TYPES or field_type is dict:
    if isinstance(value, MAPPINGS):
      inner_type = args[1] if args else Any
      return {
          key: convert(inner_type, value[key], join(path, key))
          for key in value.keys()
      }
  elif isinstance(field_type, type) and issubclass(field_type, enum.Enum):
    for member in field_type:
      if value in (member, member.value, member.name, member.name.lower()):
        return member
  elif field_type is int and isinstance(value, numbers.Integral):
    if not isinstance(value, bool):
      return int(value)
  elif field_type is float and isinstance(value, numbers.Real):
    if not isinstance(value, bool):
      return float(value)
  elif field_type in _SCALARS and isinstance(value, field_type):
    return value
  raise ill_typed(field_type, value, path)


def _convert_dataclass(cls: Any, values: Any, path: str) -> Any:
  """Builds `cls` from a mapping."""
  hints = typing.get_type_hints(cls)
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  for key in values.keys():
    if key not in fields:
      near = nearest(join(path, key), [join(path, name) for name in fields])
      raise types.UserError(
          f'{join(path, key)} does not exist; the nearest valid key is '
          f'{near}.')
  for name, field in fields.items():
    if name not in values and (
        field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING):
      raise types.UserError(
          f'{join(path, name)} is missing; set it to '
          f'{_describe(hints[name])}.')
  kwargs = {
      key: convert(hints[key], values[key], join(path, key))
      for key in values.keys()
  }
  try:
    return cls(**kwargs)
  except ValueError as error:
    message = ' '.join(str(error).split())
    where = f'{path}: ' if path and path not in message else ''
    raise types.UserError(where + message) from error


def _convert_union(union: Any, value: Any, path: str) -> Any:
  """Builds the member of a union that fits `value`."""
  members = typing.get_args(union)
  if isinstance(value, MAPPINGS):
    chosen = member_of(union, value)
    if chosen is not union:
      return convert(chosen, value, path)
    num_holders = sum(map(dataclasses.is_dataclass, members))
    for name, allowed in _choices(members).items():
      tells_apart = num_holders > 1 and len(set(allowed)) == num_holders
      if name in value or tells_apart:
        choice = typing.Literal.__getitem__(allowed)
        convert(choice, value.get(name), join(path, name))
  # Exact types first: True is no int, and 1 in `float | int` stays an int.
  for member in sorted(members, key=lambda m: type(value) is not m):
    try:
      return convert(member, value, path)
    except types.UserError:
      continue
  raise ill_typed(union, value, path)


def member_of(field_type: Any, value: Any) -> Any:
  """The member of a union that holds keys and fits `value`'s Literal fields.

  Returns `field_type` itself if it is no union, or if no member or more than
  one would do.
  """
  if typing.get_origin(field_type) not in UNION_TYPES:
    return field_type

  def fits(member: Any) -> bool:
    return typing.get_origin(member) in MAPPING_TYPES or (
        dataclasses.is_dataclass(member)
        and all(
            name not in (value or {}) or value[name] in allowed
            for name, allowed in _choices([member]).items()))

  members = [m for m in typing.get_args(field_type) if fits(m)]
  return members[0] if len(members) == 1 else field_type


def _choices(members: Iterable[Any]) -> dict[str, tuple[Any, ...]]:
  """The values that the Literal fields of these dataclasses may have."""
  out: dict[str, tuple[Any, ...]] = {}
  for member in filter(dataclasses.is_dataclass, members):
    for name, hint in typing.get_type_hints(member).items():
      if typing.get_origin(hint) is typing.Literal:
        out[name] = out.get(name, ()) + typing.get_args(hint)
  return out


def _describe(field_type: Any) -> str:
  """What a field accepts, in words."""
  origin, args = typing.get_origin(field_type), typing.get_args(field_type)
  if field_type in _SCALARS:
    return _SCALARS[field_type]
  if origin in UNION_TYPES:
    return ' or '.join(map(_describe, args))
  if origin is typing.Literal:
    return 'one of ' + ', '.join(map(repr, args))
  if origin in SEQUENCE_TYPES:
    if args[-1] is Ellipsis:
      return f'a tuple, each {_describe(args[0])}'
    return f'a tuple of {len(args)}: ' + ', '.join(map(_describe, args))
  if origin in MAPPING_TYPES:
    return f'a mapping, each {_describe(args[1])}'
  if isinstance(field_type, type) and issubclass(field_type, enum.Enum):
    return 'one of ' + ', '.join(repr(m.value) for m in field_type)
  if dataclasses.is_dataclass(field_type):
    keys = ', '.join(f.name for f in dataclasses.fields(field_type))
    return f'a mapping with keys {keys}'
  return getattr(field_type, '__name__', str(field_type))


def ill_typed(field_type: Any, value: Any, path: str) -> types.UserError:
  """The error that names field, value and what was expected."""
  shown = repr(value)
  if len(shown) > 60:
    shown = shown[:57] + '...'
  return types.UserError(f'{path}={shown} should be {_describe(field_type)}.')


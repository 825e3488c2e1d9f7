"""The only table from logical axes to mesh axes.

Model code says what a dimension *is* ('batch', 'heads'); this file says where
it lives. Changing the shape of a pod changes this file and `mesh` only.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longjax import types

# A logical name to the mesh axes that split it, outermost first.
Table = Mapping[str, tuple[str, ...]]

# Rows and tokens are split over every axis but `tensor`; `embed`, the width of
# weights, over all of those within a replica, so that parameters and moments
# lie in pieces on all its devices and are gathered layer by layer. The residual
# stream's width is another name: its rows are split already.
TRAIN: Table = {
    'batch': ('data', 'fsdp', 'expert'),
    'seq': ('seq',),
    'activation_embed': (),
    'embed': ('fsdp', 'seq', 'expert'),
    'vocab': ('tensor',),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'ffn': ('tensor',),
    'experts': ('expert',),
    'expert_embed': ('fsdp', 'seq'),
    'layers': (),
}

# The sampler reads every weight once a token: gathering them each time would
# dominate, so they are gathered once and kept. `prefix` is the length of a
# prompt's keys and values.
PREFILL: Table = {
    **TRAIN, 'embed': (), 'expert_embed': (), 'prefix': ('seq',)}

# One token of each sample at a time: there is no sequence to split but that of
# the prompt, whose keys and values stay where prefill made them.
DECODE: Table = {**PREFILL, 'seq': ()}

# With prompts enough for the devices along `seq` too, each takes some for its
# own: else those devices would repeat one another's work and hold copies of
# the samples' keys and values.
BY_PROMPT: Table = {
    **DECODE, 'batch': (*TRAIN['batch'], 'seq'), 'prefix': ()}

# Names that stay whole where they do not divide: a model may have fewer key
# heads than `tensor` has devices, and they are small.
_WHOLE_IF_NEEDED = ('kv_heads',)


@dataclasses.dataclass(frozen=True)
class SamplerRules:
  """Where the sampler's programs keep things; lanes lie alike in both."""

  prefill: 'Rules'
  decode: 'Rules'


def for_sampler(rules: 'Rules', num_lanes: int) -> SamplerRules:
  """How to sample from so many prompts at once."""
  size = math.prod(rules.mesh.shape[a] for a in BY_PROMPT['batch'])
  prefill, decode = (
      (PREFILL, DECODE) if num_lanes % size else (BY_PROMPT, BY_PROMPT))
  return SamplerRules(
      prefill=Rules(rules.mesh, prefill), decode=Rules(rules.mesh, decode))


@dataclasses.dataclass(frozen=True)
class Rules:
  """A mesh and a table: where arrays with named dimensions live.

  Names are given one a dimension; None means not split.

  Attributes:
    mesh: the devices.
    table: logical name -> mesh axes.
  """

  mesh: Mesh
  table: Table = dataclasses.field(default_factory=lambda: TRAIN)

  def __hash__(self):
    return hash((self.mesh, tuple(sorted(self.table.items()))))

  def axes(self, logical: str | None) -> tuple[str, ...]:
    """Mesh axes that split a logical axis; () if it is not split."""
    if logical is None:
      return ()
    if logical not in self.table:
      raise ValueError(
          f'unknown logical axis {logical!r}; known: {sorted(self.table)}.')
    return self.table[logical]

  def split_axes(self, *logical: str | None) -> tuple[str, ...]:
    """Mesh axes of more than one device behind these names."""
    return tuple(
        axis for name in logical for axis in self.axes(name)
        if self.mesh.shape[axis] > 1)

  def size(self, logical: str | None) -> int:
    """Number of pieces a logical axis is split into."""
    return math.prod(self.mesh.shape[axis] for axis in self.axes(logical))

  def spec(self, *logical: str | None) -> PartitionSpec:
    """The partition of an array with these dimensions."""
    entries = []
    owner: dict[str, str | None] = {}
    for name in logical:
      axes = self.axes(name)
      for axis in axes:
        if axis in owner:
          raise ValueError(
              f'logical axes {owner[axis]!r} and {name!r} of one array both '
              f'map to mesh axis {axis!r}.')
        owner[axis] = name
      entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)

  def sharding(self, *logical: str | None) -> NamedSharding:
    """The sharding of an array with these dimensions."""
    return NamedSharding(self.mesh, self.spec(*logical))

  def fit(
      self, shape: tuple[int, ...], *logical: str | None
  ) -> tuple[str | None, ...]:
    """The names, None in place of one that may stay whole and must."""
    return tuple(
        None if axis in _WHOLE_IF_NEEDED and size % self.size(axis) else axis
        for size, axis in zip(shape, logical, strict=True))

  def check(
      self, name: str, shape: tuple[int, ...], *logical: str | None
  ) -> None:
    """Raises UserError unless every dimension divides evenly.

    Args:
      name: what the array is called in the message.
      shape: its shape.
      *logical: its dimensions' names.
    """
    if len(shape) != len(logical):
      raise ValueError(f'{name} {shape} has no {len(logical)} dimensions.')
    for i, axis in enumerate(logical):
      if shape[i] % self.size(axis):
        split = ' x '.join(
            f'{a}={self.mesh.shape[a]}' for a in self.axes(axis))
        raise types.UserError(
            f'{name}: dimension {i} ({axis}) of size {shape[i]} does not '
            f'divide over mesh {split}; use a multiple of {self.size(axis)} '
            'or a smaller mesh axis.')

  def constrain(self, x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins an intermediate array to its place, inside jit."""
    logical = self.fit(x.shape, *logical)
    self.check('an activation', x.shape, *logical)
    return jax.lax.with_sharding_constraint(x, self.sharding(*logical))

  def tree_shardings(self, logical_tree: Any, shapes: Any) -> Any:
    """Shardings of a whole parameter tree.

    Args:
      logical_tree: a tuple of logical names for each leaf.
      shapes: a tree of the same form whose leaves have a `shape`.

    Returns:
      A tree of NamedSharding.

    Raises:
      UserError: a dimension does not divide; names leaf, dimension and axis.
    """

    def one(path, logical, leaf):
      logical = self.fit(leaf.shape, *logical)
      self.check(jax.tree_util.keystr(path), leaf.shape, *logical)
      return self.sharding(*logical)

    return jax.tree_util.tree_map_with_path(
        one, logical_tree, shapes, is_leaf=lambda x: isinstance(x, tuple))

"""How parameters lie in Hugging Face's tensors: names, rows and columns.

A linear layer is stored as [outputs, inputs], for each layer and expert by
itself; ours are [inputs, outputs] with heads apart, layers and experts
stacked:

  q_proj [N*H, D]              -> query [L, D, N, H]
  o_proj [D, N*H]              -> output [L, N, H, D]
  experts.{expert}.up_proj [F, D] -> up [L, E, D, F]

L layers, E experts, D model, F ffn, N query heads, H head size.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from longjax.model import architecture, parameters

EMBEDDING = 'model.embed_tokens.weight'
HEAD = 'lm_head.weight'
_LAYER = 'model.layers.{layer}.'

# Parameter -> tensor, and which of a layer's (and expert's) dimensions make up
# its rows and its columns.
_Entry = tuple[str, tuple[int, ...], tuple[int, ...]]
_WHOLE: dict[str, _Entry] = {
    'embedding': (EMBEDDING, (0,), (1,)),
    'final_norm': ('model.norm.weight', (0,), ()),
    'head': (HEAD, (1,), (0,)),
}
_BY_LAYER: dict[str, _Entry] = {
    'attention_norm': ('input_layernorm.weight', (0,), ()),
    'query': ('self_attn.q_proj.weight', (1, 2), (0,)),
    'key': ('self_attn.k_proj.weight', (1, 2), (0,)),
    'value': ('self_attn.v_proj.weight', (1, 2), (0,)),
    'query_bias': ('self_attn.q_proj.bias', (0, 1), ()),
    'key_bias': ('self_attn.k_proj.bias', (0, 1), ()),
    'value_bias': ('self_attn.v_proj.bias', (0, 1), ()),
    'query_norm': ('self_attn.q_norm.weight', (0,), ()),
    'key_norm': ('self_attn.k_norm.weight', (0,), ()),
    'output': ('self_attn.o_proj.weight', (2,), (0, 1)),
    'ffn_norm': ('post_attention_layernorm.weight', (0,), ()),
    'router': ('mlp.gate.weight', (1,), (0,)),
    'gate': ('mlp.gate_proj.weight', (1,), (0,)),
    'up': ('mlp.up_proj.weight', (1,), (0,)),
    'down': ('mlp.down_proj.weight', (1,), (0,)),
}
_BY_EXPERT = ('gate', 'up', 'down')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Where one parameter is stored.

  Attributes:
    name: of its tensors, with {layer} and {expert} where it has several.
    shape: of the parameter.
    num_stacked: of its dimensions, the leading ones, have a tensor for every
      index: none, L, or L and E.
    rows: the other dimensions, counted without those, that make up rows.
    columns: likewise; none if the tensor is a vector.
  """

  name: str
  shape: tuple[int, ...]
  num_stacked: int
  rows: tuple[int, ...]
  columns: tuple[int, ...]

  @property
  def order(self) -> tuple[int, ...]:
    """The parameter's dimensions in the order they are stored."""
    n = self.num_stacked
    return (*range(n), *(n + d for d in (*self.rows, *self.columns)))

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Shape of each tensor."""
    sizes = self.shape[self.num_stacked:]
    return tuple(
        math.prod(sizes[d] for d in dims)
        for dims in (self.rows, self.columns) if dims)

  def tensor_name(self, index: tuple[int, ...]) -> str:
    """The tensor at an index of the stacked dimensions."""
    return self.name.format(**dict(zip(('layer', 'expert'), index)))

  def tensor_names(self, layer: int | None = None) -> list[str]:
    """All tensors in order, or those of one layer."""
    first: tuple[int, ...] = () if layer is None else (layer,)
    rest = self.shape[len(first):self.num_stacked]
    return [self.tensor_name(first + index) for index in np.ndindex(*rest)]


def layouts(config: architecture.ModelConfig) -> Any:
  """The parameter tree with a `Layout` for each parameter."""

  def one(path, leaf):
    name = path[-1].key
    if len(path) == 1:
      tensor, rows, columns = _WHOLE[name]
      num_stacked = 0
    else:
      tensor, rows, columns = _BY_LAYER[name]
      num_stacked = 1
      if config.moe and name in _BY_EXPERT:
        tensor = tensor.replace('mlp.', 'mlp.experts.{expert}.')
        num_stacked = 2
      tensor = _LAYER + tensor
    return Layout(name=tensor, shape=leaf.shape, num_stacked=num_stacked,
                  rows=rows, columns=columns)

  return jax.tree_util.tree_map_with_path(one, parameters.abstract(config))


def in_file_order(
    tree: Any,
) -> Iterator[tuple[tuple[str, ...], Layout, int | None]]:
  """(path, layout, layer) of everything in `layouts`, layer after layer."""
  yield ('embedding',), tree['embedding'], None
  for layer in range(tree['layers']['query'].shape[0]):
    for name, layout in tree['layers'].items():
      yield ('layers', name), layout, layer
  for name in ('final_norm', 'head'):
    if name in tree:
      yield (name,), tree[name], None


def blocks(
    sizes: tuple[int, ...], limit: int
) -> Iterator[tuple[tuple[int, int], ...]]:
  """Cuts an array into boxes of at most `limit` (or 1) elements, in order.

  Args:
    sizes: of the array.
    limit: elements of a box.

  Yields:
    First and last + 1 of each dimension.
  """
  if not sizes:
    yield ()
    return
  inner = math.prod(sizes[1:])
  if inner <= limit:
    step = limit // inner
    for first in range(0, sizes[0], step):
      yield ((first, min(first + step, sizes[0])),
             *((0, size) for size in sizes[1:]))
    return
  for i in range(sizes[0]):
    for rest in blocks(sizes[1:], limit):
      yield ((i, i + 1), *rest)

"""Supervised fine-tuning batches: examples become packed rows.

A Grain pipeline: shuffled anew each epoch, endless, deterministic from its
seed, with an iterator state that is saved in checkpoints (see `packing`).

Questions about the same documents may share one prefix (`rows.Group`): the
documents are then read once for all of them.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import grain
import numpy as np

from longjax import rows, types
from longjax.data import chat, packing, prompts
from longjax.data import tokenizer as tokenizer_lib

# Encoded (example, style) pairs remembered; small sets are encoded once.
_CACHE_SIZE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftDataConfig:
  """What a batch of demonstrations looks like.

  Attributes:
    num_rows: B, rows of a batch.
    row_len: T, tokens of a row.
    reasoning_fraction: share of demonstrations that think before answering;
      drawn anew each epoch.
    questions_per_context: most questions about the same documents that share
      them in a row, where they fit. Above 1, all examples are read and
      encoded once at the start.
    lookahead: most examples that wait for a row with room; more of them
      leave less padding.
    seed: of order and style.
  """

  num_rows: int
  row_len: int
  reasoning_fraction: float = 1.0
  questions_per_context: int = 1
  lookahead: int = 16
  seed: int = 0

  def __post_init__(self):
    for name in ('num_rows', 'row_len', 'questions_per_context', 'lookahead'):
      if getattr(self, name) < 1:
        raise types.UserError(
            f'{name}={getattr(self, name)} of the SFT data must be >= 1.')
    if not 0.0 <= self.reasoning_fraction <= 1.0:
      raise types.UserError(
          f'reasoning_fraction={self.reasoning_fraction} must be in [0, 1].')
    if not 0 <= self.seed < 2**32:
      raise types.UserError(
          f'seed={self.seed} of the SFT data must be in [0, 2**32).')


def sft_batches(
    examples: Sequence[types.TaskExample],
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    config: SftDataConfig,
) -> grain.IterDataset:
  """Endless batches of demonstrations; loss on responses only.

  Args:
    examples: random access to what is imitated.
    tokenizer: encodes.
    config: sizes and seed.

  Returns:
    A dataset of `rows.Rows` (NumPy, [num_rows, row_len]); see `packing`.

  Raises:
    UserError: no examples; while iterating, an example longer than a row.
  """
  if not len(examples):
    raise types.UserError(
        'SFT has no examples; check the split and the length limits.')

  encoder = _Encoder(examples, tokenizer)

  def group(indices: Sequence[int], rng: np.random.Generator) -> rows.Group:
    styles = rng.random(len(indices)) < config.reasoning_fraction
    result = encoder.group(indices, styles.tolist())
    if result.num_tokens > config.row_len:
      raise types.UserError(
          f'SFT example {examples[indices[0]].id!r} takes '
          f'{result.num_tokens} tokens, row_len={config.row_len}; raise '
          'row_len or use shorter examples.')
    return result

  if config.questions_per_context == 1:
    sources: Sequence[tuple[int, ...]] = [(i,) for i in range(len(examples))]
  else:
    sources = _share_contexts(
        examples, encoder, most=config.questions_per_context,
        row_len=config.row_len)
  groups = (
      grain.MapDataset.source(sources)
      .seed(config.seed)
      .shuffle()
      .repeat()
      .random_map(group)
  )
  return packing.pack_groups(
      groups, num_rows=config.num_rows, row_len=config.row_len,
      lookahead=config.lookahead)


class _Encoder:
  """Encodes examples by index and remembers the recent ones."""

  def __init__(
      self, examples: Sequence[types.TaskExample],
      tokenizer: tokenizer_lib.Tokenizer):
    self._examples = examples
    self._tokenizer = tokenizer
    self._context = functools.lru_cache(_CACHE_SIZE)(self._encode_context)
    self._branch = functools.lru_cache(_CACHE_SIZE)(self._encode_branch)

  def group(
      self, indices: Sequence[int], styles: Sequence[bool]) -> rows.Group:
    """Questions about the same documents, with the style of each answer."""
    context = self._context(indices[0])
    branches = [
        self._branch(i, s) for i, s in zip(indices, styles, strict=True)]
    if len(branches) == 1:
      question, response = branches[0]
      return rows.Group(
          prompt=context + question,
          branches=[rows.Branch(response=response, trajectory=0)])
    return rows.Group(prompt=context, branches=[
        rows.Branch(response=response, extra_prompt=question, trajectory=0)
        for question, response in branches])

  def _encode_context(self, i: int) -> list[int]:
    return chat.context_tokens(self._examples[i].documents, self._tokenizer)

  def _encode_branch(
      self, i: int, with_reasoning: bool) -> tuple[list[int], list[int]]:
    example = self._examples[i]
    return (
        chat.question_tokens(example, self._tokenizer),
        prompts.demonstration(
            example, self._tokenizer, with_reasoning=with_reasoning))


def _share_contexts(
    examples: Sequence[types.TaskExample], encoder: _Encoder, *, most: int,
    row_len: int,
) -> list[tuple[int, ...]]:
  """Indices of examples; those over the same documents stand together.

  A group has at most `most` of them and fits into a row in either style
  (reasoning is assumed to be the longer one).
  """
  groups: list[list[int]] = []
  open_group: dict[bytes, list[int]] = {}
  for i, example in enumerate(examples):
    text = repr([(d.title, d.text) for d in example.documents])
    key = hashlib.sha256(text.encode()).digest()
    wider = [*open_group.get(key, []), i]
    fits = (
        len(wider) <= most
        and encoder.group(wider, [True] * len(wider)).num_tokens <= row_len
    )
    if len(wider) > 1 and fits:
      open_group[key].append(i)
    else:
      open_group[key] = [i]
      groups.append(open_group[key])
  return [tuple(g) for g in groups]

"""Supervised fine-tuning batches: examples become packed rows.

A Grain pipeline: shuffled anew each epoch, endless, deterministic from its
seed, with an iterator state that is saved in checkpoints (see `packing`).
"""

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np

from longjax import rows, types
from longjax.data import chat, packing, prompts
from longjax.data import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftDataConfig:
  """What a batch of demonstrations looks like.

  Attributes:
    num_rows: B, rows of a batch.
    row_len: T, tokens of a row.
    reasoning_fraction: share of demonstrations that think before answering;
      drawn anew each epoch.
    lookahead: most examples that wait for a row with room; more of them
      leave less padding.
    seed: of order and style.
  """

  num_rows: int
  row_len: int
  reasoning_fraction: float = 1.0
  lookahead: int = 16
  seed: int = 0

  def __post_init__(self):
    for name in ('num_rows', 'row_len', 'lookahead'):
      if getattr(self, name) < 1:
        raise types.UserError(
            f'{name}={getattr(self, name)} of the SFT data must be >= 1.')
    if not 0.0 <= self.reasoning_fraction <= 1.0:
      raise types.UserError(
          f'reasoning_fraction={self.reasoning_fraction} must be in [0, 1].')
    if not 0 <= self.seed < 2**32:
      raise types.UserError(
          f'seed={self.seed} of the SFT data must be in [0, 2**32).')


# Makes of an example what is asked and what is imitated, token ids each.
Demonstrate = Callable[
    [types.TaskExample, np.random.Generator], tuple[list[int], list[int]]]


def answer(
    example: types.TaskExample,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    with_reasoning: bool,
) -> tuple[list[int], list[int]]:
  """An example's prompt and its response; see `prompts.demonstration`."""
  return chat.render_prompt(example, tokenizer), prompts.demonstration(
      example, tokenizer, with_reasoning=with_reasoning)


def sft_batches(
    examples: Sequence[types.TaskExample],
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    config: SftDataConfig,
    demonstrate: Demonstrate | None = None,
) -> grain.IterDataset:
  """Endless batches of demonstrations; loss on responses only.

  Args:
    examples: random access to what is imitated.
    tokenizer: encodes.
    config: sizes and seed.
    demonstrate: None answers the example's prompt.

  Returns:
    A dataset of `rows.Rows` (NumPy, [num_rows, row_len]); see `packing`.

  Raises:
    UserError: no examples; while iterating, an example longer than a row.
  """
  if not len(examples):
    raise types.UserError(
        'SFT has no examples; check the split and the length limits.')

  def draw(
      example: types.TaskExample, rng: np.random.Generator
  ) -> tuple[list[int], list[int]]:
    return answer(example, tokenizer,
                  with_reasoning=rng.random() < config.reasoning_fraction)

  def group(index: int, rng: np.random.Generator) -> rows.Group:
    example = examples[index]
    prompt, response = (demonstrate or draw)(example, rng)
    result = rows.Group(prompt=prompt, branches=[
        rows.Branch(trajectory=0, response=response)])
    if result.num_tokens > config.row_len:
      raise types.UserError(
          f'SFT example {example.id!r} takes {result.num_tokens} tokens, '
          f'row_len={config.row_len}; raise row_len or use shorter examples.')
    return result

  groups = (
      grain.MapDataset.range(len(examples))
      .seed(config.seed)
      .shuffle()
      .repeat()
      .random_map(group)
  )
  return packing.pack_groups(
      groups, num_rows=config.num_rows, row_len=config.row_len,
      lookahead=config.lookahead)

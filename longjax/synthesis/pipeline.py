"""Examples by the stream: task, seed and split in, verified examples out."""

import dataclasses
import functools
import hashlib
import math
import random
from collections.abc import Callable, Iterator

from longjax import types
from longjax.synthesis import (
    dialogue,
    distractors,
    in_context,
    keychain,
    knowledge_graph,
    multiple_choice,
    tables,
    verify,
)
from longjax.synthesis import names as names_lib
from longjax.synthesis import world as world_lib

TASKS = ('mc', 'multihop', 'reading', 'dialogue', 'numeric', 'keychain')
_MAX_TRIES = 50


def _check(is_right: bool, message: str) -> None:
  if not is_right:
    raise types.UserError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
  """One data set to generate.

  Attributes:
    name: of the split; part of every id and of the randomness.
    names: name space its entities come from.
    num_per_task: examples of each task.
    min_tokens: shortest context aimed at; see `SynthConfig`.
    max_tokens: longest context, never exceeded.
  """

  name: str
  names: str = 'train'
  num_per_task: int = 100
  min_tokens: int = 128
  max_tokens: int = 512

  def __post_init__(self):
    _check(bool(self.name) and '-' not in self.name and '/' not in self.name,
           f'SplitConfig.name={self.name!r}; use letters and underscores.')
    _check(self.names in names_lib.SPLITS,
           f'SplitConfig.names={self.names!r} is not a name space; use one of '
           f'{", ".join(names_lib.SPLITS)}.')
    _check(self.num_per_task >= 0,
           f'SplitConfig.num_per_task={self.num_per_task} is negative; use 0 '
           'or more.')
    _check(0 < self.min_tokens <= self.max_tokens,
           f'SplitConfig needs 0 < min_tokens <= max_tokens, got '
           f'{self.min_tokens} and {self.max_tokens}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthConfig:
  """What is generated and how hard it is.

  Context lengths are log-uniform between a split's `min_tokens` and
  `max_tokens`, counting documents, question and instruction as a user turn
  renders them. Where an example's own pages are longer than the drawn length
  it keeps just those.

  Attributes:
    tasks: which tasks, each the same number of times.
    splits: the data sets.
    variety: sentence templates per relation, 1 to 4.
    facts_min: fewest sentences of a page.
    facts_max: most sentences of a page.
    hops: facts a 'multihop' question combines, 1 to 4.
    code_share: share of 'reading' questions about code books.
    numeric_operations: of 'numeric', see `tables.OPERATIONS`.
    numeric_entities_max: most people a 'numeric' question is about.
    number_max: largest number on a page.
    key_hops: links of a key chain.
    key_fact_hops: facts the hidden question combines.
    num_chains: key chains before extension.
    key_len: characters of a key.
    prefix_len: characters of the prefix 'dialogue' requires.
    repeats_max: most identical requests in 'dialogue'.
  """

  tasks: tuple[str, ...] = TASKS
  splits: tuple[SplitConfig, ...] = (
      SplitConfig(name='train', names='train', num_per_task=500),
      SplitConfig(name='validation', names='validation', num_per_task=32),
      SplitConfig(name='test', names='test', num_per_task=32),
  )
  variety: int = 1
  facts_min: int = 3
  facts_max: int = 5
  hops: int = 2
  code_share: float = 0.5
  numeric_operations: tuple[str, ...] = ('total', 'difference', 'count')
  numeric_entities_max: int = 3
  number_max: int = 9
  key_hops: int = 2
  key_fact_hops: int = 1
  num_chains: int = 3
  key_len: int = 3
  prefix_len: int = 4
  repeats_max: int = 3

  def __post_init__(self):
    for field, values, allowed in (
        ('tasks', self.tasks, TASKS),
        ('numeric_operations', self.numeric_operations, tables.OPERATIONS)):
      unknown = [value for value in values if value not in allowed]
      _check(bool(values) and not unknown,
             f'SynthConfig.{field}={tuple(values)}; use some of '
             f'{", ".join(allowed)}.')
    names = [split.name for split in self.splits]
    _check(len(set(names)) == len(names),
           f'SynthConfig.splits are named {names}; names must differ.')
    _check(0.0 <= self.code_share <= 1.0,
           f'SynthConfig.code_share={self.code_share}; use 0 to 1.')
    _check(1 <= self.facts_min <= self.facts_max,
           'SynthConfig needs 1 <= facts_min <= facts_max, got '
           f'{self.facts_min} and {self.facts_max}.')
    for field, low, high in (
        ('variety', 1, world_lib.MAX_VARIETY), ('hops', 1, 4),
        ('key_fact_hops', 1, 4), ('key_hops', 1, 64), ('num_chains', 1, 64),
        ('key_len', 3, 32), ('prefix_len', 3, 32), ('repeats_max', 2, 4),
        ('numeric_entities_max', 2, 9), ('number_max', 9, 10**9)):
      value = getattr(self, field)
      _check(low <= value <= high,
             f'SynthConfig.{field}={value}; use {low} to {high}.')


def _generators(
    config: SynthConfig,
) -> dict[str, Callable[..., distractors.Draft]]:
  return {
      'mc': multiple_choice.generate,
      'multihop': functools.partial(
          knowledge_graph.generate, hops=config.hops),
      'reading': functools.partial(
          in_context.generate, code_share=config.code_share),
      'dialogue': functools.partial(
          dialogue.generate, prefix_len=config.prefix_len,
          repeats_max=config.repeats_max),
      'numeric': functools.partial(
          tables.generate, operations=config.numeric_operations,
          entities_max=config.numeric_entities_max),
      'keychain': functools.partial(
          keychain.generate, key_hops=config.key_hops,
          fact_hops=config.key_fact_hops, num_chains=config.num_chains,
          key_len=config.key_len),
  }


def draw(
    task: str, example_id: str, rng: random.Random, *, split: SplitConfig,
    config: SynthConfig, count_tokens: Callable[[str], int],
) -> types.TaskExample | None:
  """One draw; None if it is too long or fails verification."""
  world = world_lib.World(
      split.names, rng, variety=config.variety, facts_min=config.facts_min,
      facts_max=config.facts_max, number_max=config.number_max)
  low, high = math.log(split.min_tokens), math.log(split.max_tokens)
  target_tokens = round(math.exp(rng.uniform(low, high)))
  draft = _generators(config)[task](world, example_id=example_id)
  example = draft.example
  if distractors.context_tokens(example, count_tokens) > split.max_tokens:
    return None
  example = distractors.extend(
      example, draft.distractors, target_tokens=target_tokens,
      count_tokens=count_tokens, rng=rng)
  return None if verify.problems(example) else example


def synthesize(
    split: SplitConfig,
    *,
    config: SynthConfig,
    seed: int,
    count_tokens: Callable[[str], int],
) -> Iterator[types.TaskExample]:
  """Streams a split's examples, tasks taking turns.

  Deterministic given the arguments; an example depends on (seed, split name,
  task, number) alone, so a longer split begins with the shorter one.

  Args:
    split: which split.
    config: tasks and their difficulty.
    seed: of the whole data set.
    count_tokens: number of tokens of a text.

  Yields:
    Examples with ids such as "multihop-train-000017". Every one passed
    `verify.problems`, and no question comes twice.

  Raises:
    UserError: the shortest examples of a task exceed `max_tokens`.
  """
  asked: set[bytes] = set()
  for number in range(split.num_per_task):
    for task in config.tasks:
      example_id = f'{task}-{split.name}-{number:06d}'
      for attempt in range(_MAX_TRIES):
        rng = random.Random(f'{seed}/{example_id}/{attempt}')
        example = draw(
            task, example_id, rng, split=split, config=config,
            count_tokens=count_tokens)
        if example is None:
          continue
        key = hashlib.blake2b(
            f'{example.question}\n{example.answers}'.encode(),
            digest_size=8).digest()
        if key not in asked:
          asked.add(key)
          break
      else:
        raise types.UserError(
            f'SplitConfig.max_tokens={split.max_tokens} of {split.name!r} is '
            f'too small for task {task!r}; raise it or leave the task out.')
      yield example


def corpus(
    split: SplitConfig, *, config: SynthConfig, seed: int
) -> Iterator[str]:
  """Plain texts to train a tokenizer on: what prompts and answers contain.

  Lengths are counted in characters / 4, as no tokenizer exists yet.
  """
  examples = synthesize(
      split, config=config, seed=seed,
      count_tokens=lambda text: len(text) // 4)
  for example in examples:
    yield from map(distractors.render_document, example.documents)
    yield distractors.render_question(example)
    yield f'{example.reasoning} The answer is {example.answers[0]}.'

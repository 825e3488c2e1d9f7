"""The synthesis stage of a recipe: examples are made, checked and written.

Also where the user's own examples enter: a JSON-lines file takes the place of
the synthetic ones and goes the same way from there on.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from longjax import types
from longjax.data import chat, dataset, documents, prompts
from longjax.data import tokenizer as tokenizer_lib
from longjax.reward import hybrid
from longjax.synthesis import pipeline

# Examples of each task that a tokenizer is trained on.
_TOKENIZER_EXAMPLES = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthStage:
  """Writes the data set.

  Attributes:
    job: marks the kind of stage.
    path: a JSON-lines file of the user's own examples (`data.documents`); ''
      makes synthetic ones. Own examples become the splits 'sft' and 'rl' (the
      same ones), 'validation' and 'test'.
    drop_too_long: leave out own examples that a later stage has no room for,
      and say how many; else they are an error.
    examples: the synthetic ones. A split of 0 examples is not written.
  """

  job: Literal['synth'] = 'synth'
  path: str = ''
  drop_too_long: bool = False
  examples: pipeline.SynthConfig = pipeline.SynthConfig()

  def splits(self) -> list[str]:
    """Names of the splits it writes."""
    if self.path:
      names = set(documents.DEFAULT_FRACTIONS) - {'train'}
      return ['sft', 'rl', *sorted(names)]
    return [s.name for s in self.examples.splits if s.num_per_task]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cap:
  """Room that a later stage has for the examples of a split.

  Attributes:
    split: which examples.
    field: of the config, for messages.
    max_len: tokens.
    with_response: whether the demonstration must fit as well.
  """

  split: str
  field: str
  max_len: int
  with_response: bool = False


def _excess(
    example: types.TaskExample,
    caps: Sequence[Cap],
    tokenizer: tokenizer_lib.Tokenizer,
) -> str:
  """What is too long, in words; '' if the example fits all caps."""
  if not caps:
    return ''
  prompt_len = len(chat.render_prompt(example, tokenizer))
  response_len = len(
      prompts.demonstration(example, tokenizer, with_reasoning=True))
  for cap in caps:
    size, what = prompt_len, 'prompt'
    if cap.with_response:
      # The last id of the prompt and the first of the response share a place.
      size, what = size + response_len - 1, 'prompt and demonstration'
    if size > cap.max_len:
      return (
          f'example {example.id!r} has a {what} of {size} tokens, more than '
          f'{cap.field}={cap.max_len}')
  return ''


def run(
    stage: SynthStage,
    *,
    directory: pathlib.Path,
    seed: int,
    tokenizer: tokenizer_lib.Tokenizer,
    caps: Sequence[Cap],
    progress: Callable[..., Any],
    check_stop: Callable[[], None],
    log: Callable[[str], None],
) -> None:
  """Writes the data set, whole or not at all.

  Args:
    stage: its configuration.
    directory: what to make.
    seed: of synthesis, or of dealing own examples out to splits.
    tokenizer: measures lengths.
    caps: what examples have to fit into.
    progress: `train.progress.Progress` or alike.
    check_stop: called between examples; may raise to stop.
    log: takes a line of news.

  Raises:
    UserError: an example is too long for a later stage, or see `documents`,
      `pipeline` and `dataset`.
  """
  if stage.path:
    dataset.write(directory, _own(
        stage, seed, tokenizer, caps, progress, check_stop, log))
    return
  config = stage.examples
  splits = [s for s in config.splits if s.num_per_task]
  total = sum(s.num_per_task for s in splits) * len(config.tasks)
  with progress(total, 'synth', unit='example') as bar:

    def examples(split: pipeline.SplitConfig) -> Iterator[types.TaskExample]:
      own_caps = [cap for cap in caps if cap.split == split.name]
      for example in pipeline.synthesize(
          split, config=config, seed=seed,
          count_tokens=lambda text: len(tokenizer.encode(text))):
        check_stop()
        if excess := _excess(example, own_caps, tokenizer):
          raise types.UserError(
              f'{excess}; raise it, or lower max_tokens={split.max_tokens} '
              f'of split {split.name!r}.')
        yield example
        bar.advance()

    dataset.write(directory, {s.name: examples(s) for s in splits})


def read_own(path: str) -> Iterator[types.TaskExample]:
  """Reads a user's file; says how to come by one if there is none.

  Raises:
    UserError: there is no such file, or see `documents.read_jsonl`.
  """
  if not pathlib.Path(path).exists():
    raise types.UserError(
        f'path={path} of the synth stage does not exist; name a file of '
        'examples, its format is in longjax/data/documents.py, or make one '
        'about the Python library: python -m longjax.synthesis.python_lookup '
        f'--output={path}')
  return documents.read_jsonl(path)


def _own(
    stage: SynthStage,
    seed: int,
    tokenizer: tokenizer_lib.Tokenizer,
    caps: Sequence[Cap],
    progress: Callable[..., Any],
    check_stop: Callable[[], None],
    log: Callable[[str], None],
) -> Mapping[str, Iterable[types.TaskExample]]:
  """The splits of a user's file, which is read again for each of them."""
  # Dealing out depends on all ids, so every example must fit everywhere.
  fitting: list[str] = []
  num_long, first = 0, ''
  num_examples = sum(1 for _ in read_own(stage.path))
  with progress(num_examples, 'synth', unit='example') as bar:
    for example in read_own(stage.path):
      check_stop()
      _check_answer(example, stage.path)
      if excess := _excess(example, caps, tokenizer):
        num_long += 1
        first = first or excess
      else:
        fitting.append(example.id)
      bar.advance()
  if num_long and not stage.drop_too_long:
    raise types.UserError(
        f'{stage.path}: {num_long} of {num_examples} examples are too long; '
        f'{first}. Raise it, shorten them, or leave them out with '
        'drop_too_long=true in the synth stage.')
  if num_long:
    log(f'{stage.path}: left out {num_long} of {num_examples} examples as '
        f'too long, first: {first}.')
  ids = documents.split_ids(fitting, seed=seed)

  def chosen(split: str) -> Iterator[types.TaskExample]:
    return (e for e in read_own(stage.path) if e.id in ids[split])

  return {name: chosen('train' if name in ('sft', 'rl') else name)
          for name in stage.splits()}


def _check_answer(example: types.TaskExample, path: str) -> None:
  """Refuses an example whose own answer its rule would not reward."""
  answer = prompts.answer_text(example)
  cue = '' if example.kind == 'mrcr' else f'{chat.ANSWER_CUE} '
  if hybrid.score(example, cue + answer, think='none').reward == 0.0:
    raise types.UserError(
        f'{path}: example {example.id!r}: its answer {answer[:40]!r} earns '
        f'nothing by the rule of kind {example.kind!r}; reword it or choose '
        'another kind.')


def tokenizer_texts(stage: SynthStage | None, *, seed: int) -> Iterator[str]:
  """What a fresh tokenizer is trained on: text as later stages will read it.

  Args:
    stage: of the recipe; None, where there is none, means the default tasks.
    seed: of the run.

  Yields:
    Texts.
  """
  if stage and stage.path:
    for example in read_own(stage.path):
      for document in example.documents:
        yield f'{document.title}\n{document.text}\n'
      yield f'{example.question} {example.instruction}'
      yield f'{example.reasoning} {chat.ANSWER_CUE} {example.answers[0]}.'
    return
  config = stage.examples if stage else pipeline.SynthConfig()
  split = pipeline.SplitConfig(
      name='tokenizer', names='train', num_per_task=_TOKENIZER_EXAMPLES)
  yield from pipeline.corpus(split, config=config, seed=seed)

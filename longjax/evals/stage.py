"""The evaluation stage of a recipe: held-out splits, by task and length."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from longjax import types
from longjax.agents import memory as memory_lib
from longjax.agents import rounds, sampled
from longjax.data import chat, prompts
from longjax.data import tokenizer as tokenizer_lib
from longjax.evals import runner, scores
from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib
from longjax.reward import grading
from longjax.reward import judge as judge_lib
from longjax.rollout import decode, engine

# Prompts handed to the sampler between two looks at the progress, over those
# it holds: the first ends must not leave slots empty each time.
_BATCHES_AT_ONCE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalsStage:
  """What is evaluated.

  Attributes:
    job: marks the kind of stage.
    splits: of the data set, held out.
    tasks: of the splits, those that are asked; none means all.
    lengths: prompt lengths in tokens that results are grouped by; each prompt
      belongs to the first that holds it, and is padded to it.
    num_samples: responses to each prompt.
    prompts_at_once: prompts whose keys and values the sampler holds.
    sampler: temperature, nucleus, cap on responses.
    memory: documents are read in turns, by the memory agent; None asks about
      the whole of them at once.
    max_prompt_len: cap on the prompt of a turn in tokens, with `memory`.
    judge: who is asked where the rule finds no match, while other responses
      are still being written. See `reward.grading`.
  """

  job: Literal['evals'] = 'evals'
  splits: tuple[str, ...] = ('test',)
  tasks: tuple[str, ...] = ()
  lengths: tuple[int, ...]
  num_samples: int = 1
  prompts_at_once: int = 32
  sampler: decode.SamplerConfig
  memory: memory_lib.MemoryConfig | None = None
  max_prompt_len: int = 0
  judge: grading.JudgeConfig = grading.JudgeConfig()

  def __post_init__(self):
    if (self.memory is None) != (self.max_prompt_len == 0):
      raise types.UserError(
          f'evals.max_prompt_len={self.max_prompt_len} is the cap on turns of '
          f'evals.memory={self.memory}; set both or none.')
    memory_lib.check_cap(self.memory, self.max_prompt_len, name='evals')
    if self.num_samples < 1:
      raise types.UserError(
          f'evals.num_samples={self.num_samples} must be >= 1.')
    if not self.splits:
      raise types.UserError('evals.splits is empty; name a held-out split.')
    if not self.lengths or min(self.lengths) < 2 or list(
        self.lengths) != sorted(set(self.lengths)):
      raise types.UserError(
          f'evals.lengths={self.lengths} must be increasing prompt lengths of '
          'at least 2 tokens.')
    if self.prompts_at_once < 1:
      raise types.UserError(
          f'evals.prompts_at_once={self.prompts_at_once} must be >= 1.')

  @property
  def engine(self) -> engine.EngineConfig:
    """Shapes of the sampler's programs."""
    if self.memory is not None:
      # Readers of a document each have a prompt of their own.
      return engine.EngineConfig(
          prompt_buckets=(self.max_prompt_len,),
          prompts_at_once=self.prompts_at_once)
    return engine.EngineConfig(
        prompt_buckets=self.lengths, prompts_at_once=self.prompts_at_once,
        samples_per_prompt=self.num_samples)


def result(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """The file an evaluation writes."""
  return workdir / runner.EVALS_FOLDER / f'{name}.json'


def check(stage: EvalsStage, rules: rules_lib.Rules) -> None:
  """Refuses batches that do not divide over the mesh."""
  engine.check(stage.engine, rules, name='evals')


def run(
    stage: EvalsStage,
    *,
    name: str,
    seed: int,
    workdir: pathlib.Path,
    **facts: Any,
) -> None:
  """Writes the records of `answer` to evals/{name}.json."""
  results = answer(stage, name=name, seed=seed, **facts)

  def save() -> None:
    runner.save(
        workdir, name, results, seed=seed, facts={
            'splits': list(stage.splits), 'num_samples': stage.num_samples,
            'temperature': stage.sampler.temperature,
            'top_p': stage.sampler.top_p,
            **({} if stage.memory is None else {
                'part_len': stage.memory.part_len,
                'memory_len': stage.memory.memory_len}),
            **({} if stage.judge.mode == 'none' else {
                'judge': stage.judge.name})})

  multihost.on_primary(save)


def answer(
    stage: EvalsStage,
    *,
    name: str,
    params: types.Params,
    examples: Mapping[str, Sequence[types.TaskExample]],
    score: runner.Score,
    model: architecture.ModelConfig,
    tokenizer: tokenizer_lib.Tokenizer,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
    seed: int,
    progress: Callable[..., Any],
    check_stop: Callable[[], None],
    judge: judge_lib.Judge | None = None,
) -> list[scores.Record]:
  """Lets `params` answer held-out examples, and grades what it wrote.

  The samples depend on (seed, prompt, number) only: evaluations before and
  after training answer the same questions with the same random numbers.

  Args:
    stage: its configuration.
    name: of the result, for the progress bar.
    params: what is evaluated.
    examples: of each split.
    score: the rules.
    model: sizes of the network.
    tokenizer: of the model.
    rules: logical axes to mesh axes.
    compute: backends and dtype.
    seed: of the samples.
    progress: `train.progress.Progress` or alike.
    check_stop: called after each batch; may raise to stop.
    judge: who is asked where rules find no match; None asks nobody.
  """
  sampler = engine.Engine(
      model=model, sampler=stage.sampler,
      engine=stage.engine,
      stop_ids=tokenizer.stop_ids, rules=rules, compute=compute)
  key = jax.random.fold_in(jax.random.key(seed), 0xE7A1)
  session = sampler.session(params)

  def at_once(batch, num_samples):
    rollouts = session.sample(
        batch, engine.prompt_keys(key, batch), num_samples=num_samples)
    return [[
        runner.Response(
            text=engine.response_text(tokenizer, rollouts, p, g),
            length=int(rollouts.lengths[p, g]),
            is_finished=bool(rollouts.is_finished[p, g]))
        for g in range(num_samples)] for p in range(len(batch))]

  def read(batch, num_samples):
    assert stage.memory is not None
    agent = memory_lib.MemoryAgent(tokenizer, stage.memory)
    return _read(agent, batch, num_samples, tokenizer, sampled.generate(
        session, key, examples=[p.example for p in batch],
        numbers=[p.number for p in batch]))

  generate = at_once if stage.memory is None else read
  asked = [
      prompts.to_prompt(example, tokenizer, max_len=max(stage.lengths))
      for split in stage.splits for example in examples[split]]
  with progress(len(asked), name, unit='prompt') as bar:

    def on_batch(num_prompts: int) -> None:
      bar.advance(num_prompts)
      check_stop()

    return runner.evaluate(
        generate, grading.Grader(judge=judge, score=score),
        runner.by_length(asked, stage.lengths),
        num_samples=stage.num_samples,
        batch_size=_BATCHES_AT_ONCE * stage.prompts_at_once,
        on_batch=on_batch)


def _read(
    agent: memory_lib.MemoryAgent,
    batch: Sequence[types.Prompt],
    num_samples: int,
    tokenizer: tokenizer_lib.Tokenizer,
    generate: rounds.Generate,
) -> list[list[runner.Response]]:
  """The memory agent's answers about the documents of prompts."""
  queries = [rounds.query(agent, prompt.example) for prompt in batch]
  lengths = np.zeros((len(batch), num_samples), np.int64)
  answers: dict[tuple[int, int], rounds.Response] = {}
  for turns in rounds.read(agent, queries, generate, [
      rounds.Reader(query=q, sample=g)
      for q in range(len(batch)) for g in range(num_samples)]):
    for turn in turns:
      reader = turn.prompt.query, turn.prompt.sample
      lengths[reader] += len(turn.response.tokens)
      if turn.is_last:
        answers[reader] = turn.response

  def made(q: int, g: int) -> runner.Response:
    last = answers[q, g]
    return runner.Response(
        text=chat.response_text(
            last.tokens, tokenizer, is_finished=last.is_finished),
        length=int(lengths[q, g]), is_finished=last.is_finished)

  return [[made(q, g) for g in range(num_samples)] for q in range(len(batch))]

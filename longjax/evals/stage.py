"""The evaluation stage of a recipe: held-out splits, by task and length."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from longjax import types
from longjax.data import prompts
from longjax.data import tokenizer as tokenizer_lib
from longjax.evals import runner
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
    lengths: prompt lengths in tokens that results are grouped by; each prompt
      belongs to the first that holds it, and is padded to it.
    num_samples: responses to each prompt.
    prompts_at_once: prompts whose keys and values the sampler holds.
    sampler: temperature, nucleus, cap on responses.
  """

  job: Literal['evals'] = 'evals'
  splits: tuple[str, ...] = ('test',)
  lengths: tuple[int, ...]
  num_samples: int = 1
  prompts_at_once: int = 32
  sampler: decode.SamplerConfig

  def __post_init__(self):
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
    params: types.Params,
    examples: Mapping[str, Sequence[types.TaskExample]],
    score: runner.Score,
    model: architecture.ModelConfig,
    tokenizer: tokenizer_lib.Tokenizer,
    rules: rules_lib.Rules,
    compute: compute_lib.Compute,
    seed: int,
    workdir: pathlib.Path,
    progress: Callable[..., Any],
    check_stop: Callable[[], None],
    judge: judge_lib.Judge | None = None,
) -> None:
  """Evaluates `params` and writes evals/{name}.json.

  The samples depend on (seed, prompt, number) only: evaluations before and
  after training answer the same questions with the same random numbers.

  Args:
    stage: its configuration.
    name: of the result.
    params: what is evaluated.
    examples: of each split.
    score: the rules.
    model: sizes of the network.
    tokenizer: of the model.
    rules: logical axes to mesh axes.
    compute: backends and dtype.
    seed: of the samples.
    workdir: of the run.
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

  def generate(batch, num_samples):
    rollouts = session.sample(
        batch, engine.prompt_keys(key, batch), num_samples=num_samples)
    return [[
        runner.Response(
            text=engine.response_text(tokenizer, rollouts, p, g),
            length=int(rollouts.lengths[p, g]),
            is_finished=bool(rollouts.is_finished[p, g]))
        for g in range(num_samples)] for p in range(len(batch))]

  asked = [
      prompts.to_prompt(example, tokenizer, max_len=max(stage.lengths))
      for split in stage.splits for example in examples[split]]
  with progress(len(asked), name, unit='prompt') as bar:

    def on_batch(num_prompts: int) -> None:
      bar.advance(num_prompts)
      check_stop()

    results = runner.evaluate(
        generate, grading.Grader(judge=judge, score=score),
        runner.by_length(asked, stage.lengths),
        num_samples=stage.num_samples,
        batch_size=_BATCHES_AT_ONCE * stage.prompts_at_once,
        on_batch=on_batch)

  def save() -> None:
    runner.save(
        workdir, name, results, seed=seed, facts={
            'splits': list(stage.splits), 'num_samples': stage.num_samples,
            'temperature': stage.sampler.temperature,
            'top_p': stage.sampler.top_p})

  multihost.on_primary(save)

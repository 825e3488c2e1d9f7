"""The evaluation stage of a recipe: held-out splits, by task and length."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

import jax

from longjax import types
from longjax.data import prompts
from longjax.data import tokenizer as tokenizer_lib
from longjax.evals import runner
from longjax.model import architecture, attention
from longjax.parallel import rules as rules_lib
from longjax.rollout import decode, engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalsStage:
  """What is evaluated.

  Attributes:
    job: marks the kind of stage.
    splits: of the data set, held out.
    lengths: prompt lengths in tokens that results are grouped by; each prompt
      belongs to the first that holds it, and is padded to it.
    num_samples: responses to each prompt.
    prompts_per_batch: prompts sampled at once.
    sampler: temperature, nucleus, cap on responses.
  """

  job: Literal['evals'] = 'evals'
  splits: tuple[str, ...] = ('test',)
  lengths: tuple[int, ...]
  num_samples: int = 1
  prompts_per_batch: int = 32
  sampler: decode.SamplerConfig

  def __post_init__(self):
    if self.num_samples < 1:
      raise types.UserError(
          f'evals.num_samples={self.num_samples} must be >= 1.')
    if not self.splits:
      raise types.UserError('evals.splits is empty; name a held-out split.')


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
    backend: attention.Backend,
    seed: int,
    workdir: pathlib.Path,
    progress,
) -> None:
  """Evaluates `params` and writes evals/{name}.json.

  The samples depend on (seed, prompt, number) only: evaluations before and
  after training answer the same questions with the same random numbers.
  """
  sampler = engine.Engine(
      model=model, sampler=stage.sampler,
      engine=engine.EngineConfig(
          prompt_buckets=stage.lengths,
          prompts_per_batch=stage.prompts_per_batch),
      stop_ids=(tokenizer.stop_id,), rules=rules, backend=backend)
  key = jax.random.fold_in(jax.random.key(seed), 0xE7A1)

  def generate(batch, num_samples):
    rollouts = sampler.sample(params, batch, key, num_samples=num_samples)
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
    results = runner.evaluate(
        generate, score, runner.by_length(asked, stage.lengths),
        num_samples=stage.num_samples, batch_size=stage.prompts_per_batch,
        on_batch=bar.advance)
  runner.save(
      workdir, name, results, seed=seed, facts={
          'splits': list(stage.splits), 'num_samples': stage.num_samples,
          'temperature': stage.sampler.temperature,
          'top_p': stage.sampler.top_p})

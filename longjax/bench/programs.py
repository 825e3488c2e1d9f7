"""The programs of training, made ready to be timed on a workload.

What is timed is what training calls: `step.make_update`, `step.make_score` and
`rollout.engine`, host work included.

B rows, T positions of a micro-batch; P prompts, G samples per prompt, R
response tokens, N = P * G responses.
"""

import dataclasses
import functools
import types as python_types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from longjax import rows, types
from longjax.bench import measure, suite, workload
from longjax.model import architecture, parameters
from longjax.model import compute as compute_lib
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib
from longjax.planner import memory
from longjax.rl import batch
from longjax.rl import loss as loss_lib
from longjax.rollout import decode, engine, shapes
from longjax.train import optimizer as optimizer_lib
from longjax.train import rl_job
from longjax.train import state as state_lib
from longjax.train import step as step_lib

# Lengths of rows are rounded up to whole blocks of attention.
_ROW_MULTIPLE = {'cpu': 64}
_OTHER_ROW_MULTIPLE = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What the programs of a case have in common."""

  model: architecture.ModelConfig
  rules: rules_lib.Rules
  compute: compute_lib.Compute
  seed: int


class Policy:
  """Parameters and moments, which an update takes and gives back.

  Attributes:
    state: after the last update. Updates of a benchmark are computed but not
      applied, so that every run does the same work and gives the same loss.
  """

  def __init__(self, setting: Setting):
    self._setting = setting
    self.state = self._random()

  def renew(self) -> None:
    """Begins again; the old state is given up first."""
    del self.state
    self.state = self._random()

  def _random(self) -> state_lib.TrainState:
    """Parameters made where they will lie."""
    model, rules = self._setting.model, self._setting.rules
    params = jax.jit(
        functools.partial(parameters.init, model),
        out_shardings=state_lib.param_shardings(model, rules))(
            jax.random.key(self._setting.seed))
    return state_lib.create(params, model, optimizer(), rules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
  """A program ready to run.

  Attributes:
    warm_up: compiles all that `run` needs.
    run: does the work once and times it.
    peak_bytes: of one device at the worst moment, as the compiler lays out
      arguments, results and temporaries of the programs, with the state that
      an update keeps beside them. It is exact where a device's own count would
      hold what ran before.
    facts: what is known before, scalars by name.
  """

  warm_up: Callable[[], Any]
  run: Callable[[], measure.Reading]
  peak_bytes: Callable[[], int]
  facts: Mapping[str, float] = dataclasses.field(default_factory=dict)


def optimizer() -> optax.GradientTransformation:
  """AdamW; its numbers change neither shapes nor speed."""
  return optimizer_lib.make(
      optimizer_lib.OptimizerConfig(learning_rate=1e-6), num_steps=1)


def with_depth(setting: Setting, case: suite.Case) -> Setting:
  """The setting with as many layers as the case asks for."""
  if not case.num_layers:
    return setting
  return dataclasses.replace(setting, model=dataclasses.replace(
      setting.model, num_layers=case.num_layers))


def check(name: str, case: suite.Case, setting: Setting) -> None:
  """Raises UserError unless a case's rows and prompts divide over the mesh."""
  if case.program in ('prefill', 'decode', 'gap'):
    for variant in case.variants:
      made = _engine_config(_workload(case, variant, setting))
      engine.check(made, setting.rules, name=f'cases.{name} ({variant})')
  shards = setting.rules.size('batch')
  if case.rows_at_once % shards:
    raise types.UserError(
        f'cases.{name}.rows_at_once={case.rows_at_once} does not divide over '
        f'the {shards} data shards of mesh {dict(setting.rules.mesh.shape)}; '
        f'use a multiple of {shards}, or 0 for one row each.')


def prepare(
    case: suite.Case, variant: suite.Variant, setting: Setting, policy: Policy
) -> Prepared:
  """Makes a variant of a case ready; nothing is compiled yet."""
  work = _workload(case, variant, setting)
  return _PREPARE[case.program](case, work, setting, policy)


def _workload(
    case: suite.Case, variant: suite.Variant, setting: Setting
) -> workload.Workload:
  shared = shared_workload(case, setting)
  if variant == 'shared':
    return shared
  return workload.unshared(shared, are_distinct=case.program == 'prefill')


def shared_workload(
    case: suite.Case, setting: Setting
) -> workload.Workload:
  """The prompts and responses of a case."""
  return workload.make(
      case, num_prompts=case.num_prompts or setting.rules.size('batch'),
      vocab_size=setting.model.vocab_size, seed=setting.seed)


def _packed(
    case: suite.Case, work: workload.Workload, setting: Setting
) -> batch.Packed:
  """Rows that hold the longest group."""
  longest = max(
      len(prompt.tokens) - 1 + int(lengths.sum())
      for prompt, lengths in zip(work.prompts, work.lengths, strict=True))
  platform = setting.rules.mesh.devices.flat[0].platform
  multiple = setting.rules.size('seq') * _ROW_MULTIPLE.get(
      platform, _OTHER_ROW_MULTIPLE)
  return batch.pack(
      work.prompts, work.rollouts,
      row_lens=(-(-longest // multiple) * multiple,),
      num_rows=case.rows_at_once or setting.rules.size('batch'))


def _padding(
    packed: batch.Packed, work: workload.Workload
) -> dict[str, float]:
  """Shares of the places computed that hold nothing, or a prompt once more."""
  places = sum(part.tokens.size for part in packed.micro_batches)
  used = sum(
      int((part.meta.group >= 0).sum()) for part in packed.micro_batches)
  prompts = {prompt.tokens for prompt in work.prompts}
  distinct = work.num_response_tokens + sum(
      len(tokens) - 1 for tokens in prompts)
  return {'padding': 1.0 - used / places,
          'repeated': (used - distinct) / places}


def _extras(work: workload.Workload, seed: int) -> dict[str, np.ndarray]:
  """What `rl_job.loss` reads beside rows: [N] and [N, R]."""
  lengths = work.lengths.reshape(-1)
  logprobs = np.asarray(work.rollouts.logprobs)
  logprobs = logprobs.reshape(lengths.size, -1)
  return {
      'advantages': np.random.default_rng(seed).normal(
          size=lengths.size).astype(np.float32),
      'token_weights': np.full(
          logprobs.shape, 1.0 / lengths.sum(), np.float32),
      'sampler_logprobs': logprobs,
  }


def _update(
    case: suite.Case, work: workload.Workload, setting: Setting,
    policy: Policy,
) -> Prepared:
  """One optimizer step, on policy."""
  packed = _packed(case, work, setting)
  extras = _extras(work, setting.seed)
  # The parts of `RlStage` and `run_state.Context` that the loss reads.
  stage: Any = python_types.SimpleNamespace(
      sampler=decode.SamplerConfig(), loss=loss_lib.LossConfig())
  context: Any = setting
  update = step_lib.make_update(
      functools.partial(rl_job.loss, stage=stage, context=context),
      optimizer(), config=setting.model, rules=setting.rules)

  def take(micro_batches: list[rows.Rows]) -> dict[str, jax.Array]:
    policy.state, metrics = jax.block_until_ready(
        update(policy.state, micro_batches, extras, False))
    return metrics

  def run() -> measure.Reading:
    reading, metrics = measure.timed(lambda: take(packed.micro_batches))
    return dataclasses.replace(
        reading, values={'loss': float(metrics['loss'])})

  def peak_bytes() -> int:
    part = step_lib.put_rows(packed.micro_batches[0], setting.rules)
    given = multihost.put(extras, setting.rules.sharding())
    params = policy.state.params
    total = update.start(params, part, given)
    moments = memory.of_tree(policy.state.opt_state)
    return max(
        _peak_bytes(update.accumulate, params, total, part, given) + moments,
        _peak_bytes(update.apply, policy.state, total, False))

  return Prepared(
      warm_up=lambda: take(packed.micro_batches[:1]), run=run,
      peak_bytes=peak_bytes, facts=_padding(packed, work))


def _score(
    case: suite.Case, work: workload.Workload, setting: Setting,
    policy: Policy,
) -> Prepared:
  """Log-probabilities and entropies of all response tokens."""
  packed = _packed(case, work, setting)
  score = _make_score(setting)

  def scored(part: rows.Rows) -> Any:
    return score(
        policy.state.params, step_lib.put_rows(part, setting.rules))

  def run() -> measure.Reading:
    reading, _ = measure.timed(
        lambda: [scored(part) for part in packed.micro_batches])
    return reading

  def peak_bytes() -> int:
    part = step_lib.put_rows(packed.micro_batches[0], setting.rules)
    return _peak_bytes(score, policy.state.params, part)

  return Prepared(
      warm_up=lambda: jax.block_until_ready(scored(packed.micro_batches[0])),
      run=run, peak_bytes=peak_bytes,
      facts=_padding(packed, work))


def _make_score(setting: Setting) -> Callable[..., Any]:
  return step_lib.make_score(
      config=setting.model, temperature=1.0, rules=setting.rules,
      compute=setting.compute)


def _peak_bytes(jitted: Any, *args: Any) -> int:
  """See `Prepared`; what is compiled already is not compiled again."""
  facts = jitted.lower(*args).compile().memory_analysis()
  return (facts.argument_size_in_bytes + facts.temp_size_in_bytes
          + facts.output_size_in_bytes - facts.alias_size_in_bytes)


def _engine_config(work: workload.Workload) -> engine.EngineConfig:
  return engine.EngineConfig(
      prompt_buckets=(max(len(p.tokens) for p in work.prompts),),
      prompts_at_once=len(work.prompts),
      samples_per_prompt=work.lengths.shape[1])


def _engine_facts(
    work: workload.Workload, setting: Setting
) -> dict[str, Any]:
  """All prompts are held and all samples written at a time."""
  return dict(
      engine=_engine_config(work), stop_ids=(), compute=setting.compute,
      sampler=decode.SamplerConfig(max_response_len=int(work.lengths.max())))


def _engine(
    work: workload.Workload, setting: Setting
) -> engine.Engine:
  return engine.Engine(
      model=setting.model, rules=setting.rules, **_engine_facts(work, setting))


def _sampler_bytes(work: workload.Workload, setting: Setting) -> int:
  """Of the sampler while it reads prompts or writes, whichever takes more."""
  facts = _engine_facts(work, setting)
  config = facts['engine']
  programs = engine.programs(
      bucket=config.prompt_buckets[0], config=setting.model,
      rules=rules_lib.for_sampler(setting.rules, config.prompts_at_once),
      **facts)
  _, slots = shapes.caches(programs, config)

  def peak(program: shapes.Program) -> int:
    jitted, arguments = program
    return _peak_bytes(jitted, *arguments)

  return max(peak(shapes.fill(programs, config)) + memory.of_tree(slots),
             peak(shapes.write(programs, config)))


def _sample(
    session: engine.Session, work: workload.Workload, setting: Setting,
    max_lens: np.ndarray,  # i32[P, G]
) -> Any:
  """Responses of given lengths: no token ends one."""
  keys = engine.prompt_keys(jax.random.key(setting.seed), work.prompts)
  return session.sample(
      work.prompts, keys, num_samples=max_lens.shape[1], max_lens=max_lens)


def _prefill(
    case: suite.Case, work: workload.Workload, setting: Setting,
    policy: Policy,
) -> Prepared:
  """A new session that writes the first token of every response."""
  del case
  made = _engine(work, setting)
  ones = np.ones_like(work.lengths)

  def sample() -> Any:
    return _sample(made.session(policy.state.params), work, setting, ones)

  return Prepared(
      warm_up=sample, run=lambda: measure.timed(sample)[0],
      peak_bytes=lambda: _sampler_bytes(work, setting))


def _decode(
    case: suite.Case, work: workload.Workload, setting: Setting,
    policy: Policy,
) -> Prepared:
  """All responses, in a session that has read the prompts.

  It reads again what does not fill a chunk of a prompt, so a case should have
  prompts of whole chunks and the one token that responses begin with.
  """
  del case
  session = _engine(work, setting).session(policy.state.params)

  def sample() -> Any:
    return _sample(session, work, setting, work.lengths)

  return Prepared(
      warm_up=sample, run=lambda: measure.timed(sample)[0],
      peak_bytes=lambda: _sampler_bytes(work, setting))


def _gap(
    case: suite.Case, work: workload.Workload, setting: Setting,
    policy: Policy,
) -> Prepared:
  """How far sampler and trainer are apart, over tokens the sampler drew."""
  made, score = _engine(work, setting), _make_score(setting)

  def gap() -> dict[str, float]:
    params = policy.state.params
    rollouts = _sample(made.session(params), work, setting, work.lengths)
    packed = _packed(
        case, dataclasses.replace(work, rollouts=rollouts), setting)
    scores = multihost.to_host([
        score(params, step_lib.put_rows(part, setting.rules)).logprobs
        for part in packed.micro_batches])
    trainer = batch.unpack(
        scores, packed.micro_batches, num_responses=work.lengths.size,
        max_response_len=rollouts.tokens.shape[2])
    sampler = np.asarray(rollouts.logprobs).reshape(trainer.shape)
    apart = np.abs(sampler - trainer)
    return {
        'mean_gap': float(apart.sum() / work.num_response_tokens),
        'max_gap': float(apart.max()),
        'mean_nats': float(-trainer.sum() / work.num_response_tokens)}

  def run() -> measure.Reading:
    reading, values = measure.timed(gap)
    return dataclasses.replace(reading, values=values)

  return Prepared(
      warm_up=gap, run=run, peak_bytes=lambda: _sampler_bytes(work, setting))


_PREPARE: dict[suite.Program, Callable[..., Prepared]] = {
    'prefill': _prefill,
    'decode': _decode,
    'score': _score,
    'update': _update,
    'gap': _gap,
}

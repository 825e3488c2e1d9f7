"""What a stage of reinforcement learning is, and what it cannot be."""

import dataclasses
import itertools
from typing import Literal

from longjax import types
from longjax.agents import memory as memory_lib
from longjax.parallel import mesh as mesh_lib
from longjax.parallel import rules as rules_lib
from longjax.parallel import token_order
from longjax.reward import grading
from longjax.rl import advantage as advantage_lib
from longjax.rl import clipping, entropy_control
from longjax.rl import loss as loss_lib
from longjax.rl import overlong as overlong_lib
from longjax.rollout import decode, engine
from longjax.train import inprocess_judge, partial, run_state
from longjax.train import optimizer as optimizer_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlStage:
  """One stage of reinforcement learning; defaults follow QwenLong-L1.5.

  Attributes:
    job: marks the kind of stage.
    start: name of the stage whose policy this one begins with, 'base' for the
      run's; '' goes on from the stage before.
    seed: added to the run's, for stages that repeat each other.
    mesh: devices along each axis while it trains; None takes the run's.
    steps: batches of rollouts.
    split: of the data set, where prompts come from.
    tasks: of the split, those that are asked; none means all.
    num_prompts: P, trained on at once.
    task_balanced: as many of every task; False draws from all alike.
    num_samples: G.
    oversample: prompts sampled for each one trained on, see
      `data.dynamic_sampling`; 3 is usual, 1 trains on all. Sampling a step
      takes as many times longer, but no more memory of the devices.
    prompts_at_once: prompts whose keys and values the sampler holds; 0 means
      all P, or P * G with `memory`.
    samples_at_once: responses being written at a time; 0 means those of the
      prompts held. The next one takes the place of one that ends.
    chunk_len: tokens of a prompt the sampler reads at once, at most.
    cut_tokens: response tokens after which a step stops sampling, as soon as
      some group is complete; the rest is carried over, see `partial`. 0 means
      never.
    cut_seconds: the same by the clock of process 0, compilation included. A
      run that is killed and resumed may then cut elsewhere than one that was
      not.
    max_prompt_len: cap on prompts in tokens (L_in).
    sampler: temperature, nucleus and the cap on responses (L_out).
    row_lens: the lengths T rows of the update may have, increasing. The
      longest holds at least a prompt and a response; what it does not hold of
      a group stands in other rows, with the prompt again (`rl.placement`).
    num_minibatches: updates per batch; more than 1 is off policy.
    num_epochs: passes over the batch; more than 1 is off policy.
    rows_at_once: rows of a micro-batch, in scoring and in updates; 0 means
      one for each part of the mesh that rows are split over.
    optimizer: see there.
    advantage: see there.
    aepo: see there.
    clip: clipping of negative gradients, see there.
    loss: see there.
    judge: who is asked where the rule finds no match, while other responses
      are still being written. See `reward.grading`.
    overlong: what is done about responses near their cap, and cut by it.
    entropy_source: 'trainer_forward' scores the rows once before the update,
      which also gives old log-probabilities; 'sampler' trusts what the sampler
      returned and saves that pass, unless an older policy began a response.
    memory: documents are read in turns, by the memory agent; None asks about
      the whole of them at once. A trajectory is then all turns of one reading:
      it is graded by its answer, and the advantage of the whole counts for
      every token. `max_prompt_len` and `sampler.max_response_len` cap a turn.
    max_parts: K, parts of a document at most.
    replay_experts: of a mixture of experts: the trainer sends tokens where
      the sampler did, so that rounding does not make them two policies
      (arXiv:2510.11370). Every process holds P * (S + G * R) * L * A bytes of
      them: 24 GiB for 128 prompts of 30B-A3B at 120K + 8 x 50K tokens,
      `oversample` times.
    shuffle_rewards: a control: rewards are permuted over the batch, so that
      they carry no signal.
    rollouts_every: steps between prompts whose responses are kept to read.
  """

  job: Literal['rl'] = 'rl'
  start: str = ''
  seed: int = 0
  mesh: mesh_lib.MeshConfig | None = None
  steps: int
  split: str = 'rl'
  tasks: tuple[str, ...] = ()
  num_prompts: int = 128
  task_balanced: bool = True
  num_samples: int = 8
  oversample: int = 1
  prompts_at_once: int = 0
  samples_at_once: int = 0
  chunk_len: int = 2048
  cut_tokens: int = 0
  cut_seconds: float = 0.0
  max_prompt_len: int
  sampler: decode.SamplerConfig
  row_lens: tuple[int, ...]
  num_minibatches: int = 1
  num_epochs: int = 1
  rows_at_once: int = 0
  optimizer: optimizer_lib.OptimizerConfig
  advantage: advantage_lib.AdvantageConfig = advantage_lib.AdvantageConfig()
  aepo: entropy_control.AepoConfig = entropy_control.AepoConfig()
  clip: clipping.NegativeClipConfig = clipping.NegativeClipConfig()
  loss: loss_lib.LossConfig = loss_lib.LossConfig()
  judge: grading.JudgeConfig = grading.JudgeConfig()
  overlong: overlong_lib.OverlongConfig = overlong_lib.OverlongConfig()
  entropy_source: Literal['trainer_forward', 'sampler'] = 'trainer_forward'
  memory: memory_lib.MemoryConfig | None = None
  max_parts: int = 4
  replay_experts: bool = False
  shuffle_rewards: bool = False
  rollouts_every: int = 10

  def __post_init__(self):
    for name in ('steps', 'num_prompts', 'max_prompt_len', 'num_minibatches',
                 'num_epochs', 'rollouts_every', 'max_parts', 'oversample'):
      if getattr(self, name) < 1:
        raise types.UserError(f'rl.{name}={getattr(self, name)} must be >= 1.')
    for name in ('rows_at_once', 'prompts_at_once', 'samples_at_once',
                 'cut_tokens', 'cut_seconds'):
      if getattr(self, name) < 0:
        raise types.UserError(f'rl.{name}={getattr(self, name)} must be >= 0.')
    advantage_lib.check_group_size(self.num_samples)
    if self.num_prompts % self.num_minibatches:
      raise types.UserError(
          f'rl.num_prompts={self.num_prompts} is not a multiple of '
          f'rl.num_minibatches={self.num_minibatches}.')
    if not self.row_lens or self.row_lens[0] < 1 or any(
        a >= b for a, b in itertools.pairwise(self.row_lens)):
      raise types.UserError(
          f'rl.row_lens={self.row_lens} must be one or more lengths, '
          'increasing.')
    longest = self.max_prompt_len - 1 + self.sampler.max_response_len
    if self.row_lens[-1] < longest:
      raise types.UserError(
          f'rl.row_lens={self.row_lens} cannot hold a prompt of '
          f'max_prompt_len={self.max_prompt_len} and a response of '
          f'{self.sampler.max_response_len} tokens; the longest must be at '
          f'least {longest}.')
    if self.sampler.temperature == 0.0:
      raise types.UserError(
          'rl.sampler.temperature=0 samples G equal responses; use e.g. 1.0.')
    is_off_policy = self.num_minibatches > 1 or self.num_epochs > 1
    if is_off_policy and self.loss.objective == 'on_policy':
      raise types.UserError(
          f'rl.num_minibatches={self.num_minibatches} and rl.num_epochs='
          f'{self.num_epochs} make later updates off policy; set '
          "rl.loss.objective='off_policy'.")
    if self.is_cut:
      self._check_cut()
    if self.oversample > 1 and self.shuffle_rewards:
      # What true rewards choose is a signal.
      raise types.UserError(
          f'rl.oversample={self.oversample} chooses prompts by their rewards '
          'and does not go with rl.shuffle_rewards=True, which is to train on '
          'no signal; use oversample=1.')
    memory_lib.check_cap(self.memory, self.max_prompt_len, name='rl')
    overlong_lib.check(
        self.overlong, max_response_len=self.sampler.max_response_len)
    if self.memory is not None and self.overlong.mode == 'soft':
      raise types.UserError(
          "rl.overlong.mode='soft' does not go with rl.memory: a trajectory "
          "is as long as its document; use 'off' or 'mask_truncated'.")
    if self.memory is not None and self.replay_experts:
      raise types.UserError(
          'rl.replay_experts=True does not go with rl.memory; set it to '
          'False.')

  def _check_cut(self) -> None:
    """Refuses what partial rollouts do not go with."""
    if self.loss.tis_cap is None:
      raise types.UserError(
          f'rl.cut_tokens={self.cut_tokens}, rl.cut_seconds='
          f'{self.cut_seconds}: responses carried over were begun by an older '
          'policy; set rl.loss.tis_cap, e.g. to 2.0.')
    # A step that is cut trains on what is done first; `oversample` waits for
    # all, to choose among them.
    for name, value, allowed in (
        ('num_minibatches', self.num_minibatches, 1),
        ('oversample', self.oversample, 1),
        ('memory', self.memory, None),
        ('replay_experts', self.replay_experts, False)):
      if value != allowed:
        raise types.UserError(
            f'rl.{name}={value} does not go with rl.cut_tokens and '
            f'rl.cut_seconds; use {allowed}.')

  @property
  def is_cut(self) -> bool:
    """Whether a step may leave responses to the next."""
    return self.cut_tokens > 0 or self.cut_seconds > 0

  def carried(self) -> partial.Carried | None:
    """Before the first step; None if nothing is ever carried over."""
    if not self.is_cut:
      return None
    return partial.nothing(
        num_prompts=self.num_prompts, num_samples=self.num_samples,
        max_response_len=self.sampler.max_response_len)

  @property
  def num_asked(self) -> int:
    """Prompts sampled in a step."""
    return self.oversample * self.num_prompts

  @property
  def is_scored(self) -> bool:
    """Whether rows are scored before updates, if only now and then."""
    return self.entropy_source == 'trainer_forward' or self.is_cut

  @property
  def trajectory_len(self) -> int:
    """Tokens of a response, or of all turns of a reading, at most."""
    num_turns = 1 if self.memory is None else self.max_parts + 1
    return num_turns * self.sampler.max_response_len

  @property
  def engine(self) -> engine.EngineConfig:
    """Shapes of the sampler's programs."""
    # However many are asked: lanes and slots are refilled.
    num_prompts, num_samples = self.num_prompts, self.num_samples
    if self.memory is not None:
      # Readers of a document each have a prompt of their own.
      num_prompts, num_samples = num_prompts * num_samples, 1
    return engine.EngineConfig(
        prompt_buckets=(self.max_prompt_len,),
        prompts_at_once=self.prompts_at_once or num_prompts,
        samples_per_prompt=num_samples,
        samples_at_once=self.samples_at_once, chunk_len=self.chunk_len)


def check(stage: RlStage, context: run_state.Context) -> None:
  """Refuses batches and rows that do not divide over the mesh."""
  if stage.replay_experts and context.model.moe is None:
    raise types.UserError(
        'rl.replay_experts=True needs a mixture of experts; the model has '
        'none, so set it to False.')
  for row_len in stage.row_lens:
    token_order.check_len('rl.row_lens', row_len, context.rules.size('seq'))
  shards = context.rules.size('batch')
  sampled = 'prompts_at_once' if stage.prompts_at_once else 'num_prompts'
  for name, hint in ((sampled, ''), ('rows_at_once', ', or 0 for one each')):
    if getattr(stage, name) % shards:
      raise types.UserError(
          f'rl.{name}={getattr(stage, name)} does not divide over the '
          f'{shards} data shards of mesh {dict(context.rules.mesh.shape)}; use '
          f'a multiple of {shards}{hint}.')
  engine.check(stage.engine, context.rules, name='rl')
  if stage.judge.mode == 'inprocess':
    inprocess_judge.check(
        stage.judge.inprocess, context.rules, name='rl.judge.inprocess')


def rows_at_once(stage: RlStage, rules: rules_lib.Rules) -> int:
  """Rows of a micro-batch."""
  return stage.rows_at_once or rules.size('batch')

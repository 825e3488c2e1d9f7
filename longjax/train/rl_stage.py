"""What a stage of reinforcement learning is, and what it cannot be."""

import dataclasses
from typing import Literal

from longjax import types
from longjax.parallel import token_order
from longjax.rl import advantage as advantage_lib
from longjax.rl import clipping, entropy_control
from longjax.rl import loss as loss_lib
from longjax.rollout import decode
from longjax.train import optimizer as optimizer_lib
from longjax.train import run_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlStage:
  """One stage of reinforcement learning; defaults follow QwenLong-L1.5.

  Attributes:
    job: marks the kind of stage.
    steps: batches of rollouts.
    split: of the data set, where prompts come from.
    num_prompts: P, balanced over tasks.
    num_samples: G.
    prompts_per_batch: prompts sampled from at once; 0 means all P.
    max_prompt_len: cap on prompts in tokens (L_in).
    sampler: temperature, nucleus and the cap on responses (L_out).
    row_len: T of the update; at least a prompt and its G longest responses.
    row_multiple: rows are rounded up to a multiple of this.
    num_minibatches: updates per batch; more than 1 is off policy.
    num_epochs: passes over the batch; more than 1 is off policy.
    rows_at_once: rows of a micro-batch, in scoring and in updates; memory then
      does not grow with the batch. 0 means all.
    optimizer: see there.
    advantage: see there.
    aepo: see there.
    clip: clipping of negative gradients, see there.
    loss: see there.
    entropy_source: 'trainer_forward' scores the rows once before the update,
      which also gives old log-probabilities; 'sampler' trusts what the sampler
      returned and saves that pass.
    replay_experts: of a mixture of experts: the trainer sends tokens where
      the sampler did, so that rounding does not make them two policies
      (arXiv:2510.11370). Every process holds P * (S + G * R) * L * A bytes of
      them: 24 GiB for 128 prompts of 30B-A3B at 120K + 8 x 50K tokens.
    shuffle_rewards: a control: rewards are permuted over the batch, so that
      they carry no signal.
    rollouts_every: steps between prompts whose responses are kept to read.
  """

  job: Literal['rl'] = 'rl'
  steps: int
  split: str = 'rl'
  num_prompts: int = 128
  num_samples: int = 8
  prompts_per_batch: int = 0
  max_prompt_len: int
  sampler: decode.SamplerConfig
  row_len: int
  row_multiple: int = 1
  num_minibatches: int = 1
  num_epochs: int = 1
  rows_at_once: int = 0
  optimizer: optimizer_lib.OptimizerConfig
  advantage: advantage_lib.AdvantageConfig = advantage_lib.AdvantageConfig()
  aepo: entropy_control.AepoConfig = entropy_control.AepoConfig()
  clip: clipping.NegativeClipConfig = clipping.NegativeClipConfig()
  loss: loss_lib.LossConfig = loss_lib.LossConfig()
  entropy_source: Literal['trainer_forward', 'sampler'] = 'trainer_forward'
  replay_experts: bool = False
  shuffle_rewards: bool = False
  rollouts_every: int = 10

  def __post_init__(self):
    for name in ('steps', 'num_prompts', 'max_prompt_len', 'row_len',
                 'row_multiple', 'num_minibatches', 'num_epochs',
                 'rollouts_every'):
      if getattr(self, name) < 1:
        raise types.UserError(f'rl.{name}={getattr(self, name)} must be >= 1.')
    for name in ('rows_at_once', 'prompts_per_batch'):
      if getattr(self, name) < 0:
        raise types.UserError(f'rl.{name}={getattr(self, name)} must be >= 0.')
    advantage_lib.check_group_size(self.num_samples)
    if self.num_prompts % self.num_minibatches:
      raise types.UserError(
          f'rl.num_prompts={self.num_prompts} is not a multiple of '
          f'rl.num_minibatches={self.num_minibatches}.')
    if self.row_multiple % (self.rows_at_once or 1):
      raise types.UserError(
          f'rl.row_multiple={self.row_multiple} is not a multiple of '
          f'rl.rows_at_once={self.rows_at_once}.')
    longest = (self.max_prompt_len
               + self.num_samples * self.sampler.max_response_len)
    if self.row_len < longest:
      raise types.UserError(
          f'rl.row_len={self.row_len} cannot hold a prompt of '
          f'max_prompt_len={self.max_prompt_len} and num_samples='
          f'{self.num_samples} responses of {self.sampler.max_response_len} '
          f'tokens; use at least {longest}.')
    if self.sampler.temperature == 0.0:
      raise types.UserError(
          'rl.sampler.temperature=0 samples G equal responses; use e.g. 1.0.')
    is_off_policy = self.num_minibatches > 1 or self.num_epochs > 1
    if is_off_policy and self.loss.objective == 'on_policy':
      raise types.UserError(
          f'rl.num_minibatches={self.num_minibatches} and rl.num_epochs='
          f'{self.num_epochs} make later updates off policy; set '
          "rl.loss.objective='off_policy'.")


def check(stage: RlStage, context: run_state.Context) -> None:
  """Refuses batches and rows that do not divide over the mesh."""
  if stage.replay_experts and context.model.moe is None:
    raise types.UserError(
        'rl.replay_experts=True needs a mixture of experts; the model has '
        'none, so set it to False.')
  for name in ('row_len', 'max_prompt_len'):
    token_order.check_len(
        f'rl.{name}', getattr(stage, name), context.rules.size('seq'))
  shards = context.rules.size('batch')
  sampled = 'prompts_per_batch' if stage.prompts_per_batch else 'num_prompts'
  # Rows of a micro-batch divide those of any batch.
  rows_of_part = 'rows_at_once' if stage.rows_at_once else 'row_multiple'
  for name in (sampled, rows_of_part):
    if getattr(stage, name) % shards:
      raise types.UserError(
          f'rl.{name}={getattr(stage, name)} does not divide over the '
          f'{shards} data shards of mesh {dict(context.rules.mesh.shape)}; '
          f'use a multiple of {shards}.')

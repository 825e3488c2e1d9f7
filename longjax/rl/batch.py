"""A batch of graded rollouts becomes what the update needs.

`pack` lays the responses out as rows in which every prompt stands once;
`plan` turns rewards and entropies into one weight a token: advantages, the
AEPO decision, clipping of negative gradients and the loss denominators, all
over the whole batch and before any gradient.

Shapes: P prompts, G rollouts per prompt, N = P * G responses in prompt-major
order, R response tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longjax import rows, types
from longjax.rl import advantage, clipping, diagnostics, entropy_control, loss


def pack(
    prompts: Sequence[types.Prompt],
    rollouts: types.Rollouts,  # NumPy, [P, G, R]
    *,
    row_len: int,
    row_multiple: int,
    first_trajectory: int = 0,
) -> rows.Rows:
  """Rows in which each prompt stands once, followed by its responses.

  Args:
    prompts: P of them.
    rollouts: their responses.
    row_len: T.
    row_multiple: the number of rows is rounded up to a multiple of this, so
      that few shapes occur and rows divide over devices.
    first_trajectory: number of the first response, if these prompts are only
      a part of the batch.

  Returns:
    NumPy rows whose `trajectory` counts responses prompt by prompt.
  """
  num_samples = rollouts.tokens.shape[1]
  groups = []
  for p, prompt in enumerate(prompts):
    branches = []
    for g in range(num_samples):
      length = int(rollouts.lengths[p, g])
      branches.append(rows.Branch(
          response=rollouts.tokens[p, g, :length].tolist(),
          trajectory=first_trajectory + p * num_samples + g,
          expert_ids=_first(rollouts.expert_ids, (p, g), length)))
    groups.append(rows.Group(
        prompt=prompt.tokens, branches=branches,
        expert_ids=_first(
            rollouts.prompt_expert_ids, (p,), len(prompt.tokens) - 1)))
  return rows.pack(groups, row_len=row_len, row_multiple=row_multiple)


def _first(
    values: Any, index: tuple[int, ...], length: int
) -> np.ndarray | None:
  """`values[index][:length]`, or None of None."""
  return None if values is None else values[index][:length]


@struct.dataclass
class Plan:
  """What the update does with each response.

  Attributes:
    aepo: the controller after this batch's decision.
    advantages: f32[N].
    keep: bool[N], False where AEPO removed the gradient.
    token_weights: f32[N, R], loss weight of each token: one over the
      denominator, 0 where masked.
    is_applied: bool[M], for each mini-batch: False if nothing of it was kept
      and its step is skipped.
    metrics: f32[] each.
  """

  aepo: entropy_control.AepoState
  advantages: jax.Array
  keep: jax.Array
  token_weights: jax.Array
  is_applied: jax.Array
  metrics: dict[str, jax.Array]


@functools.partial(
    jax.jit,
    static_argnames=(
        'num_groups', 'num_stats', 'num_minibatches', 'advantage_config',
        'aepo_config', 'clip_config', 'loss_norm'))
def plan(
    aepo: entropy_control.AepoState,
    *,
    rewards: jax.Array,  # f32[N]
    lengths: jax.Array,  # i32[N]
    group_ids: jax.Array,  # i32[N]
    stat_ids: jax.Array,  # i32[N]
    entropy: jax.Array,  # f32[N, R]
    entropy_t1: jax.Array,  # f32[N, R]
    num_groups: int,
    num_stats: int,
    num_minibatches: int = 1,
    advantage_config: advantage.AdvantageConfig,
    aepo_config: entropy_control.AepoConfig,
    clip_config: clipping.NegativeClipConfig,
    loss_norm: loss.LossNorm,
) -> Plan:
  """Decides, for the whole batch, which token counts how much.

  Args:
    aepo: the controller after the previous batch.
    rewards: one per response.
    lengths: response lengths in tokens.
    group_ids: which prompt each response answers.
    stat_ids: whose rewards share a deviation (the task).
    entropy: of each response token at the sampling temperature, nats.
    entropy_t1: the same at temperature 1, only logged.
    num_groups: P.
    num_stats: bound of `stat_ids`.
    num_minibatches: optimizer batches, consecutive prompts each; divides P.
      Advantages and AEPO look at all of them, denominators at one.
    advantage_config: see there.
    aepo_config: see there.
    clip_config: see there.
    loss_norm: see `loss.response_weights`.

  Returns:
    The plan.
  """
  dims = chex.Dimensions()
  dims['NR'] = entropy.shape
  chex.assert_shape([rewards, lengths, group_ids, stat_ids], dims['N'])
  mask = jnp.arange(dims.R)[None] < lengths[:, None]
  valid = lengths > 0
  output = advantage.advantages(
      rewards, group_ids, stat_ids, valid, method=advantage_config.method,
      num_groups=num_groups, num_stats=num_stats,
      epsilon=advantage_config.epsilon, min_stat_n=advantage_config.min_stat_n)

  entropies = diagnostics.entropies(entropy, entropy_t1, mask)
  control = entropies[aepo_config.entropy_agg].mean()
  aepo = entropy_control.update(aepo, control, config=aepo_config)
  keep = valid & entropy_control.keep(
      aepo, output.advantages, rewards, config=aepo_config)
  keep_tokens = clipping.keep_tokens(
      entropy, mask, output.advantages, method=clip_config.method,
      token_fraction=clip_config.token_fraction,
      seq_fraction=clip_config.seq_fraction)
  weigh = functools.partial(
      loss.response_weights, loss_norm=loss_norm, num_groups=num_groups,
      max_response_len=dims.R, aepo_norm=aepo_config.aepo_norm)
  weights = jax.vmap(weigh)(*(
      x.reshape(num_minibatches, -1)
      for x in (lengths, group_ids, keep))).reshape(-1)

  low, high = entropy_control.thresholds(aepo, aepo_config)
  balance = diagnostics.balance(output.advantages, keep, lengths)
  metrics = {f'entropy/{k}': v.mean() for k, v in entropies.items()} | {
      'aepo/mode': aepo.mode, 'aepo/low': low, 'aepo/high': high,
      'aepo/num_switches': aepo.num_switches,
      'aepo/kept': balance.kept_rows.mean(),
      'aepo/kept_tokens': balance.kept_tokens.mean(),
      'advantage/positive_total': balance.positive_total,
      'advantage/negative_total': balance.negative_total,
      'advantage/positive_rows': balance.positive_rows.mean(),
      'advantage/zero_groups': output.frac_zero_groups,
      'advantage/singleton_groups': output.num_singleton_groups,
      'advantage/fallbacks': output.num_fallbacks,
      'length/mean': jnp.sum(lengths) / jnp.maximum(jnp.sum(valid), 1),
  }
  return Plan(
      aepo=aepo, advantages=output.advantages, keep=keep,
      token_weights=weights[:, None] * keep_tokens * mask,
      is_applied=~jax.vmap(
          functools.partial(entropy_control.is_skipped, aepo))(
              keep.reshape(num_minibatches, -1),
              valid.reshape(num_minibatches, -1)),
      metrics=metrics)


def unpack(
    values: np.ndarray,  # f32[B, T]
    packed: rows.Rows,  # NumPy, [B, T]
    *,
    num_responses: int,
    max_response_len: int,
) -> np.ndarray:  # f32[N, R]
  """Per-token values of rows, laid out by response; 0 past the end."""
  out = np.zeros((num_responses, max_response_len), values.dtype)
  mask = packed.loss_mask
  out[packed.trajectory[mask], packed.response_index[mask]] = values[mask]
  return out

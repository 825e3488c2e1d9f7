"""A batch of graded rollouts becomes what the update needs.

`pack` lays the responses out as micro-batches of rows in which every prompt
stands once, or more often if its responses do not fit into one row;
`plan` turns rewards and entropies into one weight a token: advantages, the
AEPO decision, clipping of negative gradients and the loss denominators, all
over the whole batch and before any gradient.

Shapes: P prompts, G rollouts per prompt, N = P * G responses in prompt-major
order, R response tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longjax import rows, types
from longjax.rl import (
    advantage,
    clipping,
    diagnostics,
    entropy_control,
    loss,
    placement,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
  """Rows of one optimizer step, and what of them had to be computed.

  Attributes:
    micro_batches: NumPy rows, [B, T] each with its own T.
    num_needed: tokens of all groups, each prompt once.
    num_repeated: tokens of further copies of prompts.
  """

  micro_batches: list[rows.Rows]
  num_needed: int
  num_repeated: int


def padding(packed: Sequence[Packed]) -> dict[str, float]:
  """Metrics: the share of computed places that no response needs.

  'padding' counts empty places and repeated prompts;
  'padding/repeated_prefix' only these.
  """
  places = sum(part.tokens.size for p in packed for part in p.micro_batches)
  needed = sum(p.num_needed for p in packed)
  repeated = sum(p.num_repeated for p in packed)
  return {'padding': 1.0 - needed / places,
          'padding/repeated_prefix': repeated / places}


def pack(
    prompts: Sequence[types.Prompt],
    rollouts: types.Rollouts,  # NumPy, [P, G, R]
    *,
    row_lens: Sequence[int],
    num_rows: int,
) -> Packed:
  """Rows of prompts and their responses; see `groups` and `pack_groups`."""
  return pack_groups(
      [group for of_prompt in groups(prompts, rollouts)
       for group in of_prompt], row_lens=row_lens, num_rows=num_rows)


def groups(
    prompts: Sequence[types.Prompt],
    rollouts: types.Rollouts,  # NumPy, [P, G, R]
) -> list[list[rows.Group]]:
  """A group for each prompt, or none if all of its responses have length 0.

  `trajectory` counts responses prompt by prompt; those of length 0 are left
  out.
  """
  num_samples = rollouts.lengths.shape[1]

  def branch(p: int, g: int) -> rows.Branch:
    length = int(rollouts.lengths[p, g])
    return rows.Branch(
        response=np.asarray(rollouts.tokens[p, g, :length]),
        trajectory=p * num_samples + g,
        expert_ids=_first(rollouts.expert_ids, (p, g), length))

  return [
      [rows.Group(
          prompt=prompt.tokens,
          branches=[branch(p, g)
                    for g in np.flatnonzero(rollouts.lengths[p]).tolist()],
          expert_ids=_first(
              rollouts.prompt_expert_ids, (p,), len(prompt.tokens) - 1))]
      if rollouts.lengths[p].any() else []
      for p, prompt in enumerate(prompts)]


def pack_groups(
    groups: Sequence[rows.Group],
    *,
    row_lens: Sequence[int],
    num_rows: int,
) -> Packed:
  """Rows in which the prefix of each group stands once, if it can.

  Args:
    groups: to place.
    row_lens: the lengths rows may have, increasing. A group that does not fit
      into one of the longest rows stands in several, see `placement`.
    num_rows: of a micro-batch.

  Returns:
    Micro-batches; at least one, of padding if there is no group.
  """
  lengths = [
      placement.Lengths(
          prefix=len(group.prompt) - 1,
          branches=tuple(branch.num_tokens for branch in group.branches))
      for group in groups]
  micro_batches = placement.place(
      lengths, row_lens=row_lens, num_rows=num_rows)

  def part(piece: placement.Piece) -> rows.Group:
    group = groups[piece.group]
    return dataclasses.replace(
        group, branches=[group.branches[b] for b in piece.branches])

  num_needed = sum(n.prefix + sum(n.branches) for n in lengths)
  num_placed = sum(
      piece.num_tokens for made in micro_batches for row in made.rows
      for piece in row)
  return Packed(
      micro_batches=[
          rows.write([[part(piece) for piece in row] for row in made.rows],
                     row_len=made.row_len)
          for made in micro_batches],
      num_needed=num_needed, num_repeated=num_placed - num_needed)


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
    keep: bool[N], False where AEPO or the caller removed the gradient.
    token_weights: f32[N, R], loss weight of each token: one over the
      denominator, 0 where masked.
    is_applied: bool[M], for each mini-batch: False if it has no response that
      is kept, so that its step is skipped: moments and decay too.
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
    keep: jax.Array | None = None,  # bool[N]
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
    keep: False takes a response's gradient, not its place in statistics and
      denominators; None takes nobody's.
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
  # A batch of nothing has no entropy, which the controller passes over.
  control = jnp.where(
      jnp.any(valid), entropies[aepo_config.entropy_agg].mean(), jnp.nan)
  aepo = entropy_control.update(aepo, control, config=aepo_config)
  is_kept = valid & entropy_control.keep(
      aepo, output.advantages, rewards, config=aepo_config)
  keep = is_kept if keep is None else is_kept & keep
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
  }
  return Plan(
      aepo=aepo, advantages=output.advantages, keep=keep,
      token_weights=weights[:, None] * keep_tokens * mask,
      is_applied=jnp.any(keep.reshape(num_minibatches, -1), axis=1),
      metrics=metrics)


def unpack(
    values: Sequence[np.ndarray],  # f32[B, T], each its own
    packed: Sequence[rows.Rows],  # NumPy, [B, T], each its own
    *,
    num_responses: int,
    max_response_len: int,
) -> np.ndarray:  # f32[N, R]
  """Per-token values of micro-batches, by response; 0 past the end."""
  out = np.zeros((num_responses, max_response_len), np.float32)
  for of_part, part in zip(values, packed, strict=True):
    mask = part.loss_mask
    out[part.trajectory[mask], part.response_index[mask]] = of_part[mask]
  return out

"""Published recipes as values of `RlStage`, for config files.

  rl = dict(**presets.grpo(), job='rl', steps=100, ...)

A preset says how rewards become updates; lengths, batch and learning rate are
the config's own. All set the same keys, and the others say how they differ from
`grpo`. None has a penalty on the distance to a reference policy: the recipes
from DAPO on have none, and GRPO's is left out.
"""

from typing import Any


def grpo() -> dict[str, Any]:
  """GRPO (DeepSeekMath, arXiv:2402.03300), one update a batch."""
  return dict(
      num_minibatches=1,
      advantage=dict(method='group_std'),
      loss=dict(
          loss_norm='seq_mean', objective='on_policy', eps_low=0.2,
          eps_high=0.2, dual_clip=3.0),
      aepo=dict(enabled=False),
      oversample=1,
      overlong=dict(mode='off'),
      judge=dict(mode='none'))


def drgrpo() -> dict[str, Any]:
  """Dr. GRPO (arXiv:2503.20783): GRPO without its two normalisations."""
  made = grpo()
  return made | dict(
      advantage=dict(method='none'),
      loss=made['loss'] | dict(loss_norm='const'))


def dapo() -> dict[str, Any]:
  """DAPO (arXiv:2503.14476), as its script sets it.

  512 prompts in 16 updates there; the penalty's 4,096 tokens are of 20,480.
  """
  made = grpo()
  return made | dict(
      num_minibatches=16,
      loss=made['loss'] | dict(
          loss_norm='batch_tokens', objective='off_policy', eps_high=0.28,
          dual_clip=10.0),
      oversample=3,
      overlong=dict(mode='soft', buffer_len=4096))


def qwenlong_l1() -> dict[str, Any]:
  """QwenLong-L1 (arXiv:2505.17667).

  GRPO's advantages, DAPO's loss, sampling and penalty on the last 1,000 of
  10,000 response tokens; four clipped updates a batch; the larger of rule and
  judge as the reward.
  """
  made = grpo()
  return made | dict(
      num_minibatches=4,
      loss=made['loss'] | dict(
          loss_norm='batch_tokens', objective='off_policy'),
      oversample=3,
      overlong=dict(mode='soft', buffer_len=1000),
      judge=dict(mode='inprocess'))


def qwenlong_l15() -> dict[str, Any]:
  """QwenLong-L1.5 (arXiv:2512.12967), what RlStage has by default but a judge.

  One update a batch, advantages over the task's deviation, AEPO. A judge
  grades what the rule does not accept; the paper asks a server.
  """
  made = grpo()
  return made | dict(
      advantage=dict(method='task_std'),
      loss=made['loss'] | dict(loss_norm='batch_tokens', eps_high=0.28),
      aepo=dict(enabled=True),
      judge=dict(mode='inprocess'))

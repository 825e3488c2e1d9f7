"""Qwen3-4B, the model of the paper's ablations, at the paper's lengths.

  python -m longjax --config=configs/qwen3_4b.py \
      --config.init_from=/path/to/Qwen3-4B

runs the recipe of configs/qwen3_30b_a3b.py: three stages of RL on prompts of up
to 20K, 60K and 120K tokens, RL of the memory agent, a merge, and RL again.
configs/qwen3_4b holds the model's config.json and no weights, enough for

  python -m longjax --config=configs/qwen3_4b.py:stage3 --plan=v5p:4x4x4

Variants: stage1, stage2, stage3 and memory are one of the stages each. The
model's own limit is 40,960 positions: all but the first need a checkpoint made
for more, such as Qwen3-4B-Thinking-2507, of the same shape.

Hardware: TPU v5p:4x4x4 (64 chips), on which the planner says stages 1 to 3 fit;
docs/plans.md has its figures. The agent's stage has not been planned.
Time: not run. At best, by the planner's estimate at the length caps, see
docs/plans.md.
Score: not run.

Batch, rate, sampling and lengths are those of configs/qwen3_30b_a3b.py.
"""

from ml_collections import config_dict

from configs import qwen3_30b_a3b
from longjax import types

VARIANTS = ('stage1', 'stage2', 'stage3', 'memory')


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """The recipe, or one of `VARIANTS`."""
  if arg and arg not in VARIANTS:
    raise types.UserError(
        f'configs/qwen3_4b.py has no variant {arg!r}; use one of '
        f'{", ".join(VARIANTS)}.')
  config = qwen3_30b_a3b.get_config(arg)
  config.init_from = 'configs/qwen3_4b'
  # Two devices share a sample's keys: one has no room for eight responses.
  config.mesh = dict(data=1, fsdp=-1, seq=16, tensor=2)
  for stage in config.stages.values():
    if stage.job == 'rl':
      stage.prompts_at_once, stage.samples_at_once = 32, 128
  return config

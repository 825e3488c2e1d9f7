"""Qwen3-4B, the model of the paper's ablations, at the paper's lengths.

  python -m longjax --config=configs/qwen3_4b.py \
      --config.init_from=/path/to/Qwen3-4B

runs three stages of RL, each from the policy of the one before: prompts of up
to 20K tokens with responses of up to 12K, then 60K + 20K, then 120K + 50K.
configs/qwen3_4b holds the model's config.json and no weights, enough for

  python -m longjax --config=configs/qwen3_4b.py:stage3 --plan=v5p:4x4x4

Variants: stage1, stage2, stage3 are one of the stages each. The model's own
limit is 40,960 positions: stages 2 and 3 need a checkpoint made for more, such
as Qwen3-4B-Thinking-2507, of the same shape.

Hardware: TPU v5p:4x4x4 (64 chips), on which the planner says each stage fits;
docs/plans.md has its figures.
Time: not run. At best, by the planner's estimate at the length caps, see
docs/plans.md.
Score: not run.

Batch, rate, sampling and lengths are those of configs/qwen3_30b_a3b.py.
"""

from ml_collections import config_dict

from longjax import types

VARIANTS = ('stage1', 'stage2', 'stage3')

_K = 1024
# Name: prompt cap, response cap, row lengths in K, steps.
_STAGES = {
    'stage1': (20 * _K, 12 * _K, (64, 240, 480), 105),
    'stage2': (60 * _K, 20 * _K, (128, 224, 448), 50),
    'stage3': (120 * _K, 50 * _K, (176, 264, 520), 48),
}


def _rl(name):
  prompt_len, response_len, row_lens, steps = _STAGES[name]
  return dict(
      job='rl', split=name, steps=steps, num_prompts=128, num_samples=8,
      prompts_at_once=32, samples_at_once=128, max_prompt_len=prompt_len,
      row_lens=tuple(row_len * _K for row_len in row_lens),
      sampler=dict(
          temperature=0.7, top_p=0.95, max_response_len=response_len),
      optimizer=dict(learning_rate=2e-6))


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """All stages, or one of `VARIANTS`."""
  if arg and arg not in VARIANTS:
    raise types.UserError(
        f'configs/qwen3_4b.py has no variant {arg!r}; use one of '
        f'{", ".join(VARIANTS)}.')
  config = config_dict.ConfigDict()
  config.init_from = 'configs/qwen3_4b'
  config.compute = dict(dtype='bfloat16', remat='attention')
  # Two devices share a sample's keys: one has no room for eight responses.
  config.mesh = dict(data=1, fsdp=-1, seq=16, tensor=2)
  config.checkpoint_every = 5
  names = [arg] if arg else list(_STAGES)
  config.recipe = ('synth', *names)
  config.stages = {name: _rl(name) for name in names}
  config.stages.synth = dict(job='synth', examples=dict(splits=tuple(
      dict(name=name, names='train', num_per_task=800, min_tokens=2 * _K,
           max_tokens=_STAGES[name][0] - _K) for name in names)))
  return config

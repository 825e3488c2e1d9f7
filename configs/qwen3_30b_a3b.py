"""The paper's model, Qwen3-30B-A3B-Thinking-2507, at the paper's lengths.

  python -m longjax --config=configs/qwen3_30b_a3b.py \
      --config.init_from=/path/to/Qwen3-30B-A3B-Thinking-2507

runs three stages of RL, each from the policy of the one before: prompts of up
to 20K tokens with responses of up to 12K, then 60K + 20K, then 120K + 50K.
configs/qwen3_30b_a3b holds the model's config.json and no weights, enough for

  python -m longjax --config=configs/qwen3_30b_a3b.py:stage3 --plan=v5p:4x4x8

Variants: stage1, stage2, stage3 are one of the stages each; sft_1m is
fine-tuning on documents of a million tokens.

Hardware: TPU v5p:4x4x8 (128 chips), on which the planner says each variant
fits; docs/plans.md has its figures.
Time: not run. At best, by the planner's estimate at the length caps, see
docs/plans.md; responses that end before their cap shorten it.
Score: not run.

128 prompts of 8 samples, learning rate 2e-6, temperature 0.7, top-p 0.95 and
the lengths are those of QwenLong-L1.5 (arXiv:2512.12967); the numbers of steps
are read off its Fig. 11. Prompts are synthetic; the paper's are not public.
"""

from ml_collections import config_dict

from longjax import types

VARIANTS = ('stage1', 'stage2', 'stage3', 'sft_1m')

_K = 1024
# Name: prompt cap, response cap, row lengths in K, steps. The longest rows hold
# one or more prompts with their eight longest responses, in whole blocks of 512
# tokens on each of 16 devices; there are 8 at once, one for each device along
# `expert`. The longer they are, the less often weights are gathered, and the
# less is wasted between groups. Shorter rows take what is left over.
_STAGES = {
    'stage1': (20 * _K, 12 * _K, (64, 240, 480), 105),
    'stage2': (60 * _K, 20 * _K, (128, 224, 448), 50),
    'stage3': (120 * _K, 50 * _K, (176, 264, 520), 48),
}


def _split(name, names, num_per_task, shortest, longest):
  return dict(name=name, names=names, num_per_task=num_per_task,
              min_tokens=shortest, max_tokens=longest)


def _rl(name):
  prompt_len, response_len, row_lens, steps = _STAGES[name]
  return dict(
      job='rl', split=name, steps=steps, num_prompts=128, num_samples=8,
      samples_at_once=256, max_prompt_len=prompt_len,
      row_lens=tuple(row_len * _K for row_len in row_lens),
      sampler=dict(
          temperature=0.7, top_p=0.95, max_response_len=response_len),
      optimizer=dict(learning_rate=2e-6))


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """All stages, or one of `VARIANTS`."""
  if arg and arg not in VARIANTS:
    raise types.UserError(
        f'configs/qwen3_30b_a3b.py has no variant {arg!r}; use one of '
        f'{", ".join(VARIANTS)}.')
  config = config_dict.ConfigDict()
  config.init_from = 'configs/qwen3_30b_a3b'
  config.compute = dict(dtype='bfloat16', remat='attention')
  config.mesh = dict(data=1, fsdp=-1, seq=16, expert=8)
  config.checkpoint_every = 5
  names = [arg] if arg in _STAGES else list(_STAGES)
  config.recipe = ('synth', *names)
  config.stages = {name: _rl(name) for name in names}
  config.stages.synth = dict(job='synth', examples=dict(splits=tuple(
      _split(name, 'train', 800, 2 * _K, _STAGES[name][0] - _K)
      for name in names)))
  if arg == 'sft_1m':
    config.mesh = dict(data=1, fsdp=-1, seq=64, expert=2)
    config.recipe = ('synth', 'sft')
    config.stages = dict(
        synth=dict(job='synth', examples=dict(splits=(
            _split('sft', 'train', 100, 256 * _K, 1000 * _K),))),
        sft=dict(
            job='sft', steps=200, num_rows=8, rows_at_once=2,
            row_len=_K * _K,
            optimizer=dict(
                learning_rate=1e-5, schedule='cosine', warmup_steps=10)))
  return config

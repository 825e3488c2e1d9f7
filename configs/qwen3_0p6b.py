"""Qwen3-0.6B at the lengths of the paper's first stage: a trial of a slice.

  python -m longjax --config=configs/qwen3_0p6b.py \
      --config.init_from=/path/to/Qwen3-0.6B

runs RL on prompts of up to 20K tokens with responses of up to 12K.
configs/qwen3_0p6b holds the model's config.json and no weights, enough for

  python -m longjax --config=configs/qwen3_0p6b.py --plan=v6e:4x4

Hardware: TPU v6e:4x4 (16 chips), on which the planner says it fits;
docs/plans.md has its figures.
Time: not run. At best, by the planner's estimate at the length caps, see
docs/plans.md.
Score: not run.
"""

from ml_collections import config_dict

from longjax import types

_K = 1024


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """The run; it has no variants."""
  if arg:
    raise types.UserError(f'configs/qwen3_0p6b.py has no variant {arg!r}.')
  config = config_dict.ConfigDict()
  config.init_from = 'configs/qwen3_0p6b'
  config.compute = dict(dtype='bfloat16', remat='attention')
  config.mesh = dict(data=1, fsdp=-1, seq=4)
  config.checkpoint_every = 10
  config.recipe = ('synth', 'rl')
  config.stages = dict(
      synth=dict(job='synth', examples=dict(splits=(
          dict(name='rl', names='train', num_per_task=800,
               min_tokens=2 * _K, max_tokens=19 * _K),))),
      rl=dict(
          job='rl', steps=105, num_prompts=128, num_samples=8,
          prompts_at_once=16, samples_at_once=64, max_prompt_len=20 * _K,
          row_lens=(64 * _K, 120 * _K, 240 * _K),
          sampler=dict(
              temperature=0.7, top_p=0.95, max_response_len=12 * _K),
          optimizer=dict(learning_rate=2e-6)))
  return config

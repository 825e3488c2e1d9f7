"""QwenLong-L1's recipe for R1-Distill-Qwen-14B: SFT, then RL in two phases.

  python -m longjax --config=configs/qwenlong_l1.py \
      --config.init_from=/path/to/DeepSeek-R1-Distill-Qwen-14B

warms up by fine-tuning on demonstrations over prompts of up to 20K tokens, then
runs RL on prompts of up to 20K and of up to 60K, with responses of up to 10K.
configs/r1_distill_qwen_14b holds the model's config.json and no weights, enough
for

  python -m longjax --config=configs/qwenlong_l1.py:phase2 --plan=v5p:4x4x4

Variants: sft, phase1, phase2 are one of the stages each.

Hardware: meant for TPU v5p:4x4x4 (64 chips); not planned yet.
Time: not run.
Score: not run.

How rewards become updates is `presets.qwenlong_l1`: four clipped updates a
batch, of the 128 groups that are chosen from 384, a penalty on the last 1,000
tokens of a response, and a judge. Here that is the model the run begins with;
the paper's is another one, of 1.5B, which

  --config.stages.phase1.judge.mode=endpoint \
  --config.stages.phase1.judge.endpoint.url=http://HOST:8000/v1 \
  --config.stages.phase1.judge.endpoint.model=Qwen2.5-1.5B-Instruct

asks where it is served. 8 samples of a prompt, learning rate 2e-6, temperature
0.7, top-p 0.95 and the lengths are those of QwenLong-L1 (arXiv:2505.17667) and
its script; the numbers of steps are ours. Prompts and demonstrations are
synthetic: the paper fine-tunes on about 5.3K answers of R1, and draws 1.6K
prompts from four sources.
"""

from ml_collections import config_dict

from longjax import types
from longjax.train import presets

VARIANTS = ('sft', 'phase1', 'phase2')

_K = 1024
_RESPONSE_LEN = 10 * _K
# Name: prompt cap, row lengths in K, steps. The middle rows hold one or two
# prompts with their eight longest responses, in whole blocks of 512 tokens on
# each of 16 devices.
_PHASES = {
    'phase1': (20 * _K, (64, 208, 416), 100),
    'phase2': (60 * _K, (80, 144, 288), 50),
}


def _split(name, num_per_task, longest):
  return dict(name=name, names='train', num_per_task=num_per_task,
              min_tokens=2 * _K, max_tokens=longest - _K)


def _sft():
  """Three passes over the demonstrations, about 2^20 tokens a step."""
  return dict(
      job='sft', split='sft', steps=120, num_rows=32, rows_at_once=2,
      row_len=32 * _K,
      optimizer=dict(
          learning_rate=1e-5, schedule='cosine', warmup_steps=4))


def _rl(name):
  prompt_len, row_lens, steps = _PHASES[name]
  return dict(
      **presets.qwenlong_l1(),
      job='rl', split=name, steps=steps, num_prompts=128, num_samples=8,
      prompts_at_once=32, samples_at_once=128, max_prompt_len=prompt_len,
      row_lens=tuple(row_len * _K for row_len in row_lens),
      sampler=dict(
          temperature=0.7, top_p=0.95, max_response_len=_RESPONSE_LEN),
      optimizer=dict(learning_rate=2e-6))


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """All stages, or one of `VARIANTS`."""
  if arg and arg not in VARIANTS:
    raise types.UserError(
        f'configs/qwenlong_l1.py has no variant {arg!r}; use one of '
        f'{", ".join(VARIANTS)}.')
  config = config_dict.ConfigDict()
  config.init_from = 'configs/r1_distill_qwen_14b'
  config.compute = dict(dtype='bfloat16', remat='attention')
  config.mesh = dict(data=1, fsdp=-1, seq=16, tensor=2)
  config.checkpoint_every = 5
  names = [arg] if arg else list(VARIANTS)
  config.recipe = ('synth', *names)
  config.stages = {
      name: _sft() if name == 'sft' else _rl(name) for name in names}
  config.stages.synth = dict(job='synth', examples=dict(splits=tuple(
      _split('sft', 880, 20 * _K) if name == 'sft'
      else _split(name, 800, _PHASES[name][0]) for name in names)))
  return config

"""The paper's model, Qwen3-30B-A3B-Thinking-2507, at the paper's lengths.

  python -m longjax --config=configs/qwen3_30b_a3b.py \
      --config.init_from=/path/to/Qwen3-30B-A3B-Thinking-2507

runs the whole recipe: RL on prompts of up to 20K tokens with responses of up to
12K, then 60K + 20K, then 120K + 50K; RL of the memory agent, which reads up to
four parts of 32K; a merge of the two; and RL on 120K + 50K once more. Before
each longer stage the policy tries the candidates, what it always solves is left
out, and what it failed at before comes back.
configs/qwen3_30b_a3b holds the model's config.json and no weights, enough for

  python -m longjax --config=configs/qwen3_30b_a3b.py:stage3 --plan=v5p:4x4x8

Variants: stage1, stage2, stage3 and memory are one of the stages each; sft_1m
is fine-tuning on documents of a million tokens.

Hardware: TPU v5p:4x4x8 (128 chips), on which the planner says each variant
fits; docs/plans.md has its figures.
Time: not run. At best, by the planner's estimate at the length caps, see
docs/plans.md; responses that end before their cap shorten it.
Score: not run.

128 prompts of 8 samples, learning rate 2e-6, temperature 0.7, top-p 0.95 and
the lengths are those of QwenLong-L1.5 (arXiv:2512.12967); the numbers of steps
of the first three stages are read off its Fig. 11, the others are ours. Prompts
are synthetic; the paper's are not public.
"""

from ml_collections import config_dict

from longjax import types

VARIANTS = ('stage1', 'stage2', 'stage3', 'memory', 'sft_1m')

_K = 1024
# Name: prompt cap, response cap, row lengths in K, steps. The longest rows hold
# one or more prompts with their eight longest responses, in whole blocks of 512
# tokens on each of 16 devices; there are 8 at once, one for each device along
# `expert`. The longer they are, the less often weights are gathered, and the
# less is wasted between groups. Shorter rows take what is left over.
# Of the agent, a turn: a part of 32K, the memory, and 20K to think and note.
_STAGES = {
    'stage1': (20 * _K, 12 * _K, (64, 240, 480), 105),
    'stage2': (60 * _K, 20 * _K, (128, 224, 448), 50),
    'stage3': (120 * _K, 50 * _K, (176, 264, 520), 48),
    'memory': (42 * _K, 20 * _K, (64, 272, 544), 40),
}
_MEMORY = dict(
    part_len=32 * _K, line_end_share=0.05, memory_len=7 * _K, plan_len=512)
_EVALUATED = (32 * _K, 64 * _K, 120 * _K)


def _split(name, names, num_per_task, shortest, longest):
  return dict(name=name, names=names, num_per_task=num_per_task,
              min_tokens=shortest, max_tokens=longest)


def _sampler(name):
  return dict(temperature=0.7, top_p=0.95, max_response_len=_STAGES[name][1])


def _rl(name, **changes):
  prompt_len, _, row_lens, steps = _STAGES[name]
  return dict(
      job='rl', split=name, steps=steps, num_prompts=128, num_samples=8,
      samples_at_once=256, max_prompt_len=prompt_len,
      row_lens=tuple(row_len * _K for row_len in row_lens),
      sampler=_sampler(name), optimizer=dict(learning_rate=2e-6)) | changes


def _select(name, candidates, seen):
  """What the next stage learns from, by what the policy now solves."""
  return dict(
      job='select', split=candidates, size=2400, seen=(seen,),
      max_prompt_len=_STAGES[name][0], sampler=_sampler(name))


def _evals(**changes):
  return dict(
      job='evals', splits=('test',), lengths=_EVALUATED,
      sampler=_sampler('stage3')) | changes


def _recipe():
  """Names of all stages in order, and the stages."""
  stages = dict(
      synth=dict(job='synth', examples=dict(splits=(
          _split('stage1', 'train', 800, 2 * _K, 19 * _K),
          _split('candidates2', 'train', 800, 20 * _K, 59 * _K),
          _split('candidates3', 'train', 800, 60 * _K, 119 * _K),
          _split('memory', 'train', 400, 64 * _K, 119 * _K),
          _split('test', 'test', 40, 16 * _K, 119 * _K)))),
      evals=_evals(),
      agent=_evals(
          memory=_MEMORY, max_prompt_len=_STAGES['memory'][0],
          sampler=_sampler('memory')),
      stage1=_rl('stage1'),
      chosen2=_select('stage2', 'candidates2', 'stage1'),
      stage2=_rl('stage2', split='chosen2'),
      chosen3=_select('stage3', 'candidates3', 'stage2'),
      stage3=_rl('stage3', split='chosen3'),
      memory=_rl('memory', memory=_MEMORY, max_parts=4),
      merge=dict(job='merge', experts=('stage3', 'memory')),
      chosen4=_select('stage3', 'candidates3', 'stage3'),
      stage4=_rl('stage3', split='chosen4', steps=30))
  both = 'evals', 'agent'
  return ('synth', *both, 'stage1', 'chosen2', 'stage2', 'chosen3', 'stage3',
          *both, 'memory', *both, 'merge', *both, 'chosen4', 'stage4',
          *both), stages


def _one(name):
  """A stage of RL alone, without selection."""
  longest = 119 if name == 'memory' else _STAGES[name][0] // _K - 1
  memory = dict(memory=_MEMORY, max_parts=4) if name == 'memory' else {}
  return ('synth', name), {
      name: _rl(name, **memory),
      'synth': dict(job='synth', examples=dict(splits=(
          _split(name, 'train', 800, 2 * _K, longest * _K),)))}


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """The recipe, or one of `VARIANTS`."""
  if arg and arg not in VARIANTS:
    raise types.UserError(
        f'configs/qwen3_30b_a3b.py has no variant {arg!r}; use one of '
        f'{", ".join(VARIANTS)}.')
  config = config_dict.ConfigDict()
  config.init_from = 'configs/qwen3_30b_a3b'
  config.compute = dict(dtype='bfloat16', remat='attention')
  config.mesh = dict(data=1, fsdp=-1, seq=16, expert=8)
  config.checkpoint_every = 5
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
  config.recipe, config.stages = _one(arg) if arg else _recipe()
  return config

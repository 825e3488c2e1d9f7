"""What does RL of the memory agent give, and what does a merge keep of it?

  python -m longjax --config=configs/ablations/memory.py

Checks 7 and 8 of the recipe (QwenLong-L1.5, arXiv:2512.12967, Sec. 4.5). The
agent is trained on documents of at most five parts; held-out ones have up to
64. The policy before it and the agent are merged by SCE at two settings, by
TIES and linearly; RL on whole documents then goes on from the first of these.
Time: 53 minutes on two cores beside other work.
"""

from configs import tiny
from configs.ablations import arms

# Tokens of documents that are read in about so many parts: a part ends with a
# line, so it has 7/8 of its cap on average.
_PARTS = {parts: parts * 224 for parts in (4, 8, 16, 64)}


def _agent(*parts):
  return dict(
      job='evals', splits=tuple(f'test_{n}_parts' for n in parts),
      tasks=tiny.MEMORY_TASKS, lengths=tuple(_PARTS[n] for n in parts),
      prompts_at_once=48, sampler=tiny.SAMPLER, memory=tiny.MEMORY,
      max_prompt_len=448)


def _merge(seed, **config):
  return dict(job='merge', base=f'sft_{seed}', merge=config,
              experts=(f'rl_1024_{seed}', f'memory_{seed}'))


def _before(_):
  return dict(
      sft=tiny.sft(600) | dict(
          memory=tiny.MEMORY, memory_fraction=0.7,
          memory_tasks=tiny.MEMORY_TASKS),
      rl_256=tiny.rl('rl_256', 30, 256, 48),
      rl_640=tiny.rl('rl_640', 60, 640, 72),
      rl_1024=tiny.rl('rl_1024', 20, 1024, 96),
      far=_agent(16, 64))


def _memory(_):
  return dict(
      memory=tiny.rl(
          'memory', 80, 448, 72, tasks=tiny.MEMORY_TASKS, memory=tiny.MEMORY,
          max_parts=5, num_prompts=6),
      far=_agent(16, 64))


def get_config():
  return arms.experiment(
      'RL of the memory agent lifts it, beyond the lengths it was trained on '
      'too; a merge keeps that and the reading of whole documents.',
      before=_before,
      arms={
          'RL on whole documents': 'rl_1024',
          'RL of the agent': _memory,
          'merged, SCE': lambda seed: dict(sce=_merge(seed)),
          'merged, SCE of half': lambda seed: dict(half=_merge(
              seed, density=0.5, select='coef_only')),
          'merged, TIES': lambda seed: dict(ties=_merge(
              seed, method='ties', density=0.5)),
          'merged, linear': lambda seed: dict(linear=_merge(
              seed, method='linear')),
          'SCE, then RL': lambda seed: dict(
              rl4=tiny.rl('rl_1024', 10, 1024, 96)
              | dict(start=f'sce_{seed}'))},
      splits=(
          tiny.split('sft', 'train', 1000, 64, 608),
          tiny.split('rl_256', 'train', 150, 150, 236),
          tiny.split('rl_640', 'train', 200, 400, 608),
          tiny.split('rl_1024', 'train', 120, 760, 980),
          tiny.split('memory', 'train', 300, 640, 880),
          *(tiny.split(f'test_{parts}_parts', 'test', 24, n - 64, n - 32)
            for parts, n in _PARTS.items())),
      measures=(
          dict(name='whole documents'),
          dict(name='agent, 4 and 8 parts', read='agent',
               lengths=(_PARTS[4], _PARTS[8])),
          *(dict(name=f'agent, {parts} parts, {n:,} tokens', read='agent',
                 lengths=(n,)) for parts, n in _PARTS.items())),
      curves=('reward/mean', 'entropy/seq_mean'),
      evals=dict(evals=arms.EVALS, agent=_agent(4, 8)))

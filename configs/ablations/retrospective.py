"""Do hard examples of an earlier stage help the next one?

  python -m longjax --config=configs/ablations/retrospective.py

Check 11 of the recipe (QwenLong-L1, arXiv:2505.17667, Sec. 3.2). Both arms
choose 72 examples for the second stage by what the policy solves; one of them
gives a quarter of the places to examples of the first stage, failures first.
Time: 15 minutes on two cores beside other work.
"""

from configs import tiny
from configs.ablations import arms


def _before(seed):
  def select(share):
    return dict(
        job='select', split='rl_640', size=72, seen=(f'first_{seed}',),
        max_prompt_len=640, num_samples=4, prompts_at_once=24,
        sampler=tiny.SAMPLER, retrospective=dict(share=share))

  return dict(
      sft=tiny.sft(300), first=tiny.rl('rl_256', 40, 640, 72),
      fresh=select(0.0), mixed=select(0.25))


def get_config():
  return arms.experiment(
      'Hard examples of an earlier stage help the next one.',
      before=_before,
      arms={
          'new examples': lambda seed: dict(
              without=tiny.rl(f'fresh_{seed}', 50, 640, 72)),
          'a quarter seen before': lambda seed: dict(
              with_seen=tiny.rl(f'mixed_{seed}', 50, 640, 72))},
      splits=(
          tiny.split('sft', 'train', 1000, 64, 608),
          tiny.split('rl_256', 'train', 150, 150, 236),
          tiny.split('rl_640', 'train', 24, 400, 608)),
      measures=(
          dict(name='held-out reward'),
          dict(name='256 tokens', lengths=(256,)),
          dict(name='640 tokens', lengths=(640,)),
          dict(name='groups without a signal', metric='advantage/zero_groups',
               take='mean'),
          dict(name='reward, end', metric='reward/mean')),
      curves=('reward/mean', 'advantage/zero_groups', 'entropy/seq_mean'))

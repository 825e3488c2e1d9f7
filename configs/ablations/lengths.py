"""Do growing lengths beat training on the longest from the start?

  python -m longjax --config=configs/ablations/lengths.py

Check 6 of the recipe (QwenLong-L1.5, arXiv:2512.12967, Sec. 4.1). Both arms
see as many tokens of prompts: 30 steps of up to 236, 50 of up to 608 and 20 of
up to 980 tokens are as many as 56 of the last kind.
Time: 34 minutes on two cores beside other work.
"""

from configs import tiny
from configs.ablations import arms


def get_config():
  return arms.experiment(
      'Stages of growing length beat the longest one at equal tokens.',
      before=lambda _: dict(sft=tiny.sft(300)),
      arms={
          'longest only': lambda _: dict(
              longest=tiny.rl('rl_1024', 56, 1024, 96)),
          'growing': lambda _: dict(
              first=tiny.rl('rl_256', 30, 256, 48),
              second=tiny.rl('rl_640', 50, 640, 72),
              third=tiny.rl('rl_1024', 20, 1024, 96))},
      splits=(
          tiny.split('sft', 'train', 1000, 64, 608),
          tiny.split('rl_256', 'train', 150, 150, 236),
          tiny.split('rl_640', 'train', 200, 400, 608),
          tiny.split('rl_1024', 'train', 150, 760, 980)),
      measures=(
          dict(name='held-out reward'),
          dict(name='256 tokens', lengths=(256,)),
          dict(name='640 tokens', lengths=(640,)),
          dict(name='1,024 tokens', lengths=(1024,)),
          dict(name='seconds a step', metric='time/step_seconds',
               take='mean')),
      curves=('reward/mean', 'entropy/seq_mean'))

"""Does learning from successes alone lower the entropy?

  python -m longjax --config=configs/ablations/positive_only.py

Check 12 of the recipe: AEPO counts on it (QwenLong-L1.5, arXiv:2512.12967,
Sec. 4.4). From one policy, ten steps on the same prompts with all advantages,
and ten with the positive ones only; three pairs.
Time: 6 minutes on two cores.
"""

from configs import tiny
from configs.ablations import arms


def _rl(**aepo):
  return tiny.rl('rl', 10, 640, 72) | dict(aepo=aepo)


def get_config():
  return arms.experiment(
      'Advantages of successes alone lower the entropy, all of them raise it.',
      before=lambda _: dict(sft=tiny.sft(300)),
      arms={
          'all': lambda _: dict(all=_rl(enabled=False)),
          # Any entropy is above this band; that it is, is checked after the
          # baseline.
          'positive only': lambda _: dict(positive=_rl(
              entropy_low=0.0, entropy_high=1e-9, baseline_steps=99))},
      splits=(
          tiny.split('sft', 'train', 1000, 64, 608),
          tiny.split('rl', 'train', 200, 400, 608)),
      measures=(
          dict(name='change of entropy', metric='entropy/seq_mean',
               take='change'),
          dict(name='slope of entropy, per 100 steps',
               metric='entropy/seq_mean', take='slope'),
          dict(name='reward', metric='reward/mean', take='mean')),
      curves=('entropy/seq_mean',), evals={}, seeds=(0, 1, 2))

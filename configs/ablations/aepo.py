"""Does AEPO bound the entropy where plain policy gradients let it drift?

  python -m longjax --config=configs/ablations/aepo.py

Check 2 of the recipe (QwenLong-L1.5, arXiv:2512.12967, Sec. 4.4). After SFT on
one style the entropy starts low; a learning rate five times that of the main
job moves it. Three seeds, the same prompts and steps.
Time: 12 minutes on two idle cores.
"""

from configs import tiny
from configs.ablations import arms


def _rl(enabled):
  stage = tiny.rl('rl', 50, 640, 72)
  return stage | dict(
      optimizer=dict(learning_rate=1.5e-3),
      # The lowest ratio at which Fig. 11 switches.
      aepo=dict(enabled=enabled, high_ratio=1.4))


def get_config():
  return arms.experiment(
      'AEPO keeps the entropy in its band; without it entropy leaves it.',
      before=lambda _: dict(sft=tiny.sft(300, reasoning_fraction=1.0)),
      arms={
          'without': lambda _: dict(without=_rl(False)),
          'AEPO': lambda _: dict(aepo=_rl(True))},
      splits=(
          tiny.split('sft', 'train', 600, 64, 608),
          tiny.split('rl', 'train', 100, 512, 608)),
      measures=(
          dict(name='entropy, end', metric='entropy/seq_mean'),
          dict(name='above the band', metric='entropy/seq_mean',
               take='above_band'),
          dict(name='in the band', metric='entropy/seq_mean', take='in_band'),
          dict(name='switches', metric='aepo/num_switches'),
          dict(name='reward, end', metric='reward/mean')),
      curves=('entropy/seq_mean', 'reward/mean', 'aepo/mode'),
      evals={}, seeds=(0, 1, 2))

"""Does AEPO bound the entropy where plain policy gradients let it drift?

  python -m longjax --config=configs/ablations/aepo.py

Check 2 of the recipe (QwenLong-L1.5, arXiv:2512.12967, Sec. 4.4), which asks to
provoke a drift if there is none: after SFT on one style the entropy starts low,
and a learning rate five times that of the main job moves it. Three seeds, the
same prompts and steps. Variant `weak_sft` has half as much SFT and twice the
rate of the main job.
Time: 15 minutes on two cores beside other work.
"""

from ml_collections import config_dict

from configs import tiny
from configs.ablations import arms

VARIANTS = ('weak_sft',)


def get_config(arg: str = '') -> config_dict.ConfigDict:
  sft_steps, learning_rate = (150, 6e-4) if arg == 'weak_sft' else (300, 1.5e-3)

  def rl(enabled):
    return tiny.rl('rl', 50, 640, 72) | dict(
        optimizer=dict(learning_rate=learning_rate),
        # The lowest ratio at which Fig. 11 switches.
        aepo=dict(enabled=enabled, high_ratio=1.4))

  return arms.experiment(
      'AEPO keeps the entropy in its band; without it entropy leaves it.',
      before=lambda _: dict(sft=tiny.sft(sft_steps, reasoning_fraction=1.0)),
      arms={
          'without': lambda _: dict(without=rl(False)),
          'AEPO': lambda _: dict(aepo=rl(True))},
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

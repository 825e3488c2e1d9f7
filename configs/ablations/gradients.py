"""Does a failed response's entropy tell how large its gradient is?

  python -m longjax --config=configs/ablations/gradients.py

Check 1 of the recipe (QwenLong-L1.5, arXiv:2512.12967, Sec. 4.4: Spearman
0.96). Two seeds, each after SFT and after 40 steps of RL.
Time: 6 minutes on two cores.
"""

from ml_collections import config_dict

from configs import tiny
from configs.ablations import arms


def get_config() -> config_dict.ConfigDict:
  def chain(_):
    measured = dict(
        job='gradients', num_exact=48, rl=tiny.rl('rl', 4, 640, 72))
    return dict(
        sft=tiny.sft(300), after_sft=measured,
        rl=tiny.rl('rl', 40, 640, 72), after_rl=measured)

  return arms.experiment(
      'The entropy of a failed response tells the size of its gradient.',
      before=chain, arms={'RL': 'rl'},
      splits=(
          tiny.split('sft', 'train', 1000, 64, 608),
          tiny.split('rl', 'train', 200, 400, 608)),
      measures=(
          dict(name='entropy, end', metric='entropy/seq_mean'),
          dict(name='reward, end', metric='reward/mean')),
      curves=('entropy/seq_mean', 'grad_norm'), evals={})

"""What do task-balanced batches and the task's deviation change?

  python -m longjax --config=configs/ablations/advantage.py

Checks 3 and 4 of the recipe (QwenLong-L1.5, arXiv:2512.12967, Sec. 4.2-4.3).
`dialogue` is graded by degrees, all other tasks by 0 or 1.
Time: 15 minutes on two cores.
"""

from configs import tiny
from configs.ablations import arms


def _rl(method, task_balanced=True):
  # Without AEPO, which would hide what these do to the entropy.
  return tiny.rl('rl', 60, 640, 72) | dict(
      task_balanced=task_balanced, advantage=dict(method=method),
      aepo=dict(enabled=False))


def get_config():
  return arms.experiment(
      'Task-balanced batches steady training, and the deviation of the task '
      'helps most where rewards are dense.',
      before=lambda _: dict(sft=tiny.sft(300)),
      arms={
          'group_std': lambda _: dict(group=_rl('group_std', False)),
          '+ balanced': lambda _: dict(balanced=_rl('group_std')),
          '+ batch_std': lambda _: dict(batch=_rl('batch_std')),
          '+ task_std': lambda _: dict(task=_rl('task_std'))},
      splits=(
          tiny.split('sft', 'train', 1000, 64, 608),
          tiny.split('rl', 'train', 200, 400, 608)),
      measures=(
          dict(name='held-out reward'),
          dict(name='dense task', tasks=('dialogue',)),
          dict(name='gradient norm, std', metric='grad_norm', take='std'),
          dict(name='length, per 100 steps', metric='length/mean',
               take='slope'),
          dict(name='entropy, end', metric='entropy/seq_mean'),
          dict(name='reward, end', metric='reward/mean')),
      curves=('reward/mean', 'grad_norm', 'length/mean', 'entropy/seq_mean'))

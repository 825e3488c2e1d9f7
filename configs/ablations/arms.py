"""What the experiments of configs/ablations share: arms and their seeds.

Every experiment is a small recipe on the base model and the tasks of
configs/tiny.py. Each seed trains its own policy up to where the arms part; the
arms of a seed then see the same prompts. The report compares them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import config_dict

from configs import tiny

Stages = Mapping[str, Mapping[str, Any]]

EVALS = dict(
    job='evals', splits=('test_256', 'test_640', 'test_1024'),
    lengths=(256, 640, 1024), prompts_at_once=24, sampler=tiny.SAMPLER)
TEST_SPLITS = (
    tiny.split('test_256', 'test', 16, 200, 240),
    tiny.split('test_640', 'test', 32, 512, 608),
    tiny.split('test_1024', 'test', 16, 960, 1000))


def experiment(
    claim: str,
    *,
    before: Callable[[int], Stages],
    arms: Mapping[str, str | Callable[[int], Stages]],
    splits: tuple[Mapping[str, Any], ...],
    measures: tuple[Mapping[str, Any], ...],
    curves: tuple[str, ...] = (),
    evals: Stages | None = None,
    seeds: tuple[int, ...] = (0, 1),
) -> config_dict.ConfigDict:
  """A run whose report compares `arms`.

  Args:
    claim: what is asked.
    before: for a seed, its stages up to where the arms part. The first begins
      with the base model. Names get the seed behind them, but for evaluations.
    arms: for a seed, the stages of each arm, likewise. The first one begins
      where `before` ended, unless it names its `start`. Or the name of a stage
      of `before`, as it stood then.
    splits: of the data set that is trained on.
    measures: columns of the table, see `evals.comparison`.
    curves: metrics that are drawn.
    evals: run before the arms part, and on every arm; {} for none.
    seeds: of SFT, and of all stages after it.
  """
  evals = {'evals': EVALS} if evals is None else evals
  stages: dict[str, Any] = {
      'synth': dict(job='synth', examples=dict(
          facts_min=2, facts_max=4, splits=(*splits, *TEST_SPLITS))), **evals}
  recipe = ['synth']
  compared: dict[str, list[tuple[str, ...]]] = {name: [] for name in arms}

  def add(chain: Stages, seed: int, start: str) -> list[str]:
    names = []
    for name, stage in chain.items():
      changes = {}
      if stage['job'] == 'evals':
        stages[name] = stage
        recipe.append(name)
        continue
      if stage['job'] in ('sft', 'rl'):
        changes = dict(seed=seed)
        if not names:
          changes['start'] = stage.get('start', start)
      names.append(f'{name}_{seed}')
      stages[names[-1]] = dict(stage) | changes
      recipe.append(names[-1])
    return names

  for seed in seeds:
    parted = add(before(seed), seed, 'base')
    recipe.extend(evals)
    policy = [n for n in parted if stages[n]['job'] in ('sft', 'rl')][-1]
    for name, chain in arms.items():
      if isinstance(chain, str):
        compared[name].append((f'{chain}_{seed}',))
        continue
      compared[name].append(tuple(add(chain(seed), seed, policy)))
      recipe.extend(evals)

  config = config_dict.ConfigDict()
  config.init_from = 'configs/tiny_base'
  config.cpu_devices = 2
  config.export = False
  config.recipe = tuple(recipe)
  config.stages = stages
  config.comparison = dict(
      claim=claim, measures=measures, curves=curves,
      arms=tuple(dict(name=name, seeds=tuple(stages_of))
                 for name, stages_of in compared.items()))
  return config

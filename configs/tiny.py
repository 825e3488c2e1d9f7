"""The whole recipe on a laptop: base model, SFT, AEPO reinforcement learning.

  python -m longjax --config=configs/tiny.py --workdir=/tmp/tiny

Hardware: 2 CPU cores, no downloads. The 0.7M-parameter base model lies in
configs/tiny_base and is made by configs/tiny_base.py.
Time: about 10 minutes on two idle cores.
Score: held-out reward by task and context length before SFT, after SFT and
after RL is printed at the end and stands in the README.

Variants, e.g. --config=configs/tiny.py:control_sft

  own_data          SFT and RL on a JSON-lines file of your own,
                    --config.stages.synth.path=FILE (format:
                    longjax/data/documents.py). Without it, on lookup
                    questions about the Python standard library, which
                    `python -m longjax.synthesis.python_lookup
                    --output=runs/python_lookup.jsonl` writes first.
  control_sft       further SFT for the wall time of RL instead of RL
  control_shuffled  RL on rewards permuted over the batch: no signal
  entropy_drift     RL at five times the rate after SFT on one style: entropy
                    starts low, rises out of its band, AEPO brings it back
"""

from ml_collections import config_dict

from longjax import types

VARIANTS = ('own_data', 'control_sft', 'control_shuffled', 'entropy_drift')


def _split(name, names, num_per_task, shortest, longest):
  return dict(name=name, names=names, num_per_task=num_per_task,
              min_tokens=shortest, max_tokens=longest)


def _sft(steps, reasoning_fraction=0.4):
  """Demonstrations, some terse and some that quote their evidence first."""
  return dict(
      job='sft', steps=steps, num_rows=4, row_len=1024,
      reasoning_fraction=reasoning_fraction,
      optimizer=dict(
          learning_rate=1e-3, schedule='cosine', warmup_steps=20))


def _own_data():
  """Stages for about 400 questions over about 600 tokens each."""
  sampler = dict(temperature=1.0, max_response_len=96)
  return dict(
      synth=dict(
          job='synth', path='runs/python_lookup.jsonl', drop_too_long=True),
      evals=dict(
          job='evals', splits=('validation', 'test'), lengths=(640, 768),
          prompts_at_once=24, sampler=sampler),
      sft=dict(
          job='sft', steps=200, num_rows=4, row_len=896,
          reasoning_fraction=0.5,
          optimizer=dict(
              learning_rate=1e-3, schedule='cosine', warmup_steps=20)),
      rl=dict(
          job='rl', steps=40, num_prompts=12, num_samples=8,
          max_prompt_len=768, sampler=sampler, row_lens=(768, 1152, 1728),
          entropy_source='sampler', rollouts_every=5,
          optimizer=dict(learning_rate=2e-4)))


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """The run, or one of `VARIANTS`."""
  if arg and arg not in VARIANTS:
    raise types.UserError(
        f'configs/tiny.py has no variant {arg!r}; use one of '
        f'{", ".join(VARIANTS)}.')
  config = config_dict.ConfigDict()
  config.init_from = 'configs/tiny_base'
  config.cpu_devices = 2
  config.recipe = ('synth', 'evals', 'sft', 'evals', 'rl', 'evals')
  sampler = dict(temperature=1.0, max_response_len=72)
  config.stages = dict(
      synth=dict(
          job='synth',
          examples=dict(
              facts_min=2, facts_max=4,
              splits=(
                  _split('sft', 'train', 1000, 64, 608),
                  _split('rl', 'train', 200, 512, 608),
                  _split('test_256', 'test', 32, 200, 240),
                  _split('test_512', 'test', 48, 512, 608),
                  _split('test_1024', 'test', 12, 960, 1000),
                  _split('test_2048', 'test', 6, 1980, 2024)))),
      evals=dict(
          job='evals',
          splits=('test_256', 'test_512', 'test_1024', 'test_2048'),
          lengths=(256, 640, 1024, 2048), prompts_at_once=24,
          sampler=sampler),
      sft=_sft(500),
      rl=dict(
          job='rl', steps=160, num_prompts=12, num_samples=8,
          max_prompt_len=640, sampler=sampler, row_lens=(768, 1152, 1728),
          entropy_source='sampler',
          optimizer=dict(learning_rate=3e-4)))
  if arg == 'own_data':
    config.stages = _own_data()
  if arg == 'control_sft':
    config.recipe = ('synth', 'evals', 'sft', 'evals', 'further_sft', 'evals')
    config.stages.further_sft = _sft(900)
  if arg == 'control_shuffled':
    config.stages.rl.shuffle_rewards = True
  if arg == 'entropy_drift':
    config.recipe = ('synth', 'sft', 'rl')
    config.stages.synth.examples.splits = (
        _split('sft', 'train', 600, 64, 608),
        _split('rl', 'train', 100, 512, 608))
    config.stages.sft = _sft(300, reasoning_fraction=1.0)
    config.stages.rl.steps = 50
    config.stages.rl.optimizer.learning_rate = 1.5e-3
    # The lowest ratio at which Fig. 11 of arXiv:2512.12967 switches.
    config.stages.rl.aepo = dict(high_ratio=1.4)
  return config

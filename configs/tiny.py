"""The whole recipe on a laptop: SFT, staged RL, a memory agent, a merge.

  python -m longjax --config=configs/tiny.py --workdir=/tmp/tiny

A small base model learns to answer and to take notes (SFT), is trained by AEPO
on prompts of up to 256, 640 and 1,024 tokens, then as a memory agent that reads
longer documents part by part, is merged with what it was before, and trained
once more. Both ways of reading are evaluated on held-out examples.

Hardware: 2 CPU cores, no downloads. The 0.7M-parameter base model lies in
configs/tiny_base and is made by configs/tiny_base.py.
Time: 13 minutes on two idle cores.
Score: held-out reward by task and context length, of documents read as a whole
and part by part, is printed at the end and stands in the README.

Variants, e.g. --config=configs/tiny.py:control_sft

  one_stage         SFT and one stage of RL, without memory agent and merge;
                    the variants below differ from it
  own_data          SFT and RL on a JSON-lines file of your own,
                    --config.stages.synth.path=FILE (format:
                    longjax/data/documents.py). Without it, on lookup
                    questions about the Python standard library, which
                    `python -m longjax.synthesis.python_lookup
                    --output=runs/python_lookup.jsonl` writes first.
  control_sft       further SFT for the wall time of RL instead of RL
  control_shuffled  RL on rewards permuted over the batch: no signal
"""

from ml_collections import config_dict

from longjax import types

VARIANTS = ('one_stage', 'own_data', 'control_sft', 'control_shuffled')

# Whose questions the memory agent is asked: the others need more than a network
# of this size can note.
MEMORY_TASKS = ('mc', 'multihop', 'reading')
MEMORY = dict(part_len=256, line_end_share=0.25, memory_len=40, plan_len=0,
               wording='short')
SAMPLER = dict(temperature=1.0, max_response_len=72)


def split(name, names, num_per_task, shortest, longest):
  """Examples of so many tokens with one set of names."""
  return dict(name=name, names=names, num_per_task=num_per_task,
              min_tokens=shortest, max_tokens=longest)


def sft(steps, reasoning_fraction=0.4):
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


def rl(split, steps, max_prompt_len, max_response_len, **changes):
  """A stage of RL under its caps in tokens."""
  return dict(
      job='rl', split=split, steps=steps, num_prompts=12, num_samples=8,
      max_prompt_len=max_prompt_len, row_lens=(768, 1152, 1728),
      sampler=dict(temperature=1.0, max_response_len=max_response_len),
      entropy_source='sampler', optimizer=dict(learning_rate=3e-4)) | changes


def _full():
  """Names of all stages in order, and the stages."""
  splits = (
      split('sft', 'train', 1000, 64, 608),
      split('rl_256', 'train', 150, 150, 236),
      split('rl_640', 'train', 200, 400, 608),
      split('rl_1024', 'train', 120, 760, 980),
      split('memory', 'train', 300, 640, 880),
      split('test_256', 'test', 16, 200, 240),
      split('test_640', 'test', 24, 512, 608),
      split('test_1024', 'test', 12, 960, 1000),
      split('test_2048', 'test', 6, 1980, 2024),
      split('test_2560', 'test', 16, 2560, 2640))
  stages = dict(
      synth=dict(job='synth', examples=dict(
          facts_min=2, facts_max=4, splits=splits)),
      evals=dict(
          job='evals',
          splits=('test_256', 'test_640', 'test_1024', 'test_2048'),
          lengths=(256, 640, 1024, 2048), prompts_at_once=24,
          sampler=SAMPLER),
      # Documents of up to four times the longest prompt of SFT.
      agent=dict(
          job='evals', splits=('test_1024', 'test_2560'), tasks=MEMORY_TASKS,
          lengths=(1024, 2688), prompts_at_once=36, sampler=SAMPLER,
          memory=MEMORY, max_prompt_len=448),
      sft=sft(600) | dict(
          memory=MEMORY, memory_fraction=0.7, memory_tasks=MEMORY_TASKS),
      rl1=rl('rl_256', 30, 256, 48),
      rl2=rl('rl_640', 70, 640, 72),
      rl3=rl('rl_1024', 25, 1024, 96),
      memory=rl(
          'memory', 50, 448, 72, tasks=MEMORY_TASKS, memory=MEMORY,
          max_parts=5, num_prompts=6),
      # Relative to the model that RL began with.
      merge=dict(job='merge', base='sft', experts=('rl3', 'memory')),
      rl4=rl('rl_1024', 10, 1024, 96))
  both = 'evals', 'agent'
  return ('synth', 'evals', 'sft', *both, 'rl1', 'rl2', 'rl3', *both, 'memory',
          *both, 'merge', *both, 'rl4', *both), stages


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """The run, or one of `VARIANTS`."""
  if arg and arg not in VARIANTS:
    raise types.UserError(
        f'configs/tiny.py has no variant {arg!r}; use one of '
        f'{", ".join(VARIANTS)}.')
  config = config_dict.ConfigDict()
  config.init_from = 'configs/tiny_base'
  config.cpu_devices = 2
  if not arg:
    config.recipe, config.stages = _full()
    return config
  config.recipe = ('synth', 'evals', 'sft', 'evals', 'rl', 'evals')
  config.stages = dict(
      synth=dict(
          job='synth',
          examples=dict(
              facts_min=2, facts_max=4,
              splits=(
                  split('sft', 'train', 1000, 64, 608),
                  split('rl', 'train', 200, 512, 608),
                  split('test_256', 'test', 32, 200, 240),
                  split('test_512', 'test', 48, 512, 608),
                  split('test_1024', 'test', 12, 960, 1000),
                  split('test_2048', 'test', 6, 1980, 2024)))),
      evals=dict(
          job='evals',
          splits=('test_256', 'test_512', 'test_1024', 'test_2048'),
          lengths=(256, 640, 1024, 2048), prompts_at_once=24,
          sampler=SAMPLER),
      sft=sft(500),
      rl=dict(
          job='rl', steps=160, num_prompts=12, num_samples=8,
          max_prompt_len=640, sampler=SAMPLER, row_lens=(768, 1152, 1728),
          entropy_source='sampler',
          optimizer=dict(learning_rate=3e-4)))
  if arg == 'own_data':
    config.stages = _own_data()
  if arg == 'control_sft':
    config.recipe = ('synth', 'evals', 'sft', 'evals', 'further_sft', 'evals')
    config.stages.further_sft = sft(900)
  if arg == 'control_shuffled':
    config.stages.rl.shuffle_rewards = True
  return config

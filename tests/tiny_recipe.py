"""A whole recipe that takes seconds, and how to compare what two runs left."""

import contextlib
import copy
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from longjax import config as config_lib
from longjax import recipe, run_config

_OPTIMIZER = {'learning_rate': 3e-3, 'warmup_steps': 2}
_SAMPLER = {'temperature': 1.0, 'max_response_len': 12}
# The stages have equal shapes where they can, so that few programs have to be
# compiled.
_VALUES: dict[str, Any] = {
    'recipe': ('synth', 'evals', 'pretrain', 'sft', 'evals', 'rl', 'evals'),
    'model': {
        'vocab_size': 400, 'embed_dim': 32, 'ffn_dim': 48, 'num_layers': 2,
        'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 16,
        'rope_theta': 1e4},
    'compute': {'attention': 'reference'},
    'checkpoint_every': 2,
    'stages': {
        'synth': {'job': 'synth', 'examples': {
            'tasks': ('multihop', 'numeric'),
            'splits': (
                {'name': 'sft', 'names': 'train', 'num_per_task': 12,
                 'min_tokens': 64, 'max_tokens': 200},
                {'name': 'rl', 'names': 'train', 'num_per_task': 12,
                 'min_tokens': 64, 'max_tokens': 200},
                {'name': 'test', 'names': 'test', 'num_per_task': 8,
                 'min_tokens': 64, 'max_tokens': 200})}},
        'pretrain': {
            'job': 'pretrain', 'steps': 3, 'num_rows': 8, 'row_len': 384,
            'text': {}, 'optimizer': _OPTIMIZER},
        'sft': {
            'job': 'sft', 'steps': 5, 'num_rows': 8, 'row_len': 384,
            'optimizer': _OPTIMIZER},
        'rl': {
            'job': 'rl', 'steps': 5, 'num_prompts': 8, 'num_samples': 2,
            'max_prompt_len': 280, 'row_lens': (384,), 'rollouts_every': 1,
            'optimizer': _OPTIMIZER, 'sampler': _SAMPLER,
            # Half of the groups are left to the next step.
            'samples_at_once': 8, 'cut_tokens': 90, 'loss': {'tis_cap': 2.0}},
        'evals': {
            'job': 'evals', 'lengths': (280,), 'prompts_at_once': 8,
            'num_samples': 2, 'sampler': _SAMPLER},
    },
}

_MEMORY = {'part_len': 64, 'line_end_share': 0.2, 'memory_len': 12,
           'plan_len': 4, 'wording': 'short'}
# Changes that add the memory agent, a merge and what follows it.
FULL: dict[str, Any] = {
    'recipe': (*_VALUES['recipe'], 'memory', 'merge', 'agent', 'chosen',
               'rl_merged'),
    'stages.memory': {
        'job': 'rl', 'steps': 3, 'num_prompts': 4, 'num_samples': 2,
        'max_prompt_len': 280, 'max_parts': 6, 'row_lens': (384,),
        'rollouts_every': 1, 'memory': _MEMORY, 'optimizer': _OPTIMIZER,
        'sampler': _SAMPLER},
    'stages.synth.examples.splits': (
        *_VALUES['stages']['synth']['examples']['splits'],
        {'name': 'more', 'names': 'train', 'num_per_task': 10,
         'min_tokens': 64, 'max_tokens': 200}),
    'stages.merge': {'job': 'merge', 'base': 'sft',
                     'experts': ('rl', 'memory')},
    'stages.chosen': {
        'job': 'select', 'split': 'more', 'size': 16, 'seen': ('rl',),
        'num_samples': 2, 'max_prompt_len': 280, 'prompts_at_once': 8,
        'stratify': {'max_unsolved': 1.0}, 'sampler': _SAMPLER,
        'retrospective': {'max_unsolved': 1.0}},
    'stages.rl_merged': _VALUES['stages']['rl'] | {
        'split': 'chosen', 'steps': 2, 'samples_at_once': 0, 'cut_tokens': 0,
        'loss': {}},
    'stages.agent': {
        'job': 'evals', 'lengths': (280,), 'prompts_at_once': 8,
        'sampler': _SAMPLER, 'memory': _MEMORY, 'max_prompt_len': 280},
}


def values(changes: dict[str, Any] | None = None) -> dict[str, Any]:
  """What a config file would return, with dotted keys changed."""
  made = copy.deepcopy(_VALUES)
  for key, value in (changes or {}).items():
    *path, last = key.split('.')
    holder = made
    for part in path:
      holder = holder.setdefault(part, {})
    holder[last] = value
  return made


def config(changes: dict[str, Any] | None = None) -> run_config.RunConfig:
  """The recipe with dotted keys changed."""
  return config_lib.build(run_config.RunConfig, values(changes), 'config')


def run(workdir: pathlib.Path, changes: dict[str, Any] | None = None) -> int:
  """Runs the recipe on one device."""
  workdir.mkdir(exist_ok=True)
  return recipe.run(config(changes), workdir, devices=jax.devices()[:1])


@contextlib.contextmanager
def shared_programs(directory: pathlib.Path) -> Iterator[None]:
  """All runs of this process compile each program once."""
  before = jax.config.values['jax_compilation_cache_dir']
  compilation_cache.reset_cache()
  jax.config.update('jax_compilation_cache_dir', str(directory))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  yield
  compilation_cache.reset_cache()
  jax.config.update('jax_compilation_cache_dir', before)


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """metrics.jsonl without what the clock and earlier attempts decide."""
  found = []
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    record = json.loads(line)
    record['values'] = {
        k: repr(v) for k, v in record['values'].items()  # NaN equals itself.
        if not k.startswith(('time/', 'judge/wait_seconds', 'judge/cached'))}
    found.append(record)
  return found


def left_behind(workdir: pathlib.Path) -> dict[str, Any]:
  """All that must be equal bit for bit between runs of one configuration."""
  files = ['rollouts.jsonl', 'model/model.safetensors', 'model/config.json',
           *(str(p.relative_to(workdir))
             for pattern in ('evals/*.json', 'prompt_stats/*.jsonl')
             for p in sorted(workdir.glob(pattern)))]
  return {'metrics.jsonl': metrics(workdir)} | {
      name: (workdir / name).read_bytes() for name in files}

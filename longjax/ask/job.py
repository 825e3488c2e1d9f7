"""`job=ask`: answers questions about documents of any length.

  documents --fit into the window--> one prompt ------------------> answer
            --do not--------------> part by part --> a memory ----> answer

What is held does not grow with the documents: files are read line by line,
parts are forgotten when they have been read. Samples depend on (seed,
question, turn), so an inquiry that was killed ends with the same answers.
"""

import dataclasses
import functools
import os
import pathlib
import resource
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from longjax import types
from longjax.agents import memory as memory_lib
from longjax.ask import (
    files,
    inquiry,
    parts,
    saved,
    settings,
    turns,
    whole,
    writing,
)
from longjax.data import tokenizer as tokenizer_lib
from longjax.parallel import mesh as mesh_lib
from longjax.parallel import rules as rules_lib
from longjax.train import mirror, model_files
from longjax.train import workdir as workdir_lib

# Of what is saved; another number does not go on with it.
_FORMAT = 1


def run(
    config: settings.AskConfig,
    workdir: str | os.PathLike[str],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> int:
  """Answers; returns the exit code.

  Args:
    config: what is asked.
    workdir: of all inquiries, see `ask.saved`.
    devices: None means all.

  Raises:
    UserError: there is nothing to read, or it does not fit.
  """
  config.check_given()
  if mirror.is_remote(workdir):
    raise types.UserError(
        f'--workdir={workdir} is no directory on a disk; give one.')
  if config.cpu_devices and devices is None:  # Before any use of a device.
    mesh_lib.split_cpu(config.cpu_devices)
  paths = files.find(config.patterns, field='documents')
  source = model_files.find(config.model, field='model')
  tokenizer = tokenizer_lib.load(source.directory)
  window = settings.window(config, source.directory)
  agent = _agent(config, tokenizer, window)
  folder = saved.Folder(workdir, _asked_of(
      config, paths, source, workdir=pathlib.Path(workdir).resolve()))
  asked = _restored(folder.load(), config, agent, paths)

  def save() -> None:
    folder.save(agent, [one.reading for one in asked], sizes=[
        dataclasses.asdict(context.size) for context in _contexts(asked)])

  fitting, long = _split(config, asked, tokenizer, window)
  if long:
    settings.check_parts(
        config, window, turns.lengths(agent, config))
  is_answered = all(one.reading.answer for one in asked)
  if is_answered:
    logging.info('Answered before, see %s', folder.path / saved.FILE)
  shown = writing.known(asked, show_thinking=config.show_thinking)
  if is_answered:
    return 0
  save()
  workdir_lib.use_compilation_cache(workdir)
  rules = rules_lib.Rules(mesh_lib.make(config.mesh, devices))
  compute = config.compute(rules.mesh.devices.flat[0].platform)
  with compute.matmul_precision():
    model = inquiry.Model(
        config=source.model, tokenizer=tokenizer, rules=rules,
        params=source.load(rules, np.dtype(compute.activation_dtype)),
        compute=compute)
    for some, answer in (
        (fitting, functools.partial(whole.answer, window=window)),
        (long, functools.partial(turns.answer, agent=agent))):
      if not all(one.reading.answer for one in some):
        answer(model, config, some, shown=shown, save=save)
  logging.info('%s', _memory_use())
  return 0


def _agent(
    config: settings.AskConfig, tokenizer: tokenizer_lib.Tokenizer, window: int
) -> memory_lib.MemoryAgent:
  """Reads in parts as long as the window allows."""
  least = memory_lib.MemoryAgent(
      tokenizer, dataclasses.replace(config.memory, part_len=2))
  _, longest = turns.lengths(least, config)
  return memory_lib.MemoryAgent(tokenizer, dataclasses.replace(
      config.memory, part_len=settings.part_len(config, window, longest - 2)))


def _asked_of(
    config: settings.AskConfig, paths: Sequence[pathlib.Path],
    source: model_files.Source, *, workdir: pathlib.Path,
) -> dict[str, Any]:
  """What tells this inquiry from others.

  Args:
    config: what is set.
    paths: of the documents.
    source: who is asked.
    workdir: of all inquiries, absolute. It may lie in the model's directory
      or hold it; what inquiries write there is no part of the model.
  """
  # A checkpoint's own files, and those of the tokenizer or the whole model.
  folders = {pathlib.Path(source.name), source.directory}
  compiled = workdir / workdir_lib.COMPILED_FOLDER

  def is_ours(path: pathlib.Path) -> bool:
    at = path.resolve()
    return compiled in at.parents or (
        at.name == saved.FILE and at.parent.parent == workdir)

  return {
      'format': _FORMAT, 'settings': config.facts(),
      'questions': list(config.questions),
      'documents': [saved.identity(path) for path in paths],
      'model': source.name, 'model_files': [
          saved.identity(path) for folder in sorted(folders)
          for path in sorted(folder.rglob('*')) if path.is_file()
          and not is_ours(path)]}


def _restored(
    content: dict[str, Any], config: settings.AskConfig,
    agent: memory_lib.MemoryAgent, paths: Sequence[pathlib.Path],
) -> list[inquiry.Asked]:
  """Where all questions stand, of what was saved or at the beginning."""
  groups = [(path,) for path in paths] if config.each_file else [tuple(paths)]
  sizes = [parts.Size(**size) for size in content.get('sizes', ())]
  if not sizes:
    logging.info('Counting the tokens of %d file(s).', len(paths))
    sizes = [parts.size(agent, group) for group in groups]
  asked: list[inquiry.Asked] = []
  for group, size in zip(groups, sizes, strict=True):
    context = inquiry.Context(paths=group, size=size)
    for question in config.questions:
      about = [files.shown(group[0])] * (len(groups) > 1)
      about += [question] * (len(config.questions) > 1)
      number = len(asked)
      asked.append(inquiry.Asked(
          context=context, question=question, number=number,
          heading=': '.join(about),
          reading=saved.Reading.from_json(content['readings'][number])
          if content else saved.Reading()))
  return asked


def _contexts(asked: Sequence[inquiry.Asked]) -> list[inquiry.Context]:
  """Each once, in order."""
  return list(dict.fromkeys(one.context for one in asked))


def _split(
    config: settings.AskConfig, asked: Sequence[inquiry.Asked],
    tokenizer: tokenizer_lib.Tokenizer, window: int,
) -> tuple[list[inquiry.Asked], list[inquiry.Asked]]:
  """Those that are read whole, and those read in parts."""
  room = settings.room(config, window)
  fitting, long = [], []
  for context in _contexts(asked):
    size = context.size
    own = [one for one in asked if one.context == context]
    name = ', '.join(map(files.shown, context.paths[:3]))
    name += ', ..' * (len(context.paths) > 3)
    if config.mode != 'memory' and whole.fits(
        context, config.questions, room=room, tokenizer=tokenizer):
      fitting += own
      logging.info('%s: %s tokens, read whole.', name, f'{size.num_tokens:,}')
      continue
    if config.mode == 'whole':
      raise types.UserError(
          f'{name}: {size.num_tokens} tokens do not fit into a window of '
          f'{window} with a question and sampler.max_response_len='
          f'{config.sampler.max_response_len}; use --ask.mode=memory, or '
          'raise --ask.window if the model allows.')
    long += own
    logging.info(
        '%s: %s tokens, read in %s part(s).', name, f'{size.num_tokens:,}',
        f'{size.num_parts:,}')
  return fitting, long


def _memory_use() -> str:
  """Peaks of this process, of the host and of the first device."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  scale = 1 if sys.platform == 'darwin' else 1024
  use = f'Host memory at most {peak * scale >> 20:,} MiB'
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    use += f', of a device {stats["peak_bytes_in_use"] >> 20:,} MiB'
  return use + '.'

"""Measures what an inquiry holds while it reads: it must not grow.

  python -m tests.ask.flat_memory 262144 1048576 4194304

A program, not a test. For each number of tokens it writes a text, asks the
tiny base model about it in a process of its own, and prints the memory of the
host and of the devices after an eighth of the parts, a half and all of them.
"""

import contextlib
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import jax

from longjax.agents import memory
from longjax.ask import job, saved, settings
from longjax.data import tokenizer as tokenizer_lib
from longjax.rollout import decode

_NAMES = ('Ada', 'Bo', 'Cy', 'Dora', 'Emil', 'Fay', 'Gus', 'Hera')
_PLACES = ('Oslo', 'Rome', 'Lima', 'Kyiv', 'Bonn', 'Cairo')


def write_text(path: pathlib.Path, num_tokens: int) -> None:
  """Writes sentences until a tokenizer has seen so many tokens."""
  tokenizer, rng = tokenizer_lib.load('configs/tiny_base'), random.Random(0)
  with open(path, 'w') as file:
    while num_tokens > 0:
      line = (f'{rng.choice(_NAMES)} went to {rng.choice(_PLACES)} with '
              f'{rng.randrange(1000)} coins.\n')
      file.write(line)
      num_tokens -= len(tokenizer.encode(line))


def host_bytes() -> int:
  """What this process holds now."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('VmRSS:'):
      return int(line.split()[1]) * 1024
  raise ValueError('/proc/self/status has no VmRSS.')


def device_bytes() -> int:
  """What arrays take on the devices now."""
  return sum(x.nbytes for x in jax.live_arrays())


def measure(folder: pathlib.Path) -> None:
  """Asks, and prints a JSON list [part, parts, host, device bytes]."""
  found = []
  save = saved.Folder.save

  def watched(self, agent, readings, **facts):
    save(self, agent, readings, **facts)
    turn, num_parts = readings[0].turn, facts['sizes'][0]['num_parts']
    if turn in (num_parts // 8, num_parts // 2, num_parts):
      found.append([turn, num_parts, host_bytes(), device_bytes()])

  saved.Folder.save = watched
  with contextlib.redirect_stdout(sys.stderr):
    job.run(settings.AskConfig(
        model='configs/tiny_base', documents=str(folder / 'text.txt'),
        question='Who went to Oslo?', mode='memory', window=4096,
        memory=memory.MemoryConfig(
            part_len=2048, memory_len=32, plan_len=0, wording='short'),
        sampler=decode.SamplerConfig(temperature=0.0, max_response_len=32)),
        folder / 'work')
  json.dump(found, sys.stdout)


def main(lengths: list[int]) -> None:
  """Measures each length in a process of its own."""
  sys.stdout.write(
      'tokens      parts   at part  host MiB  device MiB  minutes\n')
  for num_tokens in lengths:
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      write_text(folder / 'text.txt', num_tokens)
      start = time.monotonic()
      done = subprocess.run(
          [sys.executable, '-m', 'tests.ask.flat_memory', str(folder)],
          stdout=subprocess.PIPE, check=True)
      minutes = (time.monotonic() - start) / 60
    for part, num_parts, host, device in json.loads(done.stdout):
      sys.stdout.write(
          f'{num_tokens:<10,} {num_parts:6,} {part:9,} {host / 2**20:9.0f} '
          f'{device / 2**20:11.1f} {minutes:8.1f}\n')
      sys.stdout.flush()


if __name__ == '__main__':
  if sys.argv[1].isdecimal():
    main(list(map(int, sys.argv[1:])))
  else:
    measure(pathlib.Path(sys.argv[1]))

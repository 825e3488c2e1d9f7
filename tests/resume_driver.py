"""Runs the tiny recipe again and again, and lets it die where it is told to.

A program, not a test: reads a JSON list of attempts from standard input and
writes their exit codes as JSON. The imports are paid once; each attempt is a
fork, in which `longjax.main` runs as from a shell. An attempt is
{'workdir': ..., 'phase': ..., 'point': ..., 'count': ..., 'signal': ...}: when
the process comes to `point` for the count-th time while in `phase` (a label
of the run's plan), it sends itself the signal. Without a point it runs to its
end. Its output goes to {workdir}.{number}.log.
"""

import asyncio
import functools
import json
import os
import pathlib
import signal
import sys
import zlib

from longjax import main, recipe, stages, types
from longjax.data import records
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import huggingface_writing, tensor_file
from longjax.reward import endpoint, hybrid, verdict_cache
from longjax.rollout import continuous
from longjax.synthesis import pipeline
from longjax.train import checkpoint, manifest, merge_stage, step
from tests import tiny_recipe


class Trigger:
  """Sends a signal at the count-th call of a point in a phase."""

  def __init__(self, attempt):
    self.phase = 'start'
    # A checkpoint is written in the background, when its phase may be over.
    self._phase_of_save = ''
    self._attempt = attempt
    self._left = attempt.get('count', 1)

  def at(self, point: str) -> bool:
    """Counts; True if this is the moment."""
    if point == 'save':
      self._phase_of_save = self.phase
    phase = self._phase_of_save if point == 'manifest' else self.phase
    if (point, phase) != (
        self._attempt.get('point'), self._attempt.get('phase')):
      return False
    self._left -= 1
    return self._left == 0

  def fire(self):
    number = signal.Signals[self._attempt['signal']]
    os.kill(os.getpid(), number)
    if number == signal.SIGKILL:
      signal.pause()

  def before(self, holder, name: str, point: str):
    """Fires before a function runs."""
    function = getattr(holder, name)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
      if self.at(point):
        self.fire()
      return function(*args, **kwargs)

    setattr(holder, name, wrapped)

  def after(self, holder, name: str, point: str):
    """Fires when a function has returned."""
    function = getattr(holder, name)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
      result = function(*args, **kwargs)
      if self.at(point):
        self.fire()
      return result

    setattr(holder, name, wrapped)

  def within(self, holder, name: str):
    """Sets the phase while a function that runs a stage does."""
    function = getattr(holder, name)

    @functools.wraps(function)
    def wrapped(stage, *args, **kwargs):
      labels = [a for a in args if isinstance(a, str)]
      place = [a.stage for a in args if hasattr(a, 'stage_step')]
      self.phase = (labels + place + ['synth'])[0]
      try:
        return function(stage, *args, **kwargs)
      finally:
        self.phase = f'after {self.phase}'

    setattr(holder, name, wrapped)


def score(example, text, *, is_finished=True):
  """Grades that differ between responses of a network that knows nothing."""
  del is_finished
  reward = zlib.crc32(text.encode()) % 5 / 4
  return types.Score(reward=reward, answer=text[:8], rule=example.kind)


def torn_append(trigger: Trigger):
  """Dies in the middle of a line."""
  append = records.Appender.append

  def wrapped(self, record):
    if trigger.at('append'):
      self._file.write(json.dumps(record).encode()[:40])
      trigger.fire()
    append(self, record)

  records.Appender.append = wrapped


def torn_verdict(trigger: Trigger):
  """Dies in the middle of a line of what the judge said."""
  put = verdict_cache.VerdictCache.put

  def wrapped(self, key, verdict):
    if trigger.at('verdict'):
      self._file.write(json.dumps({'key': key}).encode()[:40])
      trigger.fire()
    put(self, key, verdict)

  verdict_cache.VerdictCache.put = wrapped


def pending_verdict(trigger: Trigger):
  """Dies while the judge's server has a request that it has not answered.

  Such a request is marked 'is_last'. One marked 'is_signal' is answered as
  soon as the other has come in.
  """
  decide = endpoint.Endpoint._decide

  async def wrapped(self, key, request):
    if key is None or not trigger.at('judge'):  # None: the trial.
      return await decide(self, key, request)
    last = asyncio.create_task(
        self._client.complete(request | {'is_last': True}))
    await self._client.complete(request | {'is_signal': True})
    assert not last.done()
    trigger.fire()

  endpoint.Endpoint._decide = wrapped


def install(attempt):
  """Puts the trigger everywhere something can be cut in two."""
  trigger = Trigger(attempt)
  hybrid.score = score
  for name in ('synthesise', 'evaluate', 'train', 'select'):
    trigger.within(stages, name)
  trigger.within(merge_stage, 'run')
  trigger.before(tokenizer_lib, 'train', 'tokenizer')
  trigger.before(pipeline, 'draw', 'draw')
  trigger.before(continuous.ContinuousBatch, '_write', 'sample')
  trigger.before(hybrid, 'score', 'score')
  trigger.before(checkpoint.Checkpointer, 'save', 'save')
  trigger.after(checkpoint.Checkpointer, 'save', 'saving')
  trigger.before(manifest, 'write', 'manifest')
  trigger.before(records.os, 'replace', 'replace')
  # Small files are written, tensors are not; some tensors are.
  trigger.before(huggingface_writing, '_write_tensors', 'export')
  trigger.after(tensor_file.Writer, 'write', 'tensor')
  torn_append(trigger)
  torn_verdict(trigger)
  pending_verdict(trigger)
  make_update = step.make_update

  def make(*args, **kwargs):
    holder = type('Holder', (), {})()
    holder.update = make_update(*args, **kwargs)
    trigger.after(holder, 'update', 'update')
    return holder.update

  step.make_update = make


def run(number: int, attempt) -> int:
  """One attempt in a process of its own; its exit code."""
  if child := os.fork():
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  workdir = pathlib.Path(attempt['workdir'])
  log = os.open(
      f'{workdir}.{number}.log', os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
  os.dup2(log, 1)
  os.dup2(log, 2)
  install(attempt)
  sys.argv = ['longjax', f'--config={attempt["config"]}',
              f'--workdir={workdir}']
  main.run()
  return 0


def damage_newest(workdir: pathlib.Path) -> str:
  """Flips one byte of the newest checkpoint's largest file; its name."""
  newest = max((workdir / 'checkpoints').iterdir(), key=lambda p: int(p.name))
  largest = max(
      (p for p in newest.rglob('*') if p.is_file()),
      key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  return newest.name


if __name__ == '__main__':
  assert recipe and tiny_recipe  # Imported once, for all attempts.
  outcomes = []
  for number, attempt in enumerate(json.load(sys.stdin)):
    if attempt.get('is_newest_damaged'):
      outcomes.append(damage_newest(pathlib.Path(attempt['workdir'])))
    outcomes.append(run(number, attempt))
  json.dump(outcomes, sys.stdout)

import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from longjax import types
from longjax.reward import judge, verdict_cache

KEYS = [judge.cache_key({'n': n}) for n in range(5)]
YES, NO, UNCLEAR = judge.Verdict.YES, judge.Verdict.NO, judge.Verdict.UNCLEAR


def write(path, verdicts=(YES, NO, UNCLEAR)):
  cache = verdict_cache.VerdictCache(path)
  for key, verdict in zip(KEYS, verdicts):
    cache.put(key, verdict)
  cache.close()


def read(path):
  cache = verdict_cache.VerdictCache(path)
  found = [cache.get(key) for key in KEYS]
  cache.close()
  return found


def test_verdicts_are_there_again(tmp_path):
  path = tmp_path / 'new' / 'verdicts.jsonl'
  write(path)
  assert read(path) == [YES, NO, UNCLEAR, None, None]
  write(path, [NO])  # The newest counts.
  assert read(path) == [NO, NO, UNCLEAR, None, None]


def test_a_file_cut_at_any_byte_keeps_every_whole_verdict(tmp_path):
  path = tmp_path / 'verdicts.jsonl'
  write(path)
  content = path.read_bytes()
  for end in range(len(content) + 1):
    path.write_bytes(content[:end])
    num_whole = content[:end].count(b'\n')
    expected = [YES, NO, UNCLEAR][:num_whole] + [None] * (5 - num_whole)
    assert read(path) == expected
    # What is written next begins a line of its own.
    cache = verdict_cache.VerdictCache(path)
    cache.put(KEYS[4], NO)
    cache.close()
    assert read(path) == expected[:4] + [NO]


@pytest.mark.parametrize('line', [
    b'garbage', b'{}', b'[]', b'3', b'\xff\xfe', b'{"key": 3, "verdict": "no"}',
    b'{"key": "zz", "verdict": "no"}', b'{"key": "00", "verdict": "maybe"}',
    b'', b'[' * 200_000])
def test_a_damaged_line_costs_one_verdict(tmp_path, line):
  path = tmp_path / 'verdicts.jsonl'
  write(path)
  first, second, third = path.read_bytes().splitlines()
  path.write_bytes(b'\n'.join([first, line, third, b'']))
  assert second
  assert read(path) == [YES, None, UNCLEAR, None, None]


def test_memory_holds_the_newest_only(tmp_path):
  path = tmp_path / 'verdicts.jsonl'
  cache = verdict_cache.VerdictCache(path, max_entries=2)
  for key in KEYS:
    cache.put(key, YES)
  assert len(cache) == 2
  cache.close()
  again = verdict_cache.VerdictCache(path, max_entries=2)
  assert [again.get(key) for key in KEYS] == [None, None, None, YES, YES]
  again.close()
  assert read(path) == [YES] * 5


def test_a_full_disk_is_reported_and_leaves_the_file_whole(tmp_path):
  path = tmp_path / 'verdicts.jsonl'
  write(path)
  size = path.stat().st_size
  cache = verdict_cache.VerdictCache(path)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
  try:
    with pytest.raises(types.UserError, match='cannot use .*verdicts.jsonl'):
      cache.put(KEYS[3], YES)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
  assert path.stat().st_size == size
  cache.put(KEYS[3], YES)
  cache.close()
  assert read(path) == [YES, NO, UNCLEAR, YES, None]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(types.UserError, match='cannot use .*file/verdicts'):
    verdict_cache.VerdictCache(tmp_path / 'file' / 'verdicts.jsonl')


WRITER = """
import itertools, sys
from longjax.reward import judge, verdict_cache
cache = verdict_cache.VerdictCache(sys.argv[1])
for n in itertools.count():
  cache.put(judge.cache_key({'n': n}), judge.Verdict.YES)
  print(n, flush=True)
"""


def test_a_killed_process_loses_no_verdict_it_had_written(tmp_path):
  path = tmp_path / 'verdicts.jsonl'
  with subprocess.Popen(
      [sys.executable, '-c', WRITER, str(path)], stdout=subprocess.PIPE,
      text=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'}) as process:
    assert process.stdout is not None
    assert process.stdout.readline() == '0\n'
    time.sleep(0.05)
    process.kill()
    told = [0, *map(int, process.stdout.read().split('\n')[:-1])]
  cache = verdict_cache.VerdictCache(path)
  assert len(told) > 1
  for n in told:
    assert cache.get(judge.cache_key({'n': n})) is YES
  assert len(cache) - len(told) in (0, 1)
  cache.close()

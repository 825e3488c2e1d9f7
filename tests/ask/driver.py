"""Runs command lines, and lets some of them die after a part.

A program, not a test: reads a JSON list of [arguments, part] from standard
input and writes their exit codes as JSON. Each is a fork in which
`longjax.main` runs as from a shell; with a part, it sends itself SIGKILL as
soon as so many parts are saved, or, with a negative one, when it is about to
save that part. Output goes to {number}.out and {number}.err; that of 'head'
in place of a part to a pipe that nobody reads.
"""

import json
import os
import signal
import sys

from longjax import main
from longjax.ask import job, saved  # noqa: F401  Imported once, for all forks.


def kill_at(part: int) -> None:
  """Kills this process around the moment that a part is saved."""
  save = saved.Folder.save

  def watched(self, agent, readings, **facts):
    if readings[0].turn == -part:
      os.kill(os.getpid(), signal.SIGKILL)
    save(self, agent, readings, **facts)
    if readings[0].turn == part:
      os.kill(os.getpid(), signal.SIGKILL)

  saved.Folder.save = watched


codes = []
for i, (arguments, part) in enumerate(json.load(sys.stdin)):
  if not os.fork():
    for number, name in ((1, 'out'), (2, 'err')):
      os.dup2(os.open(f'{i}.{name}', os.O_CREAT | os.O_WRONLY), number)
    if part == 'head':
      read_end, write_end = os.pipe()
      os.close(read_end)
      os.dup2(write_end, 1)
    elif part:
      kill_at(part)
    sys.argv = ['longjax', *arguments]
    main.run()
  codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
json.dump(codes, sys.stdout)

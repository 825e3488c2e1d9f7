"""A judge behind an HTTP endpoint, which is asked while sampling goes on.

Requests go out from a thread with an event loop of its own. Verdicts are kept
in a file as they arrive.
"""

import asyncio
import concurrent.futures
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from longjax import types
from longjax.reward import completions, judge, verdict_cache

# Both answers are the same, so any judge that works has a verdict on it.
_TRIAL = judge.Case(
    question='Which city is the capital of France?', golds=('Paris',),
    prediction='Paris')


class Endpoint:
  """A `judge.Judge` that asks a server; use it from one thread."""

  def __init__(
      self,
      config: completions.EndpointConfig,
      *,
      cache_path: str | os.PathLike[str] | None = None,
  ):
    """Asks nothing yet.

    Args:
      config: with url and model.
      cache_path: file of verdicts, see `verdict_cache`; None remembers none
        beyond `rulings`.

    Raises:
      UserError: url, model or key are missing, or the file cannot be used.
    """
    self._config = config
    self._client = completions.Client(config)
    self._cache = (
        None if cache_path is None
        else verdict_cache.VerdictCache(cache_path))
    self._asked: dict[
        str, judge.Ruling | concurrent.futures.Future[judge.Verdict]] = {}
    # On their way, though nobody waits for them any more.
    self._dropped: dict[str, concurrent.futures.Future[judge.Verdict]] = {}
    self._last_failure = ''
    self._loop = asyncio.new_event_loop()
    self._thread: threading.Thread | None = None

  def check(self) -> None:
    """Asks about a trivial case, past the cache; waits `timeout_seconds`.

    Raises:
      UserError: there was no answer, or no verdict in it.
    """
    verdict = self._ruling(
        self._start(None, self._request(_TRIAL)),
        time.monotonic() + self._config.timeout_seconds).verdict
    if verdict is judge.Verdict.FAILED:
      raise types.UserError(
          f'endpoint.url={self._config.url} does not answer '
          f'({self._last_failure}); see that the server runs and serves '
          f'model={self._config.model!r}.')
    if verdict is judge.Verdict.UNCLEAR:
      raise types.UserError(
          f'endpoint.model={self._config.model!r} gives no verdict within '
          f'max_tokens={self._config.max_tokens}; raise it or use another '
          'model.')

  def ask(self, case: judge.Case) -> None:
    """Sends a case, unless its verdict is known or on its way."""
    request = self._request(case)
    key = judge.cache_key(request)
    if key in self._asked:
      return
    left = self._dropped.pop(key, None)
    if left is not None and not _is_lost(left):
      self._asked[key] = left
      return
    known = None if self._cache is None else self._cache.get(key)
    self._asked[key] = (
        self._start(key, request) if known is None
        else judge.Ruling(verdict=known, is_cached=True))

  def rulings(self, cases: Sequence[judge.Case]) -> list[judge.Ruling]:
    """Waits, `max_wait_seconds` at most; see `judge.Judge`.

    Cases that were asked and are not among these are dropped. What is on its
    way is not sent again if it is asked again; the rest is forgotten.

    Raises:
      UserError: a verdict could not be written to the cache.
    """
    deadline = time.monotonic() + self._config.max_wait_seconds
    keys = [judge.cache_key(self._request(case)) for case in cases]
    found = {key: self._ruling(self._asked.pop(key), deadline)
             for key in dict.fromkeys(keys)}
    self._drop()
    num_failed = sum(
        r.verdict is judge.Verdict.FAILED for r in found.values())
    if num_failed:
      logging.warning(
          'The judge failed on %d of %d cases, which keep their rule scores; '
          'the last time: %s.', num_failed, len(found), self._last_failure)
    return [found[key] for key in keys]

  def close(self) -> None:
    """Gives up what is open and ends the thread; ask no more."""
    if self._thread is not None:
      asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
      self._loop.call_soon_threadsafe(self._loop.stop)
      self._thread.join()
      self._thread = None
    self._loop.close()
    if self._cache is not None:
      self._cache.close()

  def _drop(self) -> None:
    """Forgets what is left, but for requests that are open."""
    left = self._dropped | {
        key: asked for key, asked in self._asked.items()
        if not isinstance(asked, judge.Ruling)}
    self._dropped = {key: f for key, f in left.items() if not f.done()}
    self._asked = {}

  def _request(self, case: judge.Case) -> dict[str, Any]:
    return self._client.request(judge.render(case))

  def _start(
      self, key: str | None, request: Mapping[str, Any]
  ) -> concurrent.futures.Future[judge.Verdict]:
    """Hands a request to the thread."""
    if self._thread is None:
      self._thread = threading.Thread(
          target=self._loop.run_forever, name='judge', daemon=True)
      self._thread.start()
    return asyncio.run_coroutine_threadsafe(
        self._decide(key, request), self._loop)

  def _ruling(
      self,
      asked: judge.Ruling | concurrent.futures.Future[judge.Verdict],
      deadline: float,
  ) -> judge.Ruling:
    """What became of a case by the deadline."""
    if isinstance(asked, judge.Ruling):
      return asked
    try:
      verdict = asked.result(timeout=max(deadline - time.monotonic(), 0.0))
    except TimeoutError:
      asked.cancel()
      verdict = judge.Verdict.FAILED
      self._last_failure = 'no verdict in time'
    return judge.Ruling(verdict=verdict)

  async def _decide(
      self, key: str | None, request: Mapping[str, Any]
  ) -> judge.Verdict:
    """Runs in the thread: asks, and remembers the verdict under `key`."""
    try:
      reply = await self._client.complete(request)
    except completions.Failure as failure:
      self._last_failure = str(failure)
      return judge.Verdict.FAILED
    verdict = judge.parse(reply)
    if self._cache is not None and key is not None:
      self._cache.put(key, verdict)
    return verdict

  async def _shut_down(self) -> None:
    """Runs in the thread: cancels what is open, closes connections."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await self._client.close()


def _is_lost(asked: concurrent.futures.Future[judge.Verdict]) -> bool:
  """Whether a request has ended without a verdict."""
  return asked.done() and (
      asked.cancelled() or asked.exception() is not None
      or asked.result() is judge.Verdict.FAILED)

"""A client of an OpenAI-compatible server: one request becomes a reply.

Whatever the server does, `Client.complete` returns or fails in bounded time:
it paces and limits requests, bounds each as a whole, and tries again what may
succeed later, after exponentially longer pauses with jitter.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import email.utils
import json
import math
import os
import random
import re
import time
from collections.abc import Mapping
from typing import Any

import httpx2

from longjax import types

_MAX_BODY_BYTES = 1 << 20

# Of requests that may succeed later, besides those of a failing server.
_RETRIED = (408, 425, 429)

_VARIABLE = re.compile(r'[A-Za-z_][A-Za-z0-9_]*')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
  """Where a server is and how much is asked of it.

  Attributes:
    url: up to and without '/chat/completions': 'http://judge:8000/v1'.
    model: its name there.
    api_key_variable: the environment variable that holds the key; '' if none
      is needed. The key itself is neither logged nor written anywhere.
    max_tokens: of a reply; a model that thinks needs hundreds.
    max_concurrent: requests open at a time.
    requests_per_second: at most; 0 means no limit.
    timeout_seconds: of one request, from connecting to the last byte.
    max_retries: after rate limits (429), server errors, time-outs, lost
      connections and replies that are no chat completion.
    backoff_seconds: before the first retry; doubled for each one after it,
      and up to half of it taken off at random. Retry-After may make it longer.
    max_backoff_seconds: the longest such pause. A server that asks for a
      longer one has failed.
    max_wait_seconds: a step waits for its verdicts no longer; those still
      open have failed.
  """

  url: str = ''
  model: str = ''
  api_key_variable: str = ''
  max_tokens: int = 2048
  max_concurrent: int = 32
  requests_per_second: float = 0.0
  timeout_seconds: float = 120.0
  max_retries: int = 5
  backoff_seconds: float = 1.0
  max_backoff_seconds: float = 60.0
  max_wait_seconds: float = 900.0

  def __post_init__(self):
    _check_url(self.url)
    # The value may be a key that was put in the wrong place: do not show it.
    if self.api_key_variable and not _VARIABLE.fullmatch(
        self.api_key_variable):
      raise types.UserError(
          'endpoint.api_key_variable is no name of an environment variable; '
          'put the key into one and give its name here.')
    for name, least in (('max_tokens', 1), ('max_concurrent', 1),
                        ('requests_per_second', 0), ('max_retries', 0),
                        ('backoff_seconds', 0), ('max_backoff_seconds', 0)):
      if not getattr(self, name) >= least:
        raise types.UserError(
            f'endpoint.{name}={getattr(self, name)} must be >= {least}.')
    for name in ('timeout_seconds', 'max_wait_seconds'):
      if not 0 < getattr(self, name) < math.inf:
        raise types.UserError(
            f'endpoint.{name}={getattr(self, name)} must be > 0 and finite.')


class Failure(Exception):
  """There is no reply; says why.

  Attributes:
    is_passing: the same request may succeed later.
    retry_after: seconds the server asks to wait; None if it says nothing.
  """

  def __init__(
      self, reason: str, *, is_passing: bool = True,
      retry_after: float | None = None,
  ):
    super().__init__(reason)
    self.is_passing = is_passing
    self.retry_after = retry_after


class Client:
  """Sends requests; belongs to one event loop."""

  def __init__(self, config: EndpointConfig):
    """Connects to nothing yet.

    Raises:
      UserError: url, model or key are missing.
    """
    for name in ('url', 'model'):
      if not getattr(config, name):
        raise types.UserError(f"endpoint.{name}='' is empty; set it.")
    self._config = config
    self._http = httpx2.AsyncClient(
        headers=_authorization(config), timeout=None,
        limits=httpx2.Limits(max_connections=config.max_concurrent))
    self._slots = asyncio.Semaphore(config.max_concurrent)
    self._pace = _Pace(config.requests_per_second)
    # Of pauses only: nothing that is computed depends on it.
    self._jitter = random.Random()

  def request(self, prompt: str) -> dict[str, Any]:
    """What is sent for a prompt; the reply depends on nothing else."""
    return {
        'model': self._config.model,
        'messages': [{'role': 'user', 'content': prompt}],
        'temperature': 0,
        'max_tokens': self._config.max_tokens,
    }

  async def complete(self, request: Mapping[str, Any]) -> str:
    """The text of the reply; '' if the model wrote none.

    Raises:
      Failure: there was none after all retries.
    """
    attempt = 0
    while True:
      try:
        async with self._slots:
          await self._pace.turn()
          return await self._post(request)
      except Failure as failure:
        pause = self._pause(attempt, failure)
        if pause is None:
          raise
      await asyncio.sleep(pause)
      attempt += 1

  async def close(self) -> None:
    """Closes connections."""
    await self._http.aclose()

  def _pause(self, attempt: int, failure: Failure) -> float | None:
    """Seconds before the next attempt; None if there is none."""
    config = self._config
    asked = failure.retry_after or 0.0
    if asked > 0.0 and failure.is_passing:
      # It is meant for all requests, but not for ever.
      self._pace.stop(min(asked, config.max_backoff_seconds))
    if (attempt == config.max_retries or not failure.is_passing
        or asked > config.max_backoff_seconds):
      return None
    # A large power would overflow.
    doubled = config.backoff_seconds * 2.0 ** min(attempt, 64)
    pause = min(doubled, config.max_backoff_seconds)
    return max(asked, pause * self._jitter.uniform(0.5, 1.0))

  async def _post(self, request: Mapping[str, Any]) -> str:
    """One attempt; raises `Failure`."""
    config = self._config
    url = config.url.rstrip('/') + '/chat/completions'
    body = bytearray()
    try:
      async with (
          asyncio.timeout(config.timeout_seconds),
          self._http.stream('POST', url, json=request) as response):
        if response.status_code != 200:
          raise _refusal(response)
        async for part in response.aiter_bytes():
          body += part
          if len(body) > _MAX_BODY_BYTES:
            raise Failure(f'a reply of more than {_MAX_BODY_BYTES} bytes')
    except TimeoutError as error:
      raise Failure(
          f'no reply within timeout_seconds={config.timeout_seconds}'
      ) from error
    except (httpx2.HTTPError, OSError) as error:
      raise Failure(f'connection: {type(error).__name__}') from error
    return _content(bytes(body))


class _Pace:
  """Lets requests begin one by one, so many a second at most."""

  def __init__(self, per_second: float):
    self._interval = 1.0 / per_second if per_second else 0.0
    self._next = 0.0
    self._lock = asyncio.Lock()

  async def turn(self) -> None:
    """Waits until a request may begin; first come, first served."""
    async with self._lock:
      # `stop` may move the time while this waits.
      while (wait := self._next - time.monotonic()) > 0:
        await asyncio.sleep(wait)
      self._next = time.monotonic() + self._interval

  def stop(self, seconds: float) -> None:
    """Lets none begin for so long."""
    self._next = max(self._next, time.monotonic() + seconds)


def _check_url(url: str) -> None:
  """Refuses what is no address, and one that holds a secret."""
  if not url:
    return
  try:
    address = httpx2.URL(url)
  except httpx2.InvalidURL:
    address = httpx2.URL('')
  if address.userinfo or address.query or address.fragment or '@' in url:
    raise types.UserError(
        'endpoint.url has a user, password, query or fragment; give the plain '
        'address, and a key by endpoint.api_key_variable.')
  if address.scheme not in ('http', 'https') or not address.host:
    raise types.UserError(
        f"endpoint.url={url!r} is no address; use e.g. "
        "'http://localhost:8000/v1'.")


def _authorization(config: EndpointConfig) -> dict[str, str]:
  """The header with the key of the environment; none if none is needed."""
  if not config.api_key_variable:
    return {}
  key = os.environ.get(config.api_key_variable, '').strip()
  if not key or not key.isascii() or not key.isprintable() or ' ' in key:
    raise types.UserError(
        f'endpoint.api_key_variable={config.api_key_variable}: this '
        'environment variable holds no key; set it, or use an empty name if '
        'the server needs none.')
  return {'Authorization': f'Bearer {key}'}


def _refusal(response: httpx2.Response) -> Failure:
  """What a status other than 200 means; the body may repeat the key."""
  status = response.status_code
  return Failure(
      f'HTTP {status}', is_passing=status in _RETRIED or status >= 500,
      retry_after=_seconds(response.headers.get('Retry-After', '')))


def _seconds(retry_after: str) -> float | None:
  """The header's number of seconds or date, as seconds from now."""
  with contextlib.suppress(ValueError):
    seconds = float(retry_after)
    return max(seconds, 0.0) if math.isfinite(seconds) else None
  with contextlib.suppress(ValueError, TypeError, OverflowError):
    date = email.utils.parsedate_to_datetime(retry_after)
    if date.tzinfo is None:
      date = date.replace(tzinfo=datetime.UTC)
    now = datetime.datetime.now(datetime.UTC)
    return max((date - now).total_seconds(), 0.0)
  return None


def _content(body: bytes) -> str:
  """The text of a chat completion."""
  try:
    content = json.loads(body)['choices'][0]['message']['content']
  except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
    raise Failure('a reply that is no chat completion') from error
  if not isinstance(content, str | None):
    raise Failure('a reply that is no chat completion')
  return content or ''

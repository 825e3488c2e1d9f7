"""Asks an endpoint about small cases."""

import time

from longjax.reward import completions, endpoint, judge


def config(server, **overrides):
  return completions.EndpointConfig(**dict(
      url=server if isinstance(server, str) else server.url, model='judge',
      timeout_seconds=5.0, max_retries=2, backoff_seconds=0.01) | overrides)


def case(prediction, question='Q?'):
  return judge.Case(
      question=question, golds=('Paris',), prediction=str(prediction))


def ask(server, *cases, cache_path=None, **overrides):
  """Rulings on the cases, and how many seconds they took."""
  asked = endpoint.Endpoint(
      config(server, **overrides), cache_path=cache_path)
  start = time.monotonic()
  try:
    for one in cases:
      asked.ask(one)
    rulings = asked.rulings(cases)
  finally:
    asked.close()
  return [r.verdict for r in rulings], time.monotonic() - start

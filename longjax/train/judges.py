"""The judge of a stage, by its configuration and for all processes."""

from collections.abc import Callable, Sequence
from typing import Any

from longjax import types
from longjax.parallel import multihost
from longjax.reward import endpoint, grading
from longjax.reward import judge as judge_lib
from longjax.train import inprocess_judge, run_state

VERDICTS_FILE = 'judge/verdicts.jsonl'


def make(
    config: grading.JudgeConfig,
    context: run_state.Context,
    *,
    initial: Callable[[], types.Params],
) -> judge_lib.Judge | None:
  """The judge that is asked; None under 'none'.

  All processes call this at the same place, and whoever does closes it. A
  server is tried out before it is relied on.

  Args:
    config: who is asked.
    context: of the run.
    initial: makes the parameters that the run began with, after a restart the
      same ones, or verdicts change. Only 'inprocess' has use for them: it
      keeps them for itself, so nothing may donate them.

  Raises:
    UserError: the server does not answer, or shapes do not fit the mesh.
  """
  match config.mode:
    case 'none':
      return None
    case 'endpoint':
      return SharedJudge(config, context)
    case 'inprocess':
      return inprocess_judge.InprocessJudge(
          initial(), config=config.inprocess, model=context.model,
          tokenizer=context.tokenizer, rules=context.rules,
          compute=context.compute)


class SharedJudge:
  """A server that the primary process asks; all have the same rulings."""

  def __init__(
      self, config: grading.JudgeConfig, context: run_state.Context
  ):
    self._endpoint: endpoint.Endpoint | None = None

    def connect() -> None:
      made = endpoint.Endpoint(
          config.endpoint, cache_path=context.workdir / VERDICTS_FILE)
      try:
        made.check()
      except BaseException:
        made.close()
        raise
      self._endpoint = made

    multihost.on_primary(connect)

  def ask(self, case: judge_lib.Case) -> None:
    """Sends a case, in the primary process."""
    if self._endpoint is not None:
      self._endpoint.ask(case)

  def rulings(
      self, cases: Sequence[judge_lib.Case]
  ) -> list[judge_lib.Ruling]:
    """Waits; all processes call this with the same cases."""

    def collect() -> list[Any]:
      assert self._endpoint is not None
      return [[ruling.verdict.value, ruling.is_cached]
              for ruling in self._endpoint.rulings(cases)]

    return [
        judge_lib.Ruling(
            verdict=judge_lib.Verdict(verdict), is_cached=is_cached)
        for verdict, is_cached in multihost.on_primary(collect)]

  def close(self) -> None:
    """Ends the primary process's connections."""
    if self._endpoint is not None:
      self._endpoint.close()
      self._endpoint = None

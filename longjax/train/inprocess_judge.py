"""A judge inside the training process: frozen parameters choose YES or NO.

Nothing is written. A case is a prompt that ends where the verdict would stand,
after thinking that was closed at once, and has two branches:

  ...Finish with [[YES]] or [[NO]].<|im_end|>
  <|im_start|>assistant
  <think>

  </think>

  [[                                            branch 1: YES, branch 2: NO

The verdict is yes where log p(YES) > log p(NO), each summed over its tokens.
Cases share rows as responses to prompts do (`rows`), and each forward pass has
the same shape.

B rows, T positions of a forward pass.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from longjax import rows, types
from longjax.data import chat, turns
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import multihost, token_order
from longjax.parallel import rules as rules_lib
from longjax.reward import grading
from longjax.reward import judge as judge_lib
from longjax.train import step as step_lib

_CHOICES = ('YES', 'NO')


def check(
    config: grading.InprocessConfig, rules: rules_lib.Rules, *,
    name: str = 'judge.inprocess',
) -> None:
  """Refuses rows that do not divide over the mesh.

  Args:
    config: shapes of the forward pass.
    rules: logical axes to mesh axes.
    name: where its fields stand in the config, for the message.
  """
  token_order.check_len(f'{name}.row_len', config.row_len, rules.size('seq'))
  shards = rules.size('batch')
  if config.rows_at_once % shards:
    raise types.UserError(
        f'{name}.rows_at_once={config.rows_at_once} does not divide over the '
        f'{shards} data shards of mesh {dict(rules.mesh.shape)}; use a '
        f'multiple of {shards}, or 0 for one each.')


def case_tokens(
    case: judge_lib.Case, tokenizer: tokenizer_lib.Tokenizer
) -> list[int]:
  """Ids of a case up to where YES or NO would follow."""
  template = tokenizer.turns
  # No reasoning: what stands between the think tags is one piece of text, as
  # the models that can do without thinking have learnt it.
  closed = (template.think_start + template.reasoning_end + turns.THINK_END
            + template.answer_start)
  return [
      *chat.context_tokens((), tokenizer),
      *tokenizer.encode('\n' + judge_lib.render(case)),
      *tokenizer.encode_template(
          template.user_end + template.assistant_start + closed),
      *tokenizer.encode('[['),
  ]


class InprocessJudge:
  """A `judge.Judge`; all processes ask it about the same cases.

  Its forward passes run in `rulings`: before, devices are busy sampling.
  """

  def __init__(
      self,
      params: types.Params,
      *,
      config: grading.InprocessConfig,
      model: architecture.ModelConfig,
      tokenizer: tokenizer_lib.Tokenizer,
      rules: rules_lib.Rules,
      compute: compute_lib.Compute,
  ):
    """Compiles nothing yet.

    Args:
      params: which stay as they are, so not those of training, which a step
        donates.
      config: shapes of the forward pass.
      model: sizes of the network.
      tokenizer: of the model.
      rules: logical axes to mesh axes.
      compute: backends, dtype.

    Raises:
      UserError: the shapes do not divide over the mesh.
    """
    check(config, rules)
    self._params = params
    self._config = config
    self._num_rows = config.rows_at_once or rules.size('batch')
    self._tokenizer = tokenizer
    self._choices = [tokenizer.encode(choice) for choice in _CHOICES]
    self._rules = rules
    self._score = step_lib.make_score(
        config=model, temperature=1.0, rules=rules, compute=compute)

  def ask(self, case: judge_lib.Case) -> None:
    """Does nothing: there is nothing that could be begun."""

  def rulings(
      self, cases: Sequence[judge_lib.Case]
  ) -> list[judge_lib.Ruling]:
    """Compares YES with NO; FAILED where a case does not fit into a row."""
    numbers = {case: i for i, case in enumerate(dict.fromkeys(cases))}
    verdicts = [
        _verdict(*pair) for pair in self.logprobs(list(numbers))]
    num_failed = verdicts.count(judge_lib.Verdict.FAILED)
    if num_failed:
      logging.warning(
          'The judge failed on %d of %d cases, which keep their rule scores: '
          'longer than judge.inprocess.row_len=%d, or not finite.',
          num_failed, len(verdicts), self._config.row_len)
    return [judge_lib.Ruling(verdict=verdicts[numbers[c]]) for c in cases]

  def logprobs(
      self, cases: Sequence[judge_lib.Case]
  ) -> np.ndarray:  # f64[N, 2]
    """Log-probabilities of YES and NO, in nats; NaN for too long a case."""
    result = np.full((len(cases), 2), np.nan)
    groups = []
    for i, case in enumerate(cases):
      group = rows.Group(
          prompt=case_tokens(case, self._tokenizer),
          branches=[
              rows.Branch(response=ids, trajectory=2 * i + b)
              for b, ids in enumerate(self._choices)])
      if group.num_tokens <= self._config.row_len:
        groups.append(group)
        result[i] = 0.0
    micro_batches = self._pack(groups)
    scores = multihost.to_host([
        self._score(
            self._params, step_lib.put_rows(batch, self._rules)).logprobs
        for batch in micro_batches])
    for batch, logprobs in zip(micro_batches, scores, strict=True):
      mask = batch.loss_mask
      np.add.at(
          result.reshape(-1), batch.trajectory[mask],
          logprobs[mask].astype(np.float64))
    return result

  def close(self) -> None:
    """Lets go of the parameters; ask no more."""
    self._params = None

  def _pack(self, groups: Sequence[rows.Group]) -> list[Any]:
    """Rows [B, T] of every forward pass, the last filled up with padding."""
    packed = rows.pack(groups, row_len=self._config.row_len)
    missing = -packed.tokens.shape[0] % self._num_rows
    padded = jax.tree.map(
        lambda *parts: np.concatenate(parts), packed,
        rows.empty(missing, self._config.row_len))
    return rows.split(padded, self._num_rows)


def _verdict(yes: float, no: float) -> judge_lib.Verdict:
  """What two log-probabilities say."""
  if not np.isfinite([yes, no]).all():
    return judge_lib.Verdict.FAILED
  return judge_lib.Verdict.YES if yes > no else judge_lib.Verdict.NO

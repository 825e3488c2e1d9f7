"""The one scorer of training and evaluation: a response becomes a grade.

Recipe of QwenLong-L1.5 (arXiv:2512.12967): outcome only, in [0, 1], no bonus
for the format. First the thinking is cut off, then the answer is found, then
the rule of the example's kind decides:

  mc       the option's letter or text                    reward.exact
  qa       the gold's words stand in a short answer       reward.exact
  list     the same cells                                 reward.exact
  numeric  the same number within tolerance               reward.numeric
  count    exactly the same number                        reward.numeric
  mrcr     similarity to a text after a required prefix   reward.mrcr

`example.meta` may hold 'unit' (numeric), 'ordered' = 'true' (list) and
'required_prefix' (mrcr). A right answer in unexpected words scores 0 here;
`grading` then asks a judge, if there is one.
"""

from longjax import types
from longjax.reward import answers, exact, mrcr, numeric

KINDS = ('mc', 'qa', 'numeric', 'count', 'list', 'mrcr')


def score(
    example: types.TaskExample,
    response_text: str,
    *,
    think: answers.Think = 'required',
    is_finished: bool = True,
) -> types.Score:
  """Grades one response.

  Args:
    example: the question, its golds and the kind of rule.
    response_text: the decoded response with '</think>' visible and without the
      stop token.
    think: whether a closing think tag is needed, see `answers.split_think`.
    is_finished: False for a response cut off by its length cap, which scores 0.

  Returns:
    The reward, the answer that was graded and the rule that decided: the
    example's kind, or 'unfinished', 'think', 'no_answer'.

  Raises:
    UserError: the example's kind is unknown or it has no gold.
  """
  if example.kind not in KINDS:
    raise types.UserError(
        f'example {example.id}: kind={example.kind!r} has no rule; use one of '
        f'{", ".join(KINDS)}.')
  if not example.answers:
    raise types.UserError(
        f'example {example.id}: answers is empty; give at least one.')
  if not is_finished:
    return types.Score(reward=0.0, answer='', rule='unfinished')
  text = answers.split_think(response_text, think=think)
  if text is None:
    return types.Score(reward=0.0, answer='', rule='think')
  # Templates put white space between the think tag and the answer.
  answer = text.lstrip() if example.kind == 'mrcr' else answers.extract(text)
  if not answer:
    return types.Score(reward=0.0, answer='', rule='no_answer')
  return types.Score(
      reward=_reward(example, answer), answer=answer, rule=example.kind)


def _reward(example: types.TaskExample, answer: str) -> float:
  """The rule of the example's kind, applied to a non-empty answer."""
  golds, meta = example.answers, example.meta
  match example.kind:
    case 'mc':
      return float(exact.multiple_choice(answer, golds))
    case 'qa':
      return float(exact.short_answer(answer, golds))
    case 'list':
      is_ordered = meta.get('ordered', '').lower() == 'true'
      return float(exact.cells(answer, golds, is_ordered=is_ordered))
    case 'numeric':
      return float(any(
          numeric.is_equal(
              answer, gold, question=example.question,
              unit=meta.get('unit', ''))
          for gold in golds))
    case 'count':
      return float(any(numeric.is_equal_count(answer, g) for g in golds))
    case _:
      return max(
          mrcr.similarity(
              answer, gold, required_prefix=meta.get('required_prefix', ''))
          for gold in golds)

import json

import pytest

from longjax import types
from longjax.evals import runner, scores
from longjax.reward import grading, judge


def _prompt(number, task='reading', length=10, answer='yes', evidence=()):
  example = types.TaskExample(
      id=f'{task}-{number}', task=task, kind='qa', question=f'Q{number}?',
      answers=(answer,), evidence=evidence,
      documents=(
          types.Document(title='A', text='x' * 60),
          types.Document(title='B', text='y' * 40)))
  return types.Prompt(example=example, tokens=tuple(range(length)), number=1)


def _score(example, response_text, *, is_finished=True):
  answer = response_text.partition('</think>')[2] if is_finished else ''
  return types.Score(
      reward=float(answer in example.answers), answer=answer, rule='exact')


def _grader(judge=None):
  return grading.Grader(score=_score, judge=judge)


class _Model:
  """Answers 'yes'; remembers how it was asked."""

  def __init__(self):
    self.calls = []

  def __call__(self, prompts, num_samples):
    self.calls.append(([p.example.id for p in prompts], num_samples))
    return [
        [runner.Response(text=f'{s}</think>yes', length=s + 1,
                         is_finished=s != 1) for s in range(num_samples)]
        for _ in prompts]


def test_every_prompt_is_answered_and_graded_in_order():
  model, done = _Model(), []
  results = runner.evaluate(
      model, _grader(),
      {512: [_prompt(5, length=500)], 64: [_prompt(i) for i in range(3)]},
      num_samples=2, batch_size=2, on_batch=done.append)
  assert model.calls == [
      (['reading-0', 'reading-1'], 2), (['reading-2'], 2), (['reading-5'], 2)]
  assert done == [2, 1, 1]
  assert [(r.id, r.sample, r.context_length) for r in results] == [
      (f'reading-{i}', s, 512 if i == 5 else 64)
      for i in (0, 1, 2, 5) for s in (0, 1)]
  first, second = results[:2]
  assert (first.reward, first.answer, first.response) == (
      1.0, 'yes', '0</think>yes')
  # The second sample was cut off: the grader is told.
  assert (second.reward, second.answer, second.is_finished) == (0.0, '', False)
  assert results[-1].prompt_length == 500


def test_batches_do_not_change_what_is_recorded():
  prompts = {64: [_prompt(i) for i in range(5)]}
  assert runner.evaluate(
      _Model(), _grader(), prompts, num_samples=3) == runner.evaluate(
          _Model(), _grader(), prompts, num_samples=3, batch_size=2)


class _Yes:
  """A judge; notes how many prompts were answered when it was asked."""

  def __init__(self, model):
    self.model, self.log = model, []

  def ask(self, case):
    self.log.append(('ask', len(self.model.calls)))

  def rulings(self, cases):
    self.log.append(('rulings', len(self.model.calls)))
    return [judge.Ruling(verdict=judge.Verdict.YES) for _ in cases]

  def close(self):
    pass


def test_a_judge_is_asked_after_each_batch_and_awaited_at_the_end(monkeypatch):
  monkeypatch.setattr(grading, 'JUDGED_KINDS', {'exact'})
  model = _Model()
  asked = _Yes(model)
  prompts = {64: [_prompt(i, answer='oui') for i in range(3)]}
  results = runner.evaluate(
      model, _grader(asked), prompts, num_samples=1, batch_size=1)
  assert asked.log == [
      ('ask', 1), ('ask', 2), ('ask', 3), ('rulings', 3)]
  assert [(r.rule, r.reward) for r in results] == [('judge', 1.0)] * 3


def test_evidence_is_quoted_and_its_depth_recorded():
  evidence = (types.Span(document=0, start=0, end=20),
              types.Span(document=1, start=30, end=40))
  (record,) = runner.evaluate(
      _Model(), _grader(), {64: [_prompt(0, evidence=evidence)]}, num_samples=1)
  assert record.evidence == ('x' * 20, 'y' * 10)
  assert record.depth == pytest.approx((10 + 95) / 2 / 100)
  (record,) = runner.evaluate(
      _Model(), _grader(), {64: [_prompt(0)]}, num_samples=1)
  assert record.depth is None


def test_prompts_are_sorted_under_the_smallest_length_that_holds_them():
  prompts = [_prompt(0, length=64), _prompt(1, length=65), _prompt(2, length=9)]
  grouped = runner.by_length(prompts, [128, 64, 1024])
  assert {n: [p.example.id for p in g] for n, g in grouped.items()} == {
      64: ['reading-0', 'reading-2'], 128: ['reading-1']}
  with pytest.raises(types.UserError, match=r"'reading-1'.*65 tokens"):
    runner.by_length(prompts, [64])


def test_a_saved_evaluation_comes_back_with_its_table(tmp_path):
  results = runner.evaluate(
      _Model(), _grader(), {64: [_prompt(i) for i in range(4)]}, num_samples=2)
  table = runner.save(tmp_path, '1_sft', results, facts={'step': 7})
  (loaded,) = runner.load(tmp_path)
  assert loaded['name'] == '1_sft' and loaded['facts'] == {'step': 7}
  assert {k: loaded[k] for k in table} == table
  assert [scores.Record(
      **{**r, 'gold': tuple(r['gold']), 'evidence': tuple(r['evidence'])})
          for r in loaded['records']] == results


def test_evaluations_are_loaded_in_the_order_of_their_numbers(tmp_path):
  for name in ('10_late', 'extra', '0_base', '2_rl'):
    runner.save(tmp_path, name, [], facts={})
  assert [e['name'] for e in runner.load(tmp_path)] == [
      '0_base', '2_rl', '10_late', 'extra']


def test_a_damaged_evaluation_is_named(tmp_path):
  runner.save(tmp_path, '0_base', [])
  path = tmp_path / 'evals' / '0_base.json'
  path.write_text(path.read_text()[:20])
  with pytest.raises(types.UserError, match=r'0_base\.json is damaged'):
    runner.load(tmp_path)


def test_the_same_evaluation_writes_the_same_bytes(tmp_path):
  results = runner.evaluate(
      _Model(), _grader(), {64: [_prompt(i) for i in range(4)]}, num_samples=2)
  for folder in ('a', 'b'):
    runner.save(tmp_path / folder, '0_base', results, seed=3)
  first, second = (
      (tmp_path / f / 'evals' / '0_base.json').read_bytes() for f in 'ab')
  assert first == second
  assert json.loads(first)['overall']['num_responses'] == 8

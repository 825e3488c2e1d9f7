"""Held-out answers that the rule does not accept, and a judge does."""

import json
import types as python_types

import pytest

from longjax import stages, types
from longjax.evals import runner
from longjax.evals import stage as evals_stage
from longjax.parallel import mesh
from longjax.parallel import rules as rules_lib
from longjax.reward import completions, grading
from longjax.rollout import decode
from longjax.train import judges, run_state
from tests import chat_server, resume_driver, tiny_recipe
from tests.reward import examples

# Kind, answer, score by the rule, score where a judge agrees to all.
CASES = (
    ('qa', 'Paris', 1.0, 1.0),
    ('qa', 'the French capital', 0.0, 1.0),
    ('numeric', 'forty-two and a half', 0.0, 1.0),
    ('mc', 'A', 0.0, 0.0),
    ('count', '8', 0.0, 0.0),
    ('mrcr', 'k3Jd9The river', None, None),
)


def evaluated(judge):
  """Records of CASES, each a prompt of its own."""
  prompts = [
      types.Prompt(
          example=examples.example(kind, id=f'{i}'), tokens=(1,), number=i)
      for i, (kind, *_) in enumerate(CASES)]

  def generate(batch, num_samples):
    assert num_samples == 1
    return [[runner.Response(
        text=f'</think>The answer is {CASES[p.number][1]}', length=9,
        is_finished=True)] for p in batch]

  return runner.evaluate(
      generate, grading.Grader(judge=judge), {8: prompts}, num_samples=1)


def served(server, workdir):
  config = grading.JudgeConfig(
      mode='endpoint', endpoint=completions.EndpointConfig(
          url=server.url, model='m', max_retries=0))
  return judges.make(
      config, python_types.SimpleNamespace(workdir=workdir), initial=dict)


def asked_about(server):
  """Candidates of all requests but the trial's."""
  lines = [line for r in server.requests[1:] for line in r.prompt.splitlines()]
  return [line for line in lines if line.startswith('Candidate: ')]


def test_what_a_judge_accepts_scores_one_where_the_kind_allows_it(tmp_path):
  by_rule = evaluated(None)
  with chat_server.Server(chat_server.yes) as server:
    judge = served(server, tmp_path)
    judged = evaluated(judge)
    judge.close()
    # Right answers, letters, counts and dense rewards need no opinion.
    assert sorted(asked_about(server)) == [
        'Candidate: forty-two and a half', 'Candidate: the French capital']
  for (kind, _, rule, larger), before, after in zip(
      CASES, by_rule, judged, strict=True):
    if rule is None:
      assert before == after
      continue
    assert (before.reward, before.rule) == (rule, kind)
    assert (after.reward, after.rule) == (
        larger, 'judge' if larger > rule else kind)


def test_a_server_that_fails_leaves_the_scores_of_the_rule(tmp_path):
  failing = chat_server.first(1, chat_server.yes, then=chat_server.status(503))
  with chat_server.Server(failing) as server:
    judge = served(server, tmp_path)
    assert evaluated(judge) == evaluated(None)
    judge.close()
    assert len(asked_about(server)) == 2


def test_a_recipe_judges_its_evaluations(tmp_path, monkeypatch):
  monkeypatch.setattr(stages.hybrid, 'score', resume_driver.score)
  judge = {'mode': 'endpoint', 'endpoint': {'model': 'opinionated'}}
  changes = {'recipe': ('synth', 'evals'), 'stages.evals.judge': judge}
  with (chat_server.Server(chat_server.yes) as server,
        tiny_recipe.shared_programs(tmp_path / 'programs')):
    judge['endpoint']['url'] = server.url
    assert tiny_recipe.run(tmp_path / 'run', changes) == 0
    num_requests = len(server.requests)
    assert tiny_recipe.run(tmp_path / 'run', changes) == 0
    assert len(server.requests) == num_requests  # It was finished.
  path = tmp_path / 'run' / 'evals' / '0_base.json'
  evaluation = json.loads(path.read_text())
  assert evaluation['facts']['judge'] == 'opinionated'
  assert 'judge opinionated' in (
      tmp_path / 'run' / 'report.html').read_text()
  records = evaluation['records']
  judged = [r for r in records if r['rule'] == 'judge']
  assert judged and {r['reward'] for r in judged} == {1.0}
  others = [r for r in records if r['rule'] != 'judge']
  assert {r['rule'] for r in others if r['reward'] < 1.0} <= {'count'}


def stage(**judge):
  return evals_stage.EvalsStage(
      lengths=(64,), prompts_at_once=8,
      sampler=decode.SamplerConfig(max_response_len=8),
      judge=grading.JudgeConfig(mode='inprocess', **judge))


@pytest.mark.parametrize('error', [None, run_state.Stopped('stopped')])
def test_the_judge_is_made_of_the_initial_policy_and_closed(
    tmp_path, monkeypatch, error):
  closed, ran = [], []
  judge = python_types.SimpleNamespace(close=lambda: closed.append(True))

  def make(config, context, *, initial):
    assert config.mode == 'inprocess' and initial() == 'initial'
    return judge

  def run(stage, *, judge, params, **_):
    assert not closed and params == 'trained'
    ran.append(judge)
    if error:
      raise error

  monkeypatch.setattr(stages.judges, 'make', make)
  monkeypatch.setattr(stages.evals_stage, 'run', run)
  monkeypatch.setattr(stages.dataset, 'read', lambda *_: [])
  context = python_types.SimpleNamespace(
      workdir=tmp_path, model=None, tokenizer=None, rules=None, compute=None,
      seed=0, publish=lambda: None)
  try:
    stages.observe(
        stage(), '0_base', context, 'trained', [], initial=lambda: 'initial')
  except run_state.Stopped:
    assert error
  assert ran == [judge] and closed == [True]


def test_an_inprocess_judge_needs_rows_that_divide_over_the_mesh():
  context = python_types.SimpleNamespace(rules=rules_lib.Rules(
      mesh.make(mesh.MeshConfig(data=2, seq=4))))
  odd = stage(inprocess=grading.InprocessConfig(row_len=511))
  with pytest.raises(
      types.UserError, match='evals.judge.inprocess.row_len=511 cannot be'):
    stages.check_mesh(odd, context)
  stages.check_mesh(stage(), context)

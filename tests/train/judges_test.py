import json
import types as python_types

import pytest

from longjax import types
from longjax.data import tokenizer as tokenizer_lib
from longjax.parallel import multihost
from longjax.reward import completions, grading, judge
from longjax.train import inprocess_judge, judges
from tests import chat_server, tiny_bpe, tiny_model

YES, NO, FAILED = judge.Verdict.YES, judge.Verdict.NO, judge.Verdict.FAILED
CASES = [
    judge.Case(question='Q?', golds=('Oslo',), prediction=p)
    for p in ('oslo', 'Bergen', 'oslo!', 'oslo')]


def by_candidate(request, connection):
  is_same = 'Candidate: oslo' in request.prompt or 'Paris' in request.prompt
  connection.say('[[YES]]' if is_same else '[[NO]]')


def config(server, **overrides):
  return grading.JudgeConfig(
      mode='endpoint', endpoint=completions.EndpointConfig(
          **dict(url=server.url, model='m', max_retries=0) | overrides))


def context(workdir):
  return python_types.SimpleNamespace(workdir=workdir)


def verdicts(asked):
  for case in CASES:
    asked.ask(case)
  return [r.verdict for r in asked.rulings(CASES)]


def test_nobody_is_asked_by_default(tmp_path):
  assert judges.make(
      grading.JudgeConfig(), context(tmp_path), initial=dict) is None


def test_a_restart_finds_the_verdicts_of_the_work_directory(tmp_path):
  with chat_server.Server(by_candidate) as server:
    for num_asked in (3, 0):
      asked = judges.make(config(server), context(tmp_path), initial=dict)
      before = len(server.requests)
      assert verdicts(asked) == [YES, NO, YES, YES]
      assert len(server.requests) - before == num_asked
      asked.close()
  assert (tmp_path / judges.VERDICTS_FILE).is_file()


def test_a_server_that_is_not_there_is_noticed_at_once(tmp_path):
  with chat_server.Server(by_candidate) as server:
    pass
  with pytest.raises(types.UserError, match='does not answer .connection'):
    judges.make(config(server), context(tmp_path), initial=dict)


def test_all_processes_have_the_rulings_of_the_one_that_asks(
    tmp_path, monkeypatch):
  told = []

  def primary(function, **_):
    told.append(json.dumps(function()))
    return json.loads(told[-1])

  with chat_server.Server(by_candidate) as server:
    monkeypatch.setattr(multihost, 'on_primary', primary)
    first = judges.make(config(server), context(tmp_path), initial=dict)
    assert verdicts(first) == [YES, NO, YES, YES]
    first.close()
    num_requests = len(server.requests)

    # Another process makes the same calls and is told their results.
    messages = iter(told)
    monkeypatch.setattr(
        multihost, 'on_primary', lambda *_, **__: json.loads(next(messages)))
    other = judges.make(config(server), context(tmp_path), initial=dict)
    assert verdicts(other) == [YES, NO, YES, YES]
    other.close()
    assert len(server.requests) == num_requests
    assert not list(messages)


def test_the_initial_policy_may_be_the_judge(tmp_path):
  made = tiny_model.context(tiny_model.rules())
  made.tokenizer = tokenizer_lib.load(tiny_bpe.write(tmp_path))
  asked = judges.make(
      grading.JudgeConfig(mode='inprocess'), made,
      initial=tiny_model.params)
  assert isinstance(asked, inprocess_judge.InprocessJudge)
  asked.close()

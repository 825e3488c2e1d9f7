"""Jobs whose responses a judge is asked about while others are written."""

import dataclasses
import functools
import time
import types as python_types

import numpy as np
import pytest

from longjax import stages, types
from longjax.reward import completions, grading, judge
from longjax.rollout import continuous
from longjax.train import judges, partial, rl_job, rl_stage, run_state
from tests import chat_server, tiny_model
from tests.train import memory_sampling_test, partial_test, rl_job_test

NUM_PROMPTS, NUM_SAMPLES = 8, 3
EXAMPLES = [dataclasses.replace(e, kind='qa', answers=('x',))
            for e in rl_job_test.EXAMPLES]


def rule(example, text, *, is_finished):
  """A half for an even first token; an answer in any case."""
  is_even = int(text.split()[0]) % 2 == 0
  return types.Score(reward=0.5 * is_even, answer=text, rule='qa')


def is_right(answer):
  """What the judge thinks: the same wherever it is asked."""
  return sum(map(int, answer.split())) % 2 == 0


class Judge:
  """Remembers what it was asked when; the clock is given."""

  def __init__(self, clock=lambda: 0):
    self.clock, self.asked, self.collected = clock, [], []
    self.is_closed = False

  def ask(self, case):
    self.asked.append((self.clock(), case.prediction))

  def rulings(self, cases):
    self.collected += [case.prediction for case in cases]
    assert {p for _, p in self.asked} >= set(self.collected)
    return [
        judge.Ruling(
            verdict=judge.Verdict.YES if is_right(case.prediction)
            else judge.Verdict.NO) for case in cases]

  def close(self):
    self.is_closed = True


@functools.cache
def engine():
  """The sampler that all jobs here share; it holds few at a time."""
  return job_of(None, is_new=True).engine


def stage():
  return rl_job_test.stage(
      num_prompts=NUM_PROMPTS, prompts_at_once=2, entropy_source='sampler',
      row_lens=(96,))


def job_of(asked, *, is_new=False):
  made = rl_job.RlJob(
      rl_job_test.context(), stage(), examples=EXAMPLES, score=rule,
      judge=asked)
  if not is_new:
    made._sample.engine = engine()
  return made


class Calls:
  """Counts the sampler's calls, and may slow them down."""

  def __init__(self, monkeypatch, seconds=0.0):
    self.times = []
    write = continuous.ContinuousBatch._write

    def watched(*args):
      self.times.append(time.monotonic())
      time.sleep(seconds)
      return write(*args)

    monkeypatch.setattr(continuous.ContinuousBatch, '_write', watched)

  def __call__(self):
    return len(self.times)


def assert_graded(graded):
  """Every reward is the larger of the two; how many are the judge's."""
  num_judged = 0
  for i, (text, score) in enumerate(zip(
      graded.sampled.texts, graded.scores, strict=True)):
    if not graded.lengths[i]:
      assert score is None and graded.rewards[i] == 0.0
      continue
    by_rule = 0.5 * (int(text.split()[0]) % 2 == 0)
    assert graded.rewards[i] == max(by_rule, float(is_right(text)))
    assert score.rule == ('judge' if is_right(text) else 'qa')
    num_judged += is_right(text)
  return num_judged


def test_a_response_is_judged_as_soon_as_it_has_ended(monkeypatch):
  calls = Calls(monkeypatch)
  asked = Judge(calls)
  graded = job_of(asked).rollout(tiny_model.params(), 0)
  assert 0 < assert_graded(graded) < NUM_PROMPTS * NUM_SAMPLES
  assert graded.metrics['judge/asked'] == NUM_PROMPTS * NUM_SAMPLES
  assert graded.metrics['judge/yes'] == sum(map(is_right, graded.sampled.texts))
  when = [time for time, _ in asked.asked]
  assert when == sorted(when) and when[0] == 1 < when[-1] == calls()
  # With two of eight prompts held, most are asked before the last is begun.
  assert np.mean(np.asarray(when) < calls()) > 0.5
  # Without a judge rewards are the rule's, and nothing else differs.
  plain = job_of(None).rollout(tiny_model.params(), 0)
  assert plain.sampled.texts == graded.sampled.texts and not plain.metrics
  assert set(plain.rewards) == {0.0, 0.5}


def by_sum(seconds):
  """A server that thinks as `Judge` does, slowly."""

  def behave(request, connection):
    lines = dict(
        line.split(': ', 1) for line in request.prompt.splitlines()
        if ': ' in line)
    if lines['Candidate'] != 'Paris':  # The trial.
      time.sleep(seconds)
      is_yes = is_right(lines['Candidate'])
    else:
      is_yes = True
    connection.say('[[YES]]' if is_yes else '[[NO]]')

  return behave


def served(server, workdir):
  config = grading.JudgeConfig(
      mode='endpoint', endpoint=completions.EndpointConfig(
          url=server.url, model='m', max_retries=0))
  return judges.make(
      config, python_types.SimpleNamespace(workdir=workdir), initial=dict)


def test_a_server_judges_while_sampling_goes_on_and_a_restart_asks_it_nothing(
    monkeypatch, tmp_path):
  job_of(None).rollout(tiny_model.params(), 0)  # Compiles.
  calls = Calls(monkeypatch, seconds=0.05)
  with chat_server.Server(by_sum(seconds=0.1)) as server:
    asked = served(server, tmp_path)
    del calls.times[:]
    graded = job_of(asked).rollout(tiny_model.params(), 0)
    asked.close()
    requests = server.requests[1:]
  assert 0 < assert_graded(graded) < NUM_PROMPTS * NUM_SAMPLES
  # Repeated answers are asked about once.
  assert len(requests) == len({(p.example.question, t) for p, t in zip(
      np.repeat(graded.sampled.prompts, NUM_SAMPLES), graded.sampled.texts)})
  # Answers had come before the last tokens were written.
  num_early = sum(r.seconds + 0.1 < calls.times[-1] for r in requests)
  assert num_early >= len(requests) // 3
  assert graded.metrics['judge/wait_seconds'] < 0.1 * len(requests) / 2
  assert not graded.metrics['judge/cached']

  # Killed after the verdicts had come: another server has other opinions.
  with chat_server.Server(chat_server.yes) as other:
    asked = served(other, tmp_path)
    again = job_of(asked).rollout(tiny_model.params(), 0)
    asked.close()
    assert len(other.requests) == 1
  np.testing.assert_array_equal(again.rewards, graded.rewards)
  assert again.scores == graded.scores
  assert again.metrics['judge/cached'] == again.metrics['judge/asked']


def test_what_is_carried_over_is_asked_at_once_and_collected_when_trained_on():
  asked = Judge()
  made = rl_job.RlJob(
      rl_job_test.context(), partial_test.stage(), examples=EXAMPLES,
      score=rule, judge=asked)
  carried, trained = partial_test.stage().carried(), []
  num_waiting = num_judged = 0
  for step in range(4):
    num_asked = len(asked.asked)
    graded = made.rollout(tiny_model.params(), step, carried)
    carried = graded.sampled.carried
    num_judged += assert_graded(graded)
    here = [t for t in graded.sampled.texts if t]
    assert len(asked.collected) - len(trained) == len(here)
    trained += here
    ended = carried.rollouts.is_finished | (
        carried.rollouts.lengths == partial_test.MAX_LEN)
    num_waiting += ended.sum()
    assert len(asked.asked) - num_asked == len(here) + ended.sum()
    assert not partial.is_complete(carried.rollouts)[
        carried.example >= 0].any()
  assert 0 < num_judged < len(trained)
  assert num_waiting  # Some had ended in groups that had not.
  assert sorted(asked.collected) == sorted(trained)


def test_a_memory_agent_is_judged_by_its_answers():
  asked = Judge(clock=lambda: len(turns))
  turns = []

  def answer_rule(example, text, *, is_finished):
    return types.Score(reward=0.0, answer=text or 'none', rule='qa')

  asked.rulings = lambda cases: [
      judge.Ruling(verdict=judge.Verdict.YES) for _ in cases]
  made = rl_job.RlJob(
      memory_sampling_test.context(), memory_sampling_test.stage(),
      examples=memory_sampling_test.EXAMPLES, score=answer_rule, judge=asked)
  sample = made.engine.session

  def session(params):
    opened = sample(params)
    write = opened.sample

    def noted(*args, **kwargs):
      turns.append(1)
      return write(*args, **kwargs)

    opened.sample = noted
    return opened

  made.engine.session = session
  graded = made.rollout(memory_sampling_test.params(), 0)
  assert set(graded.rewards) == {1.0}
  assert sorted(p for _, p in asked.asked) == sorted(
      t or 'none' for t in graded.sampled.texts)
  # Those of short documents while long ones are read.
  assert min(when for when, _ in asked.asked) < len(turns)


def fake_stage(monkeypatch, error):
  """Runs `stages.train` with nothing behind it; the judge, loads."""
  made, loads = Judge(), []

  def run(context, stage, state, place, *, judge, **_):
    assert judge is (made if place.stage_step < stage.steps else None)
    if error:
      raise error
    return state, place

  def make(config, context, *, initial):
    assert config.mode == 'inprocess'
    loads.append(initial())
    return made

  monkeypatch.setattr(stages.rl_job, 'run', run)
  monkeypatch.setattr(stages.judges, 'make', make)
  monkeypatch.setattr(stages.dataset, 'read', lambda *_: EXAMPLES)
  return made, loads


@pytest.mark.parametrize('error', [None, run_state.Stopped('stopped')])
def test_the_judge_of_a_stage_is_made_of_the_initial_policy_and_closed(
    monkeypatch, tmp_path, error):
  configured = dataclasses.replace(
      stage(), judge=grading.JudgeConfig(mode='inprocess'))
  made, loads = fake_stage(monkeypatch, error)
  context = dataclasses.replace(rl_job_test.context(), workdir=tmp_path)
  for stage_step in (1, configured.steps):
    place = run_state.Place(stage='rl', stage_step=stage_step, global_step=9)
    made.is_closed = False
    try:
      stages.train(
          configured, context, None, place, initial=lambda: 'initial')
    except run_state.Stopped:
      assert error
    # A stage that has come to its end asks nobody.
    assert made.is_closed == (stage_step < configured.steps)
  assert loads == ['initial']


def test_an_inprocess_judge_needs_rows_that_divide_over_the_mesh():
  configured = rl_job_test.stage(judge=grading.JudgeConfig(
      mode='inprocess', inprocess=grading.InprocessConfig(row_len=511)))
  with pytest.raises(
      types.UserError, match='rl.judge.inprocess.row_len=511 cannot be split'):
    rl_stage.check(configured, rl_job_test.context(data=2, seq=4))
  rl_stage.check(configured, rl_job_test.context())

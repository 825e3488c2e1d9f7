"""Tests for the loop of longjax.train.run_state."""

import dataclasses
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import types
from longjax.train import metrics, run_state


class FakeCheckpointer:
  """Notes what was on disk when a save began."""

  def __init__(self, workdir):
    self.workdir = workdir
    self.saves = []
    self.num_waits = 0

  def save(self, step, tree, info):
    lines = metrics.read(self.workdir)
    self.saves.append((step, tree, info, [line['step'] for line in lines]))

  def wait(self):
    self.num_waits += 1


class Stop:
  """A signal that comes while a step runs."""

  name = 'SIGTERM'

  def __init__(self):
    self.is_set = False

  def agree(self):
    return self.is_set


class Value:
  """A metric that tells when the host waited for it."""

  def __init__(self, number, log):
    self._number, self._log = number, log

  def __array__(self, *unused, **kwargs):
    self._log.append(f'read {self._number}')
    return np.asarray(float(self._number))


@dataclasses.dataclass
class Run:
  context: run_state.Context
  log: list

  def go(self, *, num_steps, place=None, bad=(), stop_at=None, in_flight=0):
    """A stage whose state counts steps and whose data is a letter a step."""
    position = [place.stage_step if place else 0]

    def step(state, stage_step, global_step):
      self.log.append(f'step {stage_step}')
      position[0] += 1
      if stage_step == stop_at:
        self.context.stop.is_set = True
      in_a_row = (
          state['in_a_row'] + 1 if stage_step in bad else 0)
      return run_state.StepResult(
          state={'count': state['count'] + 1, 'in_a_row': in_a_row},
          num_tokens=10,
          values={'number': Value(stage_step, self.log),
                  'global': global_step, 'skipped_in_a_row': in_a_row})

    place = place or run_state.Place(
        stage='sft', stage_step=0, global_step=20)
    state = {'count': place.stage_step, 'in_a_row': 0}
    return run_state.run_stage(
        self.context, state, place, num_steps=num_steps, step=step,
        data_state=lambda: {'position': position[0]},
        line=lambda *_: 'line', num_in_flight=in_flight)

  @property
  def saves(self):
    return self.context.checkpointer.saves

  def steps(self):
    return [r['step'] for r in metrics.read(self.context.workdir)]


@pytest.fixture
def run(tmp_path):
  # Only what the loop reads.
  context = python_types.SimpleNamespace(
      workdir=tmp_path, checkpoint_every=3, max_skipped_in_a_row=2,
      metrics=metrics.MetricsWriter(tmp_path),
      checkpointer=FakeCheckpointer(tmp_path), stop=Stop(),
      publish=lambda: None)
  return Run(context, [])


@pytest.mark.parametrize('in_flight', [0, 1, 2])
def test_a_checkpoint_comes_after_the_metrics_it_covers(run, in_flight):
  state, place = run.go(num_steps=7, in_flight=in_flight)
  assert state['count'] == 7
  assert place == run_state.Place(
      stage='sft', stage_step=7, global_step=27, data={'position': 7})
  for step, tree, info, written in run.saves:
    assert written == list(range(21, step + 1))
    assert tree['count'] == step - 20
    assert info == {'stage': 'sft', 'stage_step': step - 20,
                    'global_step': step, 'data': {'position': step - 20}}
  assert [s[0] for s in run.saves] == [23, 26, 27]
  assert run.steps() == list(range(21, 28))


def test_metrics_wait_for_the_next_step_to_be_dispatched(run):
  run.go(num_steps=3, in_flight=1)
  assert run.log == [
      'step 0', 'step 1', 'read 0', 'step 2', 'read 1', 'read 2']


def test_without_steps_in_flight_metrics_are_read_at_once(run):
  run.go(num_steps=2)
  assert run.log == ['step 0', 'read 0', 'step 1', 'read 1']


def test_a_stage_goes_on_where_it_was(run):
  place = run_state.Place(stage='sft', stage_step=5, global_step=25)
  state, place = run.go(num_steps=7, place=place)
  assert run.log[0] == 'step 5'
  assert run.steps() == [26, 27]
  assert place.global_step == 27
  assert state['count'] == 7


def test_a_finished_stage_is_left_as_it_is(run):
  place = run_state.Place(stage='sft', stage_step=7, global_step=27)
  state, after = run.go(num_steps=7, place=place)
  assert (run.log, run.saves, after) == ([], [], place)
  assert state['count'] == 7


@pytest.mark.parametrize('in_flight', [0, 1])
def test_a_signal_saves_the_step_it_came_in(run, in_flight):
  with pytest.raises(run_state.Stopped, match='saved at step 2 of sft'):
    run.go(num_steps=7, stop_at=1, in_flight=in_flight)
  assert [s[0] for s in run.saves] == [22]
  assert run.saves[0][3] == [21, 22]
  assert run.context.checkpointer.num_waits == 1
  assert run.log.count('step 2') == 0


def test_a_signal_in_the_last_step_ends_the_stage_as_usual(run):
  _, place = run.go(num_steps=2, stop_at=1)
  assert place.stage_step == 2
  assert [s[0] for s in run.saves] == [22]


def test_bad_steps_are_told_and_end_the_run_when_too_many(run, caplog):
  run.go(num_steps=3, bad={1})
  assert 'Step 2 of sft' in caplog.text
  assert '(1 in a row)' in caplog.text
  run.saves.clear()
  with pytest.raises(types.UserError) as caught:
    run.go(num_steps=9, bad={4, 5})
  assert 'stage sft stopped at step 6: 2 steps in a row' in str(caught.value)
  # Not the ruined state of step 6, which was due.
  assert [s[0] for s in run.saves] == [23]


def test_values_may_be_arrays_of_devices(run):
  def step(state, stage_step, global_step):
    del stage_step, global_step
    return run_state.StepResult(
        state=state, num_tokens=3, values={
            'loss': jnp.float32(0.1), 'skipped_in_a_row': jnp.int32(0)})

  run_state.run_stage(
      run.context, {}, run_state.Place(
          stage='rl', stage_step=0, global_step=0),
      num_steps=1, step=step, data_state=lambda: None,
      line=lambda step, total, values: f'{step}/{total} {values["loss"]}')
  (record,) = metrics.read(run.context.workdir)
  values = record['values']
  assert values['loss'] == float(np.float32(0.1))
  assert values['time/tokens_per_second'] == pytest.approx(
      3 / values['time/step_seconds'])


def context_of(seed):
  fields = {f.name: None for f in dataclasses.fields(run_state.Context)}
  return run_state.Context(**fields | {'seed': seed})


def test_keys_differ_between_seeds_and_stages_and_stay_the_same():
  keys = {
      (seed, stage): tuple(
          jax.random.key_data(context_of(seed).key(stage)).tolist())
      for seed in (0, 1) for stage in ('sft', 'rl')}
  assert len(set(keys.values())) == 4
  again = jax.random.key_data(context_of(1).key('rl')).tolist()
  assert keys[1, 'rl'] == tuple(again)


def test_a_full_disk_does_not_hide_an_error_when_writers_close(tmp_path):
  class Full:
    num_closed = 0

    def close(self):
      Full.num_closed += 1
      raise OSError('No space left on device')

  context = context_of(0)
  context = dataclasses.replace(context, metrics=Full(), rollouts=Full())
  context.close()
  assert Full.num_closed == 2

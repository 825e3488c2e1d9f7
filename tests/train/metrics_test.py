import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from longjax import types
from longjax.data import records
from longjax.parallel import multihost
from longjax.train import metrics


def _events(workdir):
  """(tag, step, value) as TensorBoard shows them: a START event purges."""
  shown = []
  folder = workdir / metrics.TENSORBOARD_FOLDER
  for path in sorted(folder.iterdir()):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack('<Q', content[:8])
      event = event_pb2.Event.FromString(content[12:12 + length])
      content = content[16 + length:]
      if event.HasField('session_log'):
        assert event.session_log.status == event_pb2.SessionLog.START
        shown = [s for s in shown if s[1] < event.step]
      for value in event.summary.value:
        shown.append((value.tag, event.step, value.simple_value))
  return shown


def _example():
  return types.TaskExample(
      id='e1', task='reading', kind='qa', question='Where?',
      answers=('Rome', 'Roma'), instruction='One word.',
      documents=(
          types.Document(title='One', text='It is in Rome.'),
          types.Document(title='Two', text='Nothing.')),
      evidence=(types.Span(document=0, start=9, end=13),))


def _sample(text, reward=1.0):
  return metrics.Sample(
      text=text, score=types.Score(reward=reward, answer='Rome', rule='exact'),
      advantage=np.float32(0.1), length=7, entropy=0.25, is_kept=False)


def test_numbers_survive_with_all_their_bits(tmp_path):
  third = np.float32(1) / np.float32(3)
  writer = metrics.MetricsWriter(tmp_path)
  writer.write(1, 'sft', {'loss': jnp.float32(third), 'x': 0.1 + 0.2})
  writer.write(jnp.int32(2), 'sft', {'loss': np.nan})
  # Not closed: what a killed process leaves.
  first, second = metrics.read(tmp_path)
  assert first == {
      'step': 1, 'stage': 'sft', 'values': {'loss': float(third),
                                            'x': 0.30000000000000004}}
  assert np.isnan(second['values']['loss'])
  writer.close()
  assert _events(tmp_path) == [
      ('sft/loss', 1, pytest.approx(1 / 3)), ('sft/x', 1, pytest.approx(0.3))]


def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path):
  def run(writer, steps):
    for step in steps:
      writer.write(step, 'rl', {'reward/mean': np.sin(step)})

  straight = metrics.MetricsWriter(tmp_path / 'straight')
  run(straight, range(1, 9))
  straight.close()

  killed = metrics.MetricsWriter(tmp_path / 'killed')
  run(killed, range(1, 6))
  killed.close()
  path = tmp_path / 'killed' / metrics.METRICS_FILE
  path.write_bytes(path.read_bytes() + b'{"step": 6, "sta')
  resumed = metrics.MetricsWriter(tmp_path / 'killed')
  resumed.truncate(3)
  run(resumed, range(4, 9))
  resumed.close()

  assert path.read_bytes() == (
      tmp_path / 'straight' / metrics.METRICS_FILE).read_bytes()
  assert _events(tmp_path / 'killed') == _events(tmp_path / 'straight')


def test_a_writer_may_truncate_what_it_wrote_itself(tmp_path):
  writer = metrics.MetricsWriter(tmp_path)
  writer.write(0, 'rl', {'a': 1.0})
  writer.write(1, 'rl', {'a': 2.0})
  writer.truncate(-1)
  assert metrics.read(tmp_path) == []
  writer.write(0, 'rl', {'a': 3.0})
  writer.close()
  assert [r['values']['a'] for r in metrics.read(tmp_path)] == [3.0]
  assert _events(tmp_path) == [('rl/a', 0, 3.0)]


def test_a_rollout_record_holds_what_a_reader_needs(tmp_path):
  writer = metrics.RolloutWriter(tmp_path)
  writer.write(
      4, 'rl', _example(),
      [_sample('so Rome</think>The answer is Rome.'), _sample('no end')],
      prompt_text='<|im_start|>user ...')
  (record,) = records.read(tmp_path / metrics.ROLLOUTS_FILE)
  assert record['step'] == 4 and record['id'] == 'e1'
  assert record['gold'] == ['Rome', 'Roma']
  assert record['prompt'] == '<|im_start|>user ...'
  assert [d['evidence'] for d in record['documents']] == [[[9, 13]], []]
  first, second = record['samples']
  assert first['thinking'] == 'so Rome'
  assert first['response'] == 'The answer is Rome.'
  assert first['advantage'] == float(np.float32(0.1))
  assert not first['is_kept'] and first['is_finished']
  assert (second['thinking'], second['response']) == ('no end', '')


def test_rollouts_are_truncated_like_numbers(tmp_path):
  writer = metrics.RolloutWriter(tmp_path)
  for step in range(4):
    writer.write(step, 'rl', _example(), [_sample('x')], prompt_text='p')
  before = (tmp_path / metrics.ROLLOUTS_FILE).read_bytes()
  writer.truncate(1)
  for step in range(2, 4):
    writer.write(step, 'rl', _example(), [_sample('x')], prompt_text='p')
  writer.close()
  assert (tmp_path / metrics.ROLLOUTS_FILE).read_bytes() == before


def test_only_the_primary_process_touches_the_disk(tmp_path, monkeypatch):
  monkeypatch.setattr(multihost, 'is_primary', lambda: False)
  numbers = metrics.MetricsWriter(tmp_path)
  rollouts = metrics.RolloutWriter(tmp_path)
  for writer in (numbers, rollouts):
    writer.truncate(3)
  numbers.write(1, 'rl', {'a': 1.0})
  rollouts.write(1, 'rl', _example(), [], prompt_text='')
  for writer in (numbers, rollouts):
    writer.close()
  assert list(tmp_path.iterdir()) == []

import io

import pytest

from longjax.parallel import multihost
from longjax.train import progress


class _Clock:

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class _Terminal(io.StringIO):

  def isatty(self):
    return True


def _run(stream, *, total=100, start=0, seconds=1.0, first_seconds=30.0):
  """Runs to the end; the first step takes longer, as compilation does."""
  clock = _Clock()
  bar = progress.Progress(
      total, 'rl', 'step', start=start, stream=stream, clock=clock)
  with bar:
    for step in range(start, total):
      clock.now += first_seconds if step == start else seconds
      bar.log_step(f'line {step}')
      bar.advance()
  return stream.getvalue().splitlines()


def test_a_log_file_gets_first_line_last_line_and_one_each_ten_seconds():
  lines = _run(io.StringIO())
  states = [line for line in lines if line.startswith('rl: ')]
  assert states[0] == 'rl: 0/100 steps (0%)'
  # Done is counted when a line is due: 30 s in, then after each 10 steps.
  assert [s.split()[1] for s in states[1:]] == [
      '1/100', '11/100', '21/100', '31/100', '41/100', '51/100', '61/100',
      '71/100', '81/100', '91/100', '100/100']
  assert states[-1].endswith('1.0 steps/s | done after 2:09')
  assert [line for line in lines if line.startswith('line')] == [
      f'line {i}' for i in range(100)]
  assert not any('\x1b' in line or '\r' in line for line in lines)


def test_time_left_forgets_compilation_and_what_was_done_before_a_resume():
  lines = _run(io.StringIO(), start=40, seconds=2.0, first_seconds=600.0)
  assert lines[0] == 'rl: 40/100 steps (40%)'
  assert 'rl: 51/100 steps (51%) | 2.0 s/step | 1:38 left' in lines


def test_time_left_follows_the_recent_rate():
  clock = _Clock()
  bar = progress.Progress(
      1000, 'x', stream=io.StringIO(), clock=clock)
  with bar:
    for seconds in [1.0] * 50 + [4.0] * 20:
      clock.now += seconds
      bar.advance()
    assert bar.state() == '70/1,000 steps (7%) | 4.0 s/step | 1:02:00 left'


def test_an_error_is_not_called_done():
  stream = io.StringIO()
  with pytest.raises(KeyError), progress.Progress(5, 'sft', stream=stream):
    raise KeyError
  assert 'stopped after' in stream.getvalue().splitlines()[-1]


def test_a_terminal_gets_a_bar_and_the_lines_as_they_are():
  text = '\n'.join(_run(_Terminal(), total=3))
  assert '3/3 steps (100%)' in text
  assert '\x1b' in text  # The bar redraws itself.
  stream = _Terminal()
  with progress.Progress(1, 'a[red]b', stream=stream) as bar:
    bar.log_step('entropy 0.2 [0.140, 0.250] [bold]no markup[/bold]')
  assert 'entropy 0.2 [0.140, 0.250] [bold]no markup[/bold]' in (
      stream.getvalue())
  assert 'a[red]b' in stream.getvalue()


def test_other_processes_are_silent(monkeypatch):
  monkeypatch.setattr(multihost, 'is_primary', lambda: False)
  for stream in (io.StringIO(), _Terminal()):
    assert _run(stream, total=3) == []


def test_an_rl_line_names_everything_the_step_is_judged_by():
  values = {
      'reward/mean': 0.4242, 'reward/numeric': 0.211, 'reward/mc': 0.5,
      'entropy/seq_mean': 0.2312, 'aepo/mode': 1.0, 'aepo/low': 0.14,
      'aepo/high': 0.25, 'length/mean': 38.4, 'length/truncated': 0.021,
      'grad_norm': 0.834, 'gap/logprob_mean': 2.14e-6,
      'time/tokens_per_second': 1234.4}
  assert progress.rl_line(12, 120, values) == (
      'rl  12/120 | reward 0.42 (mc 0.50, numeric 0.21) | '
      'entropy 0.231 POS [0.140, 0.250] | length 38 (2% cut) | grad 0.83 | '
      'gap 2.1e-06 | 1,234 tok/s')
  values['aepo/mode'] = 0.0
  assert ' FULL [' in progress.rl_line(12, 120, values)


def test_a_band_is_shown_once_it_is_measured():
  values = {'entropy/seq_mean': 0.2, 'aepo/mode': 0.0,
            'aepo/low': float('nan'), 'aepo/high': float('inf')}
  assert progress.rl_line(1, 9, values) == 'rl 1/9 | entropy 0.200 FULL'


def test_a_line_leaves_out_what_was_not_measured():
  assert progress.rl_line(1, 9, {'reward/mean': 1.0}) == 'rl 1/9 | reward 1.00'
  assert progress.sft_line(300, 900, {
      'loss': 0.4124, 'grad_norm': 1.2,
      'time/tokens_per_second': 21034.0}) == (
          'sft 300/900 | loss 0.412 | grad 1.20 | 21,034 tok/s')


def test_durations_and_rates_read_naturally():
  assert progress.duration(6.6) == '0:07'
  assert progress.duration(754) == '12:34'
  assert progress.duration(5 * 3600 + 6 * 60 + 7) == '5:06:07'
  assert progress.duration(2 * 86400 + 3 * 3600) == '2d 03:00:00'
  assert progress.rate(1234.0, 'example') == '1,234 examples/s'
  assert progress.rate(0.25, 'step') == '4.0 s/step'
  assert progress.rate(0.0, 'step') == '0 steps/s'

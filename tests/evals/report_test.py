import html.parser
import json
import re

import pytest

from longjax import types
from longjax.data import records
from longjax.evals import page, report, runner, scores

ATTACK = '</pre><script>alert(1)</script><img src=x onerror="alert(2)">\'"&'


class _Outline(html.parser.HTMLParser):
  """Checks that tags nest; keeps elements, attributes and text."""

  def __init__(self, text):
    super().__init__()
    self.open_tags, self.elements, self.texts = [], [], []
    self.feed(text)
    assert self.open_tags == []

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in ('meta', 'input', 'br', 'img'):
      self.open_tags.append(tag)

  def handle_endtag(self, tag):
    assert self.open_tags.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


def _fill(workdir, text='plain'):
  """A work directory of a small run with `text` wherever text can be."""
  workdir.mkdir(exist_ok=True)
  appender = records.Appender(workdir / 'metrics.jsonl')
  for step in range(4):
    appender.append({
        'step': step, 'stage': f'sft{text}',
        'values': {'loss': 2.0 - step, 'time/step_seconds': 0.5}})
  for step in range(4, 9):
    appender.append({
        'step': step, 'stage': 'rl', 'values': {
            'reward/mean': 0.1 * step, f'reward/{text}': 0.1, 'loss': 0.0,
            'entropy/seq_mean': 0.2, 'aepo/mode': float(step > 6),
            'aepo/low': 0.14, 'aepo/high': 0.25, 'length/mean': 30.0,
            'gap/logprob_max': 1e-5, 'gap/logprob_mean': 0.0}})
  appender = records.Appender(workdir / 'rollouts.jsonl')
  appender.append({
      'step': 5, 'stage': text, 'id': text, 'task': text, 'kind': text,
      'prompt': text, 'question': text, 'instruction': text, 'gold': [text],
      'documents': [{'title': text, 'text': text, 'evidence': [[0, 3]]}],
      'samples': [{
          'thinking': text, 'response': text, 'answer': text, 'rule': text,
          'reward': 0.0, 'advantage': -1.0, 'length': 3, 'entropy': 0.1,
          'is_finished': True, 'is_kept': True}]})
  for name, reward in (('0_base', 0.0), (f'1_{text.replace("/", "")}', 1.0)):
    results = [
        scores.Record(
            id=f'{text}{i}', task=text, context_length=64, prompt_length=60,
            depth=0.5, sample=0, question=text, gold=(text,),
            evidence=(text,), response=f'{text}</think>{text}',
            response_length=4, is_finished=True, answer=text, rule=text,
            reward=reward) for i in range(3)]
    runner.save(workdir, name, results, facts={text: text})
  for name in ('config.json', 'run.json'):
    (workdir / name).write_text(json.dumps({text: text, 'deep': {text: 1}}))
  return workdir


def test_the_page_holds_result_curves_rollouts_and_run(tmp_path):
  path = report.write(_fill(tmp_path), title='A run')
  content = path.read_text()
  assert path == tmp_path / 'report.html'
  outline = _Outline(content)
  ids = [a['id'] for _, a in outline.elements if 'id' in a]
  assert ids == ['result', 'rl', 'sft', 'rollouts', 'answers', 'run']
  links = [a['href'] for t, a in outline.elements if t == 'a']
  assert links == [f'#{i}' for i in ids]
  for words in ('A run', '+1.00', 'Entropy and AEPO', 'Response length',
                'Sampler and trainer', 'Reward by task', '5 steps'):
    assert words in content
  assert ('mark', {}) in outline.elements


def test_what_a_model_wrote_cannot_become_markup(tmp_path):
  plain = _Outline(report.write(
      _fill(tmp_path / 'a', 'x' * len(ATTACK))).read_text())
  content = report.write(_fill(tmp_path / 'b', ATTACK)).read_text()
  attacked = _Outline(content)
  assert [t for t, _ in attacked.elements] == [t for t, _ in plain.elements]
  assert [sorted(a) for _, a in attacked.elements] == [
      sorted(a) for _, a in plain.elements]
  assert '<script>alert' not in content and 'onerror="' not in content
  # Nothing is swallowed either: the reader sees what was written.
  assert sum(ATTACK in t for t in attacked.texts) >= 10


def test_the_page_fetches_nothing_and_runs_only_its_own_script(tmp_path):
  content = report.write(_fill(tmp_path)).read_text()
  assert not re.search(r'https?:|//[a-z]|@import|url\(', content)
  outline = _Outline(content)
  for tag, attributes in outline.elements:
    assert tag not in ('link', 'img', 'iframe', 'object', 'embed')
    assert not {'src', 'srcset', 'style:src'} & attributes.keys()
    assert not [a for a in attributes if a.startswith('on')]
  (policy,) = [
      a['content'] for t, a in outline.elements
      if a.get('http-equiv') == 'Content-Security-Policy']
  assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
  assert content.count('<script>') == 1 and page.SCRIPT in content


def test_a_page_can_be_made_before_there_is_anything_to_show(tmp_path):
  content = report.write(tmp_path).read_text()
  assert [t for t, a in _Outline(content).elements if t == 'section'] == []
  assert tmp_path.name in content


@pytest.mark.parametrize('missing', [
    'metrics.jsonl', 'rollouts.jsonl', 'config.json', 'run.json', 'evals'])
def test_whatever_is_missing_is_left_out(tmp_path, missing):
  workdir = _fill(tmp_path)
  (workdir / missing).rename(tmp_path / 'gone')
  _Outline(report.write(workdir).read_text())


def test_a_running_run_with_torn_lines_has_a_page(tmp_path):
  workdir = _fill(tmp_path)
  before = report.write(workdir).read_text()
  for name in ('metrics.jsonl', 'rollouts.jsonl'):
    with open(workdir / name, 'a') as file:
      file.write('{"step": 9, "sta')
  assert report.write(workdir).read_text() == before


def test_numbers_that_are_not_numbers_do_not_spoil_the_page(tmp_path):
  workdir = _fill(tmp_path)
  appender = records.Appender(workdir / 'metrics.jsonl')
  for value in (float('nan'), float('inf'), -float('inf')):
    appender.append({'step': 9, 'stage': 'rl', 'values': {
        'reward/mean': value, 'gap/logprob_max': value, 'aepo/low': value,
        'aepo/mode': value, 'grad_norm': value}})
  content = report.write(workdir).read_text()
  _Outline(content)
  assert not re.search(r'[" ,LM](nan|inf)\b', content)


def test_one_evaluation_alone_has_no_gain_column(tmp_path):
  workdir = _fill(tmp_path)
  (workdir / 'evals' / '1_plain.json').unlink()
  content = report.write(workdir).read_text()
  _Outline(content)
  assert '−' not in content.split('id="rl"')[0]


def test_a_damaged_config_is_named(tmp_path):
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(types.UserError, match=r'config\.json is damaged'):
    report.write(tmp_path)

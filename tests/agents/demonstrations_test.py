"""The oracle notes the evidence it has read, and the model can say it."""

import dataclasses

import numpy as np
import pytest

from longjax import types
from longjax.agents import demonstrations, memory
from longjax.data import chat, prompts
from longjax.data import tokenizer as tokenizer_lib
from longjax.reward import hybrid

TOKENIZER = tokenizer_lib.load('configs/tiny_base')
AGENT = memory.MemoryAgent(TOKENIZER, memory.MemoryConfig(
    part_len=24, line_end_share=0.4, memory_len=60, plan_len=6,
    wording='short'))
FACTS = ('The port of Oslo is Rome.', 'The mayor of Rome is Ada.')


def example(order=(0, 1)):
  """Two facts, far apart, in this order."""
  filler = 'The twin of Bern is Kiel.'
  texts = [filler, FACTS[order[0]], filler, filler, FACTS[order[1]], filler]
  evidence = []
  for fact in FACTS:
    document = texts.index(fact)
    evidence.append(types.Span(document=document, start=0, end=len(fact)))
  return types.TaskExample(
      id='one', task='multihop', kind='qa', question='Who is the mayor?',
      instruction='Answer with the name only.', answers=('Ada',),
      reasoning=' '.join(FACTS), evidence=tuple(evidence),
      documents=tuple(types.Document(title='', text=t) for t in texts))


def turns(made):
  """Each turn once, by prompt."""
  found = {}
  rng = np.random.default_rng(0)
  for _ in range(200):
    prompt, response = demonstrations.turn(
        made, AGENT, TOKENIZER, rng, with_reasoning=False)
    assert found.setdefault(tuple(prompt), tuple(response)) == tuple(response)
  return found


def between(text, tag):
  return text.partition(f'<{tag}>')[2].partition(f'</{tag}>')[0]


@pytest.mark.parametrize('order', [(0, 1), (1, 0)])
def test_notes_are_the_evidence_read_so_far_in_the_order_it_was_read(order):
  made = example(order)
  parts = list(AGENT.parts(made.documents))
  found = turns(made)
  assert len(found) == len(parts) + 1 > 3
  in_order = [FACTS[i] for i in order]
  seen = set()
  for prompt, response in found.items():
    text = TOKENIZER.decode(prompt)
    if '<part>' not in text:
      assert between(text, 'memory') == ' '.join(in_order)
      continue
    part = text.partition('<part>\n')[2].partition('\n</part>')[0]
    number = [AGENT.text(p) for p in parts].index(part)
    seen.add(number)
    read = [
        [f for f in in_order
         if any(f in AGENT.text(p) for p in parts[:n])]
        for n in (number, number + 1)]
    assert between(text, 'memory') == (' '.join(read[0]) or '(empty)')
    notes = AGENT.read(response)
    assert notes.is_parsed
    assert TOKENIZER.decode(notes.memory) == (
        ' '.join(read[1]) or '(empty)')
    assert TOKENIZER.decode(notes.plan) == (
        'Done.' if len(read[1]) == 2 else 'Go on.')
  assert seen == set(range(len(parts)))


def test_the_answer_earns_the_reward():
  made = example()
  [response] = [
      r for p, r in turns(made).items()
      if '<part>' not in TOKENIZER.decode(p)]
  text = TOKENIZER.decode(response[:-1])
  assert hybrid.score(made, text).reward == 1.0
  assert list(response) == prompts.demonstration(
      made, TOKENIZER, with_reasoning=False)
  assert chat.split_response(text).thinking == ''


def test_evidence_that_a_cut_runs_through_is_not_noted():
  long = 'The mayor ' * 40 + 'is Ada.'
  made = dataclasses.replace(
      example(), documents=(types.Document(title='', text=long),),
      evidence=(types.Span(document=0, start=0, end=len(long)),))
  for prompt, response in turns(made).items():
    assert between(TOKENIZER.decode(prompt), 'memory') == '(empty)'
    if '<part>' in TOKENIZER.decode(prompt):
      assert TOKENIZER.decode(response).endswith(
          '<memory>(empty)</memory><plan>Go on.</plan><|im_end|>')

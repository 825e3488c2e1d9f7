"""Evaluations by the memory agent, and tables that keep modes apart."""

import io

import pytest

from longjax import types
from longjax.agents import memory, rounds
from longjax.data import prompts
from longjax.data import tokenizer as tokenizer_lib
from longjax.evals import runner, scores, stage, summary, tables
from longjax.rollout import decode

TOKENIZER = tokenizer_lib.load('configs/tiny_base')
CONFIG = memory.MemoryConfig(
    part_len=16, memory_len=20, plan_len=0, wording='short')
AGENT = memory.MemoryAgent(TOKENIZER, CONFIG)


def prompt(number, num_documents):
  example = types.TaskExample(
      id=f'example {number}', task='reading', kind='qa', question='Who?',
      answers=('Ada',), documents=tuple(
          types.Document(title='', text=f'The mayor of town {i} is Ada.')
          for i in range(num_documents)))
  return prompts.to_prompt(example, TOKENIZER, max_len=999)


def test_the_answer_of_the_last_turn_counts_and_all_tokens_do():
  batch = [prompt(0, 1), prompt(1, 4)]
  written = {}

  def generate(asked):
    made = []
    for one in asked:
      text = f'reader {one.query} {one.sample} turn {one.turn}'
      is_finished = one.query == 0
      tokens = TOKENIZER.encode(text)
      if is_finished:
        tokens.append(TOKENIZER.stop_ids[0])
      reader = one.query, one.sample
      written[reader] = written.get(reader, 0) + len(tokens)
      made.append(rounds.Response(tokens=tokens, is_finished=is_finished))
    return made

  answers = stage._read(AGENT, batch, 2, TOKENIZER, generate)
  for q, one in enumerate(batch):
    num_parts = len(list(AGENT.parts(one.example.documents)))
    for g, answer in enumerate(answers[q]):
      assert answer.text == f'reader {q} {g} turn {num_parts}'
      assert answer.length == written[q, g]
      assert answer.is_finished == (q == 0)


def evaluation(directory, name, reward, **facts):
  record = scores.Record(
      id='one', task='reading', context_length=128, prompt_length=100,
      depth=None, sample=0, question='?', gold=('a',), evidence=(),
      response='a', response_length=3, is_finished=True, answer='a', rule='qa',
      reward=reward)
  runner.save(directory, name, [record], facts=facts)


def test_modes_are_shown_apart(tmp_path):
  for name, reward, facts in (
      ('0_base', 0.0, {}), ('1_rl', 0.5, {}),
      ('2_rl_agent', 0.25, {'part_len': 192}),
      ('3_memory_agent', 1.0, {'part_len': 192})):
    evaluation(tmp_path, name, reward, **facts)
  shown = io.StringIO()
  summary.show(tmp_path, shown)
  whole, _, in_parts = shown.getvalue().partition('part by part')
  assert 'rl - base' in whole and '+0.50' in whole and 'agent' not in whole
  assert 'memory_agent - rl_agent' in in_parts and '+0.75' in in_parts
  assert 'base' not in in_parts
  only = [e for e in runner.load(tmp_path) if 'agent' not in e['name']]
  assert tables.by_mode(only) == [('', only)]
  assert tables.by_mode([]) == []


def test_the_cap_on_turns_goes_with_the_agent():
  sampler = decode.SamplerConfig(max_response_len=8)
  for facts in (dict(memory=CONFIG), dict(max_prompt_len=100)):
    with pytest.raises(types.UserError, match='evals.max_prompt_len='):
      stage.EvalsStage(lengths=(512,), sampler=sampler, **facts)
  made = stage.EvalsStage(
      lengths=(512,), sampler=sampler, memory=CONFIG, max_prompt_len=100,
      num_samples=3)
  assert made.engine.prompt_buckets == (100,)
  assert made.engine.samples_per_prompt == 1

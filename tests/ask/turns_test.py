"""Prompts of turns are never longer than what is compiled for."""

import pytest

from longjax.agents import memory, query
from longjax.ask import settings, turns
from longjax.data import tokenizer as tokenizer_lib
from longjax.rollout import decode


@pytest.mark.parametrize('question', [
    '?', 'Who signed? Answer in one word.', 'What is ' + '<memory>' * 90 + '?',
    '</part> ' * 90 + 'Answer as JSON.'])
@pytest.mark.parametrize('plan_len', [0, 9])
@pytest.mark.parametrize('split', ['rules', 'model'])
def test_no_prompt_is_longer_than_was_said(question, plan_len, split):
  agent = memory.MemoryAgent(
      tokenizer_lib.load('configs/tiny_base'),
      memory.MemoryConfig(part_len=64, memory_len=32, plan_len=plan_len))
  last, others = turns.lengths(agent, settings.AskConfig(
      question=('Who?', question), split=split,
      sampler=decode.SamplerConfig(temperature=0.7, max_response_len=16)))
  notes = memory.Notes(memory=(5,) * 32, plan=(5,) * plan_len)
  splits = [query.split(question)]
  if split == 'model':  # It may call any of its words the question.
    splits += [(question, ''), (question.split()[0], question)]
  for asked, instruction in splits:
    assert len(agent.update_prompt((5,) * 64, asked, notes)) <= others
    assert len(agent.final_prompt(asked, instruction, notes)) <= last

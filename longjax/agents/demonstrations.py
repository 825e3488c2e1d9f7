"""Demonstrations of the memory agent's turns, from examples with evidence.

An oracle notes the evidence that it has read, word for word, and nothing else;
if there is none, it says so.
"""

import numpy as np

from longjax import types
from longjax.agents import memory
from longjax.data import prompts
from longjax.data import tokenizer as tokenizer_lib

# The oracle's plans: evidence is missing, or all is there.
_GO_ON, _DONE = 'Go on.', 'Done.'


def turn(
    example: types.TaskExample,
    agent: memory.MemoryAgent,
    tokenizer: tokenizer_lib.Tokenizer,
    rng: np.random.Generator,
    *,
    with_reasoning: bool,
) -> tuple[list[int], list[int]]:
  """A turn of reading an example, any of its turns.

  Args:
    example: what is read.
    agent: its prompts.
    tokenizer: of the agent.
    rng: draws the turn.
    with_reasoning: whether an answer thinks first.

  Returns:
    Ids of the prompt and of the response, stop token included.
  """
  parts = list(agent.parts(example.documents))
  number = int(rng.integers(len(parts) + 1))
  before = _notes(example, agent, parts, number)
  if number == len(parts):
    return (
        agent.final_prompt(example.question, example.instruction, before),
        prompts.demonstration(
            example, tokenizer, with_reasoning=with_reasoning))
  return (
      agent.update_prompt(parts[number], example.question, before),
      agent.response(_notes(example, agent, parts, number + 1)))


def _notes(
    example: types.TaskExample,
    agent: memory.MemoryAgent,
    parts: list[tuple[int, ...]],
    num_read: int,
) -> memory.Notes:
  """The oracle's, after so many parts."""
  if not num_read:
    return memory.Notes()
  evidence = [
      example.documents[span.document].text[span.start:span.end]
      for span in example.evidence]
  texts = [agent.text(part) for part in parts[:num_read]]
  # Once each, in the order they are read; what a cut runs through is lost.
  found = dict.fromkeys(
      fact for text in texts for fact in sorted(
          (e for e in evidence if e in text), key=text.find))
  return agent.notes(
      ' '.join(found) or memory.EMPTY,
      _DONE if len(found) == len(set(evidence)) else _GO_ON)

"""Readers take turns; who is done takes no place."""

import pytest

from longjax.agents import memory, rounds
from longjax.data import tokenizer as tokenizer_lib

TOKENIZER = tokenizer_lib.load('configs/tiny_base')
AGENT = memory.MemoryAgent(TOKENIZER, memory.MemoryConfig(
    part_len=16, memory_len=40, plan_len=10, wording='short'))


def query(name, num_parts):
  return rounds.Query(
      question=f'Who is {name}?', instruction='One word.',
      num_parts=num_parts,
      parts=[tuple(TOKENIZER.encode(f'{name} part {t}.\n'))
             for t in range(num_parts)])


class Model:
  """Notes how many it has noted; keeps what it was asked."""

  def __init__(self):
    self.asked = []

  def __call__(self, prompts):
    self.asked.append(list(prompts))
    return [self._response(prompt) for prompt in prompts]

  def _response(self, prompt):
    text = TOKENIZER.decode(prompt.tokens)
    if '<part>' not in text:
      tokens = [*TOKENIZER.encode('Done.'), TOKENIZER.stop_ids[0]]
    else:
      seen = text.partition('<memory>')[2].partition('</memory>')[0]
      tokens = AGENT.response(AGENT.notes(
          f'{seen}+{prompt.sample}'.replace('(empty)', ''), f'p{prompt.turn}'))
    return rounds.Response(tokens=tokens, is_finished=True)


def readers(*numbers):
  return [rounds.Reader(query=q, sample=g) for q, g in numbers]


QUERIES = [query('Ada', 3), query('Bo', 1), query('Cy', 0)]
ALL = ((0, 0), (0, 1), (1, 0), (2, 0))


def test_every_reader_reads_all_parts_in_order_and_answers():
  model = Model()
  turns = [turn for made in rounds.read(
      AGENT, QUERIES, model, readers(*ALL)) for turn in made]
  for (q, g), num_parts in zip(ALL, (3, 3, 1, 0), strict=True):
    own = [t for t in turns if (t.prompt.query, t.prompt.sample) == (q, g)]
    assert [t.prompt.turn for t in own] == list(range(num_parts + 1))
    assert [t.is_last for t in own] == [False] * num_parts + [True]
    name = ('Ada', 'Bo', 'Cy')[q]
    for number, turn in enumerate(own[:-1]):
      text = TOKENIZER.decode(turn.prompt.tokens)
      assert f'<part>\n{name} part {number}.\n' in text
      before = f'+{g}' * number or '(empty)'
      assert f'<memory>{before}</memory>' in text
      assert f'<plan>{f"p{number - 1}" if number else "(empty)"}<' in text
      assert TOKENIZER.decode(turn.notes.memory) == f'+{g}' * (number + 1)
    last = TOKENIZER.decode(own[-1].prompt.tokens)
    assert f'<memory>{f"+{g}" * num_parts or "(empty)"}</memory>' in last
    assert '<plan>' not in last and 'One word.' in last


def test_a_round_asks_only_those_who_are_not_done():
  model = Model()
  for _ in rounds.read(AGENT, QUERIES, model, readers(*ALL)):
    pass
  assert [[(p.query, p.sample) for p in asked] for asked in model.asked] == [
      [(0, 0), (0, 1), (1, 0), (2, 0)], [(0, 0), (0, 1), (1, 0)],
      [(0, 0), (0, 1)], [(0, 0), (0, 1)]]


def test_turns_hold_the_very_ids_that_were_asked_and_written():
  written = {}

  def model(prompts):
    made = Model()(prompts)
    for prompt, response in zip(prompts, made, strict=True):
      written[prompt] = response
    return made

  turns = [turn for made in rounds.read(
      AGENT, QUERIES, model, readers(*ALL)) for turn in made]
  assert len(turns) == len(written) == 4 + 4 + 2 + 1
  for turn in turns:
    assert written[turn.prompt] is turn.response


def test_a_reading_goes_on_where_it_was_left():
  whole = [turn for made in rounds.read(
      AGENT, QUERIES, Model(), readers(*ALL)) for turn in made]
  state, begun = readers(*ALL), []
  for made in rounds.read(AGENT, QUERIES, Model(), state):
    begun += made
    if len(begun) == 7:  # After two rounds.
      break
  again = [
      rounds.Reader(query=r.query, sample=r.sample, turn=r.turn, notes=r.notes)
      for r in state]
  rest = [turn for made in rounds.read(
      AGENT, QUERIES, Model(), again) for turn in made]
  assert [t.prompt for t in begun + rest] == [t.prompt for t in whole]


def test_no_part_is_made_before_it_is_read():
  made = []

  def stream():
    for number in range(3):
      made.append(number)
      yield tuple(TOKENIZER.encode(f'part {number}'))

  lazy = rounds.Query(
      question='?', instruction='', num_parts=3, parts=stream())
  for number, _ in enumerate(rounds.read(
      AGENT, [lazy], Model(), readers((0, 0)))):
    assert made == list(range(min(number + 1, 3)))


@pytest.mark.parametrize('turn', [0, 2])
def test_questions_about_one_document_read_it_together(turn):
  made = []

  class Once:
    def __iter__(self):
      for number in range(3):
        made.append(number)
        yield tuple(TOKENIZER.encode(f'part {number}'))

  once = Once()
  several = [
      rounds.Query(question=name, instruction='', num_parts=3, parts=once)
      for name in ('Who?', 'Where?')]
  model = Model()
  turns = [turn for taken in rounds.read(AGENT, several, model, [
      rounds.Reader(query=q, turn=turn) for q in range(2)])
           for turn in taken]
  assert made == [0, 1, 2]
  assert [t.prompt.turn for t in turns] == [
      t for t in range(turn, 4) for _ in range(2)]
  for asked in model.asked[:-1]:
    texts = [TOKENIZER.decode(prompt.tokens) for prompt in asked]
    assert all(f'part {asked[0].turn}' in text for text in texts)


@pytest.mark.parametrize('said, match', [(2, 'more'), (4, 'fewer')])
def test_a_wrong_number_of_parts_is_found_out(said, match):
  parts = query('Ada', 3).parts
  wrong = rounds.Query(
      question='?', instruction='', num_parts=said, parts=parts)
  with pytest.raises(ValueError, match=match):
    for _ in rounds.read(AGENT, [wrong], Model(), readers((0, 0))):
      pass

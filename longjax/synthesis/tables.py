"""Numeric aggregation: numbers on several pages, one SQL query.

The facts of the pages form one table; a template pairs an English question
with an SQL query, and sqlite executes it for the gold answer (the
CorpusQA-like pipeline of QwenLong-L1.5, arXiv:2512.12967, Sec. 3). Ties and
empty results are redrawn.
"""

import contextlib
import sqlite3
from collections.abc import Sequence

from longjax import types
from longjax.synthesis import distractors, knowledge_graph
from longjax.synthesis import world as world_lib

OPERATIONS = ('total', 'difference', 'count', 'most')


def execute(facts: Sequence[world_lib.Fact], sql: str) -> int | None:
  """Runs a query over a table `facts(subject, relation, value)`."""
  rows = [
      (fact.subject, fact.relation,
       int(fact.value) if fact.relation in world_lib.ITEMS else fact.value)
      for fact in facts]
  with contextlib.closing(sqlite3.connect(':memory:')) as connection:
    connection.execute(
        'CREATE TABLE facts (subject TEXT, relation TEXT, value)')
    connection.executemany('INSERT INTO facts VALUES (?, ?, ?)', rows)
    return connection.execute(sql).fetchone()[0]


def _listed(names: Sequence[str]) -> str:
  return ', '.join(names[:-1]) + f' and {names[-1]}'


def query(
    operation: str, names: Sequence[str], relation: str, value: str
) -> tuple[str, str]:
  """The English question and the SQL query; names are plain letters."""
  quoted = ', '.join(f"'{name}'" for name in names)
  where = f"FROM facts WHERE relation = '{relation}' AND subject IN ({quoted})"
  listed = _listed(names)
  match operation:
    case 'total':
      return (f'How many {relation} do {listed} hold in total?',
              f'SELECT SUM(value) {where}')
    case 'difference':
      # Non-negative by the order in which the names are given.
      return (f'How many more {relation} does {names[0]} hold '
              f'than {names[1]}?',
              f'SELECT MAX(value) - MIN(value) {where}')
    case 'count':
      return (f'How many of {listed} have a {value} {relation}?',
              f"SELECT COUNT(*) {where} AND value = '{value}'")
    case 'most':
      return (f'What is the most {relation} held by one of {listed}?',
              f'SELECT MAX(value) {where}')
  raise ValueError(f'No operation {operation!r}.')


def derivation(
    operation: str, facts: Sequence[world_lib.Fact], quotes: Sequence[str],
    value: str, answer: int,
) -> str:
  """Quotes and arithmetic; the last number written is the answer."""
  said = ' '.join(quotes)
  numbers = [fact.value for fact in facts]
  if operation == 'total':
    return f'{said} {" + ".join(numbers)} = {answer}.'
  if operation == 'difference':
    return f'{said} {" - ".join(numbers)} = {answer}.'
  if operation == 'most':
    return f'{said} The most is {answer}.'
  steps, so_far = [], 0
  for fact, quote in zip(facts, quotes, strict=True):
    so_far += fact.value == value
    steps.append(f'{quote} So far {so_far}.')
  return ' '.join(steps)


def _draw_facts(
    world: world_lib.World, operation: str, num_entities: int
) -> tuple[list[world_lib.Fact], str]:
  """Facts to aggregate, no tie for the most, and the value counted, if any."""
  names = [world.name() for _ in range(num_entities)]
  if operation == 'count':
    value = world.rng.choice(world_lib.COLORS)
    num_matching = world.rng.randint(1, num_entities)
    others = [color for color in world_lib.COLORS if color != value]
    values = [value] * num_matching + [
        world.rng.choice(others) for _ in range(num_entities - num_matching)]
    world.rng.shuffle(values)
    relation = 'badge'
  else:
    value, relation = '', world.rng.choice(world_lib.ITEMS)
    values = [world.number() for _ in names]
    while operation != 'total' and values.count(max(values, key=int)) > 1:
      values = [world.number() for _ in names]
    if operation == 'difference':
      values.sort(key=int, reverse=True)
  return [world_lib.Fact(subject=name, relation=relation, value=drawn)
          for name, drawn in zip(names, values, strict=True)], value


def generate(
    world: world_lib.World,
    *,
    example_id: str,
    operations: Sequence[str] = OPERATIONS[:3],
    entities_max: int = 3,
) -> distractors.Draft:
  """A question over the numbers, or badges, of two or more people.

  Args:
    world: where entities and sentences come from.
    example_id: id of the example.
    operations: drawn from, see `OPERATIONS`. 'difference' is of two people.
    entities_max: most people asked about.
  """
  operation = world.rng.choice(operations)
  num_entities = (2 if operation == 'difference'
                  else world.rng.randint(2, entities_max))
  facts, value = _draw_facts(world, operation, num_entities)
  relation = facts[0].relation
  pages = [world.page('person', subject=fact.subject, facts=[fact])
           for fact in facts]
  question, sql = query(
      operation, [fact.subject for fact in facts], relation, value)
  answer = execute([fact for page in pages for fact in page.facts], sql)
  if answer is None or answer <= 0:
    raise ValueError(f'{example_id}: {sql} gave {answer}.')
  documents = tuple(page.document() for page in pages)
  quotes = knowledge_graph.stated(pages, facts)
  example = types.TaskExample(
      id=example_id,
      task='numeric',
      kind='count' if operation == 'count' else 'numeric',
      documents=documents,
      question=question,
      instruction='Answer with the number only.',
      answers=(str(answer),),
      evidence=world_lib.locate(documents, quotes),
      reasoning=derivation(operation, facts, quotes, value, answer),
      hops=num_entities,
      meta={
          'operation': operation,
          'sql': sql,
          distractors.PROTECTED: '\n'.join(fact.subject for fact in facts),
      },
  )
  return distractors.Draft(
      example=example,
      distractors=(
          p.document() for p in world.pages(['person'], focus=[relation])))

"""Multi-hop questions over a knowledge graph spread over documents.

  Who is the mentor of the captain of Tornis?

QwenLong-L1.5 (arXiv:2512.12967, Sec. 3) extracts triples from documents and
walks the cross-document graph; here the graph is known. Each hop's fact
stands on its own page.
"""

from collections.abc import Iterable, Sequence

from longjax import types
from longjax.synthesis import distractors
from longjax.synthesis import world as world_lib


class Graph:
  """Facts by (subject, relation); several values are kept, not overwritten."""

  def __init__(self, facts: Iterable[world_lib.Fact] = ()):
    self._values: dict[tuple[str, str], set[str]] = {}
    for fact in facts:
      self.add(fact)

  def add(self, fact: world_lib.Fact) -> None:
    """Adds one value of (subject, relation)."""
    key = (fact.subject, fact.relation)
    self._values.setdefault(key, set()).add(fact.value)

  def execute(self, start: str, relations: Sequence[str]) -> set[str]:
    """All answers of following `relations` from `start`, nearest first."""
    reached = {start}
    for relation in relations:
      reached = {
          value for entity in reached
          for value in self._values.get((entity, relation), ())}
    return reached


def schema_walk(
    world: world_lib.World, hops: int
) -> tuple[world_lib.Relation, ...]:
  """Relations such that each is possible for the value of the one before."""
  kind = world.rng.choice(world_lib.KINDS)
  walk: list[world_lib.Relation] = []
  for _ in range(hops):
    options = [r for r in world_lib.NAMED[kind] if r not in walk]
    walk.append(world.rng.choice(options))
    kind = walk[-1].value
  return tuple(walk)


def question_text(
    start: str, relations: Sequence[world_lib.Relation]
) -> str:
  """Asks for the end of the walk, innermost relation last."""
  path = ' of '.join(f'the {relation.name}' for relation in relations[::-1])
  return f'{relations[-1].question_word} is {path} of {start}?'


def walk_pages(
    world: world_lib.World, relations: Sequence[world_lib.Relation]
) -> tuple[list[world_lib.Page], list[world_lib.Fact]]:
  """One page and one fact per hop, starting at a fresh entity."""
  pages, facts = [], []
  subject = world.name()
  for relation in relations:
    fact = world_lib.Fact(
        subject=subject, relation=relation.name, value=world.name())
    pages.append(world.page(
        relation.subject, subject=subject, facts=[fact],
        focus=[r.name for r in relations]))
    facts.append(fact)
    subject = fact.value
  return pages, facts


def stated(
    pages: Sequence[world_lib.Page], facts: Sequence[world_lib.Fact]
) -> list[str]:
  """The sentence that states each fact."""
  sentences = {
      fact: sentence for page in pages
      for fact, sentence in zip(page.facts, page.sentences, strict=True)}
  return [sentences[fact] for fact in facts]


def generate(
    world: world_lib.World, *, example_id: str, hops: int = 2
) -> distractors.Draft:
  """A question whose facts stand on `hops` different pages.

  Args:
    world: where entities and sentences come from.
    example_id: id of the example.
    hops: facts to combine; with 1 it is a plain lookup.

  Raises:
    ValueError: the query has not exactly one answer, which would be a bug,
      because facts are functional.
  """
  relations = schema_walk(world, hops)
  pages, facts = walk_pages(world, relations)
  graph = Graph(fact for page in pages for fact in page.facts)
  names = [relation.name for relation in relations]
  answers = graph.execute(facts[0].subject, names)
  if answers != {facts[-1].value}:
    raise ValueError(f'{example_id}: query answers {sorted(answers)}.')
  documents = tuple(page.document() for page in pages)
  quotes = stated(pages, facts)
  example = types.TaskExample(
      id=example_id,
      task='multihop',
      kind='qa',
      documents=documents,
      question=question_text(facts[0].subject, relations),
      instruction='Answer with the name only.',
      answers=(facts[-1].value,),
      evidence=world_lib.locate(documents, quotes),
      reasoning=' '.join(quotes),
      hops=hops,
      meta={distractors.PROTECTED: '\n'.join(f.subject for f in facts)},
  )
  kinds = [relation.subject for relation in relations]
  return distractors.Draft(
      example=example,
      distractors=(p.document() for p in world.pages(kinds, focus=names)))

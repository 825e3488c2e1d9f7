"""Reading: look one thing up, or use a table given only in the context.

Three forms: a plain fact; a code word from a code book; and the code word for
somebody's badge, which needs the person's page and then the code book (a
label mapping that exists nowhere but in the context).
"""

from collections.abc import Iterator

from longjax import types
from longjax.synthesis import distractors, knowledge_graph
from longjax.synthesis import world as world_lib

_NUM_CODES = 4


def _code_book(
    world: world_lib.World, guild: str
) -> tuple[world_lib.Page, dict[str, str]]:
  """A guild's code words: the page, and its sentence for each color."""
  colors = world.rng.sample(world_lib.COLORS, _NUM_CODES)
  codes = {color: world.name() for color in colors}
  sentences = {
      color: f'The code of {guild} for {color} is {codes[color]}.'
      for color in colors}
  page = world_lib.Page(
      title=f'Codes of {guild}', sentences=tuple(sentences.values()),
      facts=tuple(
          world_lib.Fact(subject=guild, relation=color, value=codes[color])
          for color in colors))
  return page, sentences


def _code_distractors(world: world_lib.World) -> Iterator[types.Document]:
  """Other guilds' code books and other people with badges."""
  people = world.pages(['person'], focus=['badge'])
  while True:
    if world.rng.random() < 0.5:
      yield _code_book(world, world.name())[0].document()
    else:
      yield next(people).document()


def _generate_code(
    world: world_lib.World, *, example_id: str, is_mapped: bool
) -> distractors.Draft:
  """Asks for a code word, of a color or of the color of a badge."""
  guild = world.name()
  book, sentences = _code_book(world, guild)
  fact = world.rng.choice(book.facts)
  pages, quotes, protected = [book], [sentences[fact.relation]], [guild]
  asked = fact.relation
  if is_mapped:
    person = world.name()
    badge = world_lib.Fact(
        subject=person, relation='badge', value=fact.relation)
    page = world.page('person', subject=person, facts=[badge])
    pages.append(page)
    quotes.insert(0, knowledge_graph.stated([page], [badge])[0])
    protected.append(person)
    asked = f'the badge of {person}'
  documents = tuple(page.document() for page in pages)
  example = types.TaskExample(
      id=example_id,
      task='reading',
      kind='qa',
      documents=documents,
      question=f'What is the code of {guild} for {asked}?',
      instruction='Answer with the name only.',
      answers=(fact.value,),
      evidence=world_lib.locate(documents, quotes),
      reasoning=' '.join(quotes),
      hops=len(quotes),
      meta={distractors.PROTECTED: '\n'.join(protected)},
  )
  return distractors.Draft(
      example=example, distractors=_code_distractors(world))


def _generate_fact(
    world: world_lib.World, *, example_id: str
) -> distractors.Draft:
  """Asks for one fact of one page."""
  kind = world.rng.choice(world_lib.KINDS)
  relation = world.rng.choice(world_lib.NAMED[kind])
  pages, facts = knowledge_graph.walk_pages(world, [relation])
  documents = tuple(page.document() for page in pages)
  quotes = knowledge_graph.stated(pages, facts)
  example = types.TaskExample(
      id=example_id,
      task='reading',
      kind='qa',
      documents=documents,
      question=knowledge_graph.question_text(facts[0].subject, [relation]),
      instruction='Answer with the name only.',
      answers=(facts[0].value,),
      evidence=world_lib.locate(documents, quotes),
      reasoning=quotes[0],
      meta={distractors.PROTECTED: facts[0].subject},
  )
  return distractors.Draft(
      example=example,
      distractors=(
          p.document() for p in world.pages([kind], focus=[relation.name])))


def generate(
    world: world_lib.World, *, example_id: str, code_share: float = 0.5
) -> distractors.Draft:
  """A lookup; `code_share` of them are about code books."""
  if world.rng.random() >= code_share:
    return _generate_fact(world, example_id=example_id)
  return _generate_code(
      world, example_id=example_id, is_mapped=world.rng.random() < 0.5)

"""Seeded synthetic worlds: invented names, typed relations, short pages.

A world is a pool of people, towns, ships and guilds. Each has one page of a
few short sentences, one fact each:

  [Dorvan]
  The mentor of Dorvan is Kelmis. Dorvan holds 3 crates. ...

Facts are functional: one entity has one value of one relation. This is the
programmatic default of the document-to-question pipeline of QwenLong-L1.5
(arXiv:2512.12967), which reads real documents instead.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence

from longjax import types
from longjax.synthesis import names

COLORS = ('red', 'blue', 'green', 'black', 'white', 'gold')
TRADES = ('smith', 'miller', 'weaver', 'hunter', 'tailor', 'potter')
PETS = ('cat', 'dog', 'goat', 'hen', 'owl', 'pony')
ITEMS = ('crates', 'coins', 'lamps', 'books', 'ropes', 'bells')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relation:
  """What one kind of entity may have.

  Attributes:
    name: as written in sentences and questions.
    subject: kind of entity that has it.
    value: kind of entity it points to; 'word' if a value of `words`.
    words: the values of a categorical attribute.
  """

  name: str
  subject: str
  value: str
  words: tuple[str, ...] = ()

  @property
  def question_word(self) -> str:
    """What a question about the value begins with."""
    return 'Who' if self.value == 'person' else 'What'


def _relations() -> tuple[Relation, ...]:
  table = {
      'person': 'mentor:person partner:person rival:person cousin:person '
                'doctor:person home:town birthplace:town employer:guild',
      'town': 'mayor:person founder:person baker:person twin:town',
      'ship': 'captain:person cook:person builder:person port:town '
              'owner:guild',
      'guild': 'leader:person patron:person clerk:person seat:town',
  }
  entities = tuple(
      Relation(name=entry.split(':')[0], subject=subject,
               value=entry.split(':')[1])
      for subject, row in table.items() for entry in row.split())
  words = (('badge', COLORS), ('trade', TRADES), ('pet', PETS))
  return entities + tuple(
      Relation(name=name, subject='person', value='word', words=values)
      for name, values in words)


RELATIONS = {relation.name: relation for relation in _relations()}
KINDS = ('person', 'town', 'ship', 'guild')
BY_SUBJECT = {
    kind: tuple(r for r in RELATIONS.values() if r.subject == kind)
    for kind in KINDS
}
# Relations whose value is an invented name: what questions may ask for.
NAMED = {
    kind: tuple(r for r in BY_SUBJECT[kind] if not r.words) for kind in KINDS
}

_SENTENCES = (
    'The {relation} of {subject} is {value}.',
    '{value} is the {relation} of {subject}.',
    '{subject} has {value} as {relation}.',
    'As {relation}, {subject} has {value}.',
)
_NUMBER_SENTENCES = (
    '{subject} holds {value} {relation}.',
    '{value} {relation} are held by {subject}.',
    'In the house of {subject} are {value} {relation}.',
    'There are {value} {relation} with {subject}.',
)
MAX_VARIETY = len(_SENTENCES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
  """`relation` of `subject` is `value`; relation is an item for a number."""

  subject: str
  relation: str
  value: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
  """One document before it is joined into text."""

  title: str
  sentences: tuple[str, ...]
  facts: tuple[Fact, ...] = ()

  def document(self) -> types.Document:
    """The page as a model reads it."""
    return types.Document(title=self.title, text=' '.join(self.sentences))


class World:
  """Draws entities and pages of one example; deterministic given `rng`."""

  def __init__(
      self,
      split: str,
      rng: random.Random,
      *,
      variety: int = 1,
      facts_min: int = 3,
      facts_max: int = 5,
      number_max: int = 9,
  ):
    """Starts an empty world.

    Args:
      split: name space, one of `names.SPLITS`.
      rng: the only source of randomness.
      variety: sentence templates per relation, 1 to `MAX_VARIETY`.
      facts_min: fewest sentences of a page.
      facts_max: most sentences of a page.
      number_max: numbers are drawn from 2 to this.
    """
    self.rng = rng
    self._source = names.NameSource(split, rng)
    self._variety = variety
    self._facts = (facts_min, facts_max)
    self._number_max = number_max

  def name(self) -> str:
    """A name not used before in this world."""
    return self._source.name()

  def code(self, length: int) -> str:
    """A code not used before in this world."""
    return self._source.code(length)

  def number(self) -> str:
    """A number such as pages state; at least 2, for the plural."""
    return str(self.rng.randint(2, self._number_max))

  def value(self, relation: Relation) -> str:
    """A fresh value: a word of the attribute, or a new entity."""
    return self.rng.choice(relation.words) if relation.words else self.name()

  def sentence(self, fact: Fact) -> str:
    """Writes one fact in one of the `variety` templates."""
    template = self.rng.randrange(self._variety) if self._variety > 1 else 0
    forms = _NUMBER_SENTENCES if fact.relation in ITEMS else _SENTENCES
    return forms[template].format(
        subject=fact.subject, relation=fact.relation, value=fact.value)

  def page(
      self,
      kind: str,
      *,
      subject: str | None = None,
      facts: Sequence[Fact] = (),
      focus: Sequence[str] = (),
  ) -> Page:
    """The page of one entity: the given facts among random others.

    Args:
      kind: kind of the entity.
      subject: its name; None draws a fresh one.
      facts: facts the page must state, all about `subject`.
      focus: relations or items that the page also states if its kind can.
    """
    subject = subject or self.name()
    facts = list(facts)
    stated = {fact.relation for fact in facts}
    options = [relation.name for relation in BY_SUBJECT[kind]]
    if kind == 'person':
      options.append(next((f for f in focus if f in ITEMS), None)
                     or self.rng.choice(ITEMS))
    options = [name for name in options if name not in stated]
    self.rng.shuffle(options)
    options.sort(key=lambda name: name not in focus)  # Stable: focus first.
    num_facts = max(len(facts), self.rng.randint(*self._facts))
    for name in options[:num_facts - len(facts)]:
      value = (self.number() if name in ITEMS else self.value(RELATIONS[name]))
      facts.append(Fact(subject=subject, relation=name, value=value))
    self.rng.shuffle(facts)
    return Page(title=subject, sentences=tuple(map(self.sentence, facts)),
                facts=tuple(facts))

  def pages(
      self, kinds: Sequence[str], *, focus: Sequence[str] = ()
  ) -> Iterator[Page]:
    """Endless pages of other entities; half continue a fact just stated.

    Links between them keep "has a page and is mentioned elsewhere" from
    giving away the entities a question is about.
    """
    linked: tuple[str, str] | None = None
    while True:
      if linked and self.rng.random() < 0.5:
        page = self.page(linked[0], subject=linked[1], focus=focus)
      else:
        page = self.page(self.rng.choice(kinds), focus=focus)
      links = [(RELATIONS[fact.relation].value, fact.value)
               for fact in page.facts
               if fact.relation in RELATIONS
               and RELATIONS[fact.relation].value in kinds]
      linked = self.rng.choice(links) if links else None
      yield page


def locate(
    documents: Sequence[types.Document], sentences: Sequence[str]
) -> tuple[types.Span, ...]:
  """The span of each sentence: its first occurrence in the documents.

  Raises:
    ValueError: a sentence is in no document.
  """
  spans = []
  for sentence in sentences:
    for index, document in enumerate(documents):
      start = document.text.find(sentence)
      if start >= 0:
        spans.append(types.Span(
            document=index, start=start, end=start + len(sentence)))
        break
    else:
      raise ValueError(f'No document says {sentence!r}.')
  return tuple(spans)

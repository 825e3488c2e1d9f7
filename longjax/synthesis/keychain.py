"""KeyChain: the question itself is hidden behind a chain of keys.

LoongRL (arXiv:2510.19363): "Key a3f lands on key 9c1." and so on; one chain
ends in the true question, the others in distractor questions. The links are
scattered over the documents, at sentence ends. The prompt names only the
first key, so the model must trace, find out what is asked, then answer it.
"""

import itertools
import random
from collections.abc import Iterator, Sequence

from longjax import types
from longjax.synthesis import distractors, knowledge_graph
from longjax.synthesis import world as world_lib


def _chain(
    world: world_lib.World, question: str, *, key_hops: int, key_len: int
) -> list[str]:
  """Sentences from a first key to a question: `key_hops` links."""
  keys = [world.code(key_len) for _ in range(key_hops)]
  links = [f'Key {key} lands on key {after}.'
           for key, after in itertools.pairwise(keys)]
  return links + [f'Key {keys[-1]} asks: {question}']


def _scatter(
    rng: random.Random, pages: Sequence[world_lib.Page],
    sentences: Sequence[str],
) -> list[world_lib.Page]:
  """Inserts each sentence after a random sentence of a random page."""
  grown = [list(page.sentences) for page in pages]
  for sentence in rng.sample(sentences, len(sentences)):
    page = rng.choice(grown)
    page.insert(rng.randint(1, len(page)), sentence)
  return [world_lib.Page(title=page.title, sentences=tuple(lines))
          for page, lines in zip(pages, grown, strict=True)]


def _other_pages(
    world: world_lib.World, *, kinds: Sequence[str], focus: Sequence[str],
    key_hops: int, key_len: int,
) -> Iterator[types.Document]:
  """Pages in batches, each batch carrying a chain to one of its facts."""
  pages = world.pages(kinds, focus=focus)
  while True:
    batch = [next(pages) for _ in range(4)]
    asked = [fact for page in batch for fact in page.facts
             if fact.relation in focus]
    if asked:
      fact = world.rng.choice(asked)
      question = knowledge_graph.question_text(
          fact.subject, [world_lib.RELATIONS[fact.relation]])
      batch = _scatter(world.rng, batch, _chain(
          world, question, key_hops=key_hops, key_len=key_len))
    yield from (page.document() for page in batch)


def generate(
    world: world_lib.World,
    *,
    example_id: str,
    key_hops: int = 2,
    fact_hops: int = 1,
    num_chains: int = 3,
    key_len: int = 3,
) -> distractors.Draft:
  """A question behind a chain of keys, among chains to other questions.

  Args:
    world: where entities, keys and sentences come from.
    example_id: id of the example.
    key_hops: links of a chain, the last one naming the question.
    fact_hops: facts the questions combine.
    num_chains: chains before extension, the true one included; extension
      brings about one more with every four pages.
    key_len: characters of a key (LoongRL uses 8).
  """
  relations = knowledge_graph.schema_walk(world, fact_hops)
  pages: list[world_lib.Page] = []
  facts: list[list[world_lib.Fact]] = []
  chains: list[list[str]] = []
  for _ in range(num_chains):
    own_pages, own_facts = knowledge_graph.walk_pages(world, relations)
    question = knowledge_graph.question_text(own_facts[0].subject, relations)
    pages += own_pages
    facts.append(own_facts)
    chains.append(
        _chain(world, question, key_hops=key_hops, key_len=key_len))
  quotes = chains[0] + knowledge_graph.stated(pages, facts[0])
  pages = _scatter(world.rng, pages, list(itertools.chain(*chains)))
  documents = tuple(page.document() for page in pages)
  keys = [link.split()[1] for link in chains[0]]
  protected = keys + [fact.subject for fact in facts[0]]
  example = types.TaskExample(
      id=example_id,
      task='keychain',
      kind='qa',
      documents=documents,
      question=f'Follow key {keys[0]}. What is the answer to its question?',
      instruction='Answer with the name only.',
      answers=(facts[0][-1].value,),
      evidence=world_lib.locate(documents, quotes),
      reasoning=' '.join(quotes),
      hops=key_hops + fact_hops,
      meta={distractors.PROTECTED: '\n'.join(protected)},
  )
  return distractors.Draft(
      example=example,
      distractors=_other_pages(
          world, kinds=[relation.subject for relation in relations],
          focus=[relation.name for relation in relations],
          key_hops=key_hops, key_len=key_len))

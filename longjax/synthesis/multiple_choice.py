"""Multiple choice: one fact, four options that are all true of something.

Wrong options are other entities' values of the same relation, stated in the
same context, so an option cannot be ruled out by how it looks or by its being
absent (QwenLong-L1, DocQA multiple choice).
"""

from longjax import types
from longjax.synthesis import distractors, knowledge_graph
from longjax.synthesis import world as world_lib

LETTERS = 'ABCD'


def generate(
    world: world_lib.World, *, example_id: str
) -> distractors.Draft:
  """Four pages stating one relation each; the question is about one."""
  kind = world.rng.choice(world_lib.KINDS)
  relation = world.rng.choice(world_lib.NAMED[kind])
  pages, facts = [], []
  for _ in LETTERS:
    subject = world.name()
    fact = world_lib.Fact(
        subject=subject, relation=relation.name, value=world.name())
    pages.append(world.page(kind, subject=subject, facts=[fact]))
    facts.append(fact)
  gold = facts[0]
  options = [fact.value for fact in facts]
  world.rng.shuffle(options)
  letter = LETTERS[options.index(gold.value)]
  listed = ', '.join(
      f'({mark}) {option}'
      for mark, option in zip(LETTERS, options, strict=True))
  asked = knowledge_graph.question_text(gold.subject, [relation])
  documents = tuple(page.document() for page in pages)
  quote, = knowledge_graph.stated(pages, [gold])
  example = types.TaskExample(
      id=example_id,
      task='mc',
      kind='mc',
      documents=documents,
      question=f'{asked} {listed}.',
      instruction='Answer with the letter only.',
      answers=(letter, gold.value),
      evidence=world_lib.locate(documents, [quote]),
      reasoning=f'{quote} {gold.value} is ({letter}).',
      meta={distractors.PROTECTED: gold.subject},
  )
  return distractors.Draft(
      example=example,
      distractors=(
          p.document() for p in world.pages([kind], focus=[relation.name])))

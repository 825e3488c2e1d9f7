"""Context extension: one question, any context length.

A draft holds an example with only the pages it needs, and a stream of
documents about other entities. `extend` inserts those until the context has
the wanted number of tokens, so one question can be rendered again at every
stage length (QwenLong-L1.5, arXiv:2512.12967, robustness to added documents).
"""

import dataclasses
import random
import re
from collections.abc import Callable, Iterable, Sequence

from longjax import types

# meta key: phrases, one a line, that no inserted document may contain.
PROTECTED = 'protected'
# Documents too long for what is left of the budget, until filling stops.
_MAX_MISFITS = 8
# Unusable documents in a row after which the stream counts as exhausted.
_MAX_REJECTED = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
  """An example before extension.

  Attributes:
    example: with the fewest documents that make sense.
    distractors: documents that may surround them, usually endless.
  """

  example: types.TaskExample
  distractors: Iterable[types.Document]


def render_document(document: types.Document) -> str:
  """The block a document occupies in a prompt (as in `data.chat`)."""
  title = f'[{document.title}]\n' if document.title else ''
  return f'{title}{document.text}\n'


def render_question(example: types.TaskExample) -> str:
  """What follows the documents in a prompt."""
  return f'\n{example.question} {example.instruction}'.rstrip(' ')


def context_tokens(
    example: types.TaskExample, count_tokens: Callable[[str], int]
) -> int:
  """Tokens of documents, question and instruction, each encoded alone."""
  return count_tokens(render_question(example)) + sum(
      count_tokens(render_document(document))
      for document in example.documents)


def _forbidden(example: types.TaskExample) -> re.Pattern[str] | None:
  """Matches gold aliases and the entities the question depends on."""
  phrases = set(example.meta.get(PROTECTED, '').split('\n'))
  answers = example.answers[1:] if example.kind == 'mc' else example.answers
  # A number as such gives nothing away, and no page would be free of it.
  phrases.update(a for a in answers if not a.replace('.', '').isdigit())
  phrases.discard('')
  if not phrases:
    return None
  either = '|'.join(map(re.escape, sorted(phrases)))
  return re.compile(rf'(?<!\w)(?:{either})(?!\w)')


def _choose(
    example: types.TaskExample,
    distractors: Iterable[types.Document],
    budget: int,
    count_tokens: Callable[[str], int],
) -> list[types.Document]:
  """Takes usable distractors from the stream until `budget` is spent."""
  forbidden = _forbidden(example)
  titles = {document.title for document in example.documents}
  # Chats share one title; entity pages are told apart by theirs.
  is_titled = len(titles) == len(example.documents)
  chosen: list[types.Document] = []
  num_misfits = num_rejected = 0
  if budget <= 0:
    return chosen
  for document in distractors:
    block = render_document(document)
    if ((is_titled and document.title in titles)
        or (forbidden and forbidden.search(block))):
      num_rejected += 1
    elif (cost := count_tokens(block)) > budget:
      num_misfits += 1
    else:
      num_rejected = 0
      titles.add(document.title)
      chosen.append(document)
      budget -= cost
    if num_misfits >= _MAX_MISFITS or num_rejected >= _MAX_REJECTED:
      break
  return chosen


def extend(
    example: types.TaskExample,
    distractors: Iterable[types.Document],
    *,
    target_tokens: int,
    count_tokens: Callable[[str], int],
    rng: random.Random,
) -> types.TaskExample:
  """Surrounds an example's documents until the context is long enough.

  Documents that contain a gold alias, a phrase of `meta['protected']` or a
  known title are passed over. The result is shuffled, so evidence depth is
  uniform; conversations (kind 'mrcr') keep the order of their own documents.
  Time is linear in the target.

  Args:
    example: with the documents it needs; returned as it is, but shuffled, if
      these already exceed the target.
    distractors: documents to choose from, in order; read lazily.
    target_tokens: cap on `context_tokens`; never exceeded by adding, missed
      by less than a document.
    count_tokens: number of tokens of a text; called on each document and the
      question alone, as `data.chat` encodes them.
    rng: decides the order.

  Returns:
    The example with more documents, evidence indices adjusted and in `meta`
    'depth' (of the evidence's middle), 'scope' (evidence characters) and
    'diffusion' (from first to last), each a fraction of the context.
  """
  own = list(example.documents)
  used = context_tokens(example, count_tokens)
  added = _choose(example, distractors, target_tokens - used, count_tokens)
  slots = list(range(len(own) + len(added)))
  rng.shuffle(slots)
  own_slots = slots[:len(own)]
  if example.kind == 'mrcr':
    own_slots.sort()
  by_slot = dict(zip(
      own_slots + slots[len(own):], own + added, strict=True))
  documents = [by_slot[slot] for slot in range(len(slots))]
  evidence = tuple(
      dataclasses.replace(span, document=own_slots[span.document])
      for span in example.evidence)
  return dataclasses.replace(
      example, documents=tuple(documents), evidence=evidence,
      meta={**example.meta, **_geometry(documents, evidence)})


def _geometry(
    documents: Sequence[types.Document], evidence: Sequence[types.Span]
) -> dict[str, str]:
  """Where the evidence lies, as fractions of the context's characters."""
  if not evidence:
    return {}
  offsets, total = [], 0
  for document in documents:
    total += len(render_document(document))
    offsets.append(total - len(document.text) - 1)
  first = min(offsets[s.document] + s.start for s in evidence)
  last = max(offsets[s.document] + s.end for s in evidence)
  chars = sum(s.end - s.start for s in evidence)
  return {
      'depth': f'{(first + last) / 2 / total:.3f}',
      'scope': f'{chars / total:.3f}',
      'diffusion': f'{(last - first) / total:.3f}',
  }

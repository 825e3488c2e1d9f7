"""Documents read in rounds: in each, every reader takes one turn.

What writes is a function from prompts to responses, both token ids: the
sampler, another process, a test. Turns are handed out as they are made and
forgotten here, so that a document of any length takes no more memory than its
longest part.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from longjax import types
from longjax.agents import memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
  """A question about a document.

  Attributes:
    question: what is asked.
    instruction: how to answer.
    num_parts: K, parts of the document.
    parts: the K parts in order; read once by all who read them. Queries about
      one document may have the same object here: their readers go together.
  """

  question: str
  instruction: str
  num_parts: int
  parts: Iterable[tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """What a reader asks the model.

  Attributes:
    query: index of the query.
    sample: number of the reader among those of the query.
    turn: 0..K; the last gives the answer.
    tokens: ids.
  """

  query: int
  sample: int
  turn: int
  tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
  """What the model wrote.

  Attributes:
    tokens: ids, stop token included.
    is_finished: it ended with a stop token.
    logprobs: f32[.] see `types.Rollouts`; None if not known.
    entropy: f32[.] likewise.
    entropy_t1: f32[.] likewise.
  """

  tokens: Sequence[int]
  is_finished: bool
  logprobs: np.ndarray | None = None
  entropy: np.ndarray | None = None
  entropy_t1: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
  """A prompt, the response to it, and what is carried on.

  Attributes:
    prompt: what was asked.
    response: what was written.
    part: of the document; None if the response is the answer.
    notes: for the next turn; of the last turn those it answered from.
  """

  prompt: Prompt
  response: Response
  part: tuple[int, ...] | None
  notes: memory.Notes

  @property
  def is_last(self) -> bool:
    """Whether the response is the answer."""
    return self.part is None


Generate = Callable[[Sequence[Prompt]], Sequence[Response]]


@dataclasses.dataclass(kw_only=True)
class Reader:
  """Where one reading of a document stands.

  Attributes:
    query: index of the query.
    sample: number among the readers of the query.
    turn: turns taken.
    notes: what the last of them left.
  """

  query: int
  sample: int = 0
  turn: int = 0
  notes: memory.Notes = memory.Notes()


def query(agent: memory.MemoryAgent, example: types.TaskExample) -> Query:
  """What an example asks; all parts of its documents are held."""
  parts = list(agent.parts(example.documents))
  return Query(
      question=example.question, instruction=example.instruction,
      num_parts=len(parts), parts=parts)


def read(
    agent: memory.MemoryAgent,
    queries: Sequence[Query],
    generate: Generate,
    readers: Sequence[Reader],
) -> Iterator[list[Turn]]:
  """Lets readers take turns until all have answered.

  Readers of one query, or of queries with the same parts, go together: they
  have taken as many turns. Those who have answered take no place in later
  rounds.

  Args:
    agent: writes prompts.
    queries: what is read.
    generate: the model; called once a round with the prompts of all readers
      that are not done.
    readers: at the beginning, or where an earlier call left them; changed in
      place.

  Yields:
    The turns of a round, in the order of the readers.
  """
  # By identity: an iterable need not be comparable.
  document_of = [id(query.parts) for query in queries]
  streams = {}
  for reader in readers:
    document = document_of[reader.query]
    if document not in streams:
      stream = iter(queries[reader.query].parts)
      for _ in range(reader.turn):
        next(stream, None)
      streams[document] = stream
  while True:
    active = [r for r in readers if r.turn <= queries[r.query].num_parts]
    if not active:
      return
    of_document = {
        document: next(streams[document], None)
        for document in dict.fromkeys(document_of[r.query] for r in active)}
    parts = {r.query: of_document[document_of[r.query]] for r in active}
    prompts = [
        _prompt(agent, queries[r.query], r, parts[r.query]) for r in active]
    made = []
    for reader, prompt, response in zip(
        active, prompts, generate(prompts), strict=True):
      part = parts[reader.query]
      if part is not None:
        reader.notes = agent.read(response.tokens)
      reader.turn += 1
      made.append(Turn(
          prompt=prompt, response=response, part=part,
          notes=reader.notes))
    yield made


def _prompt(
    agent: memory.MemoryAgent,
    query: Query,
    reader: Reader,
    part: tuple[int, ...] | None,
) -> Prompt:
  if (part is None) != (reader.turn == query.num_parts):
    raise ValueError(
        f'a document said to have {query.num_parts} parts has '
        f'{"fewer" if part is None else "more"}.')
  if part is None:
    tokens = agent.final_prompt(
        query.question, query.instruction, reader.notes)
  else:
    tokens = agent.update_prompt(part, query.question, reader.notes)
  return Prompt(
      query=reader.query, sample=reader.sample, turn=reader.turn,
      tokens=tuple(tokens))

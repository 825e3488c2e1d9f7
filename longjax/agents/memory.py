"""The memory agent: a document of any length is read part by part.

QwenLong-L1.5 (arXiv:2512.12967), eqs. 5 and 6: a query is split into what is
asked, q, and how to answer, f. At turn t the model sees a part x_t of the
document, q, and the memory m and plan p that it wrote at the turn before; it
writes new ones. After the last part it answers from the memory alone:

  (m_t, p_t) ~ pi(. | x_t, q, m_{t-1}, p_{t-1})    t = 1..K
  y          ~ pi(. | m_K, q, f)

Every turn is a conversation of its own. A part stands at its beginning, so that
all who read it (the samples of a question, other questions) share it: the
sampler reads it once, and in an update it is the prefix of a group.

Nothing here knows what writes: turns are token ids, in and out.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from longjax import types
from longjax.data import chat
from longjax.data import tokenizer as tokenizer_lib

# What stands between tags is data. Text that spells a tag gets a backslash that
# makes it none, and one that has some gets one more, so that it can be undone.
_TAG = r'(\\*)(?=/?(?:part|question|memory|plan)\b)'
_PLAIN = re.compile(f'<{_TAG}', re.IGNORECASE)
_ESCAPED = re.compile(rf'<\\{_TAG}', re.IGNORECASE)

# What stands for no memory, and for no plan.
EMPTY = '(empty)'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wording:
  """The prompts' own words.

  Attributes:
    update: after a part, the question, the memory and the plan.
    final: after the memory and the question, before the instruction.
  """

  update: str
  final: str


_WORDINGS = {
    'full': Wording(
        update=(
            'You read a long document one part at a time, in order, and cannot '
            'go back. Above are the part you have just read, the question, '
            'and the memory and the plan you wrote before it. Rewrite the '
            'memory so that someone holding only the memory could answer the '
            'question. Copy names, numbers, dates and quotations exactly, with '
            'where they came from; keep what is still useful, fix what this '
            'part shows to be wrong, drop what only looks related. Do not '
            'answer yet. Then write a short plan: what is still missing and '
            'what to look for next.\n'
            'Reply as <memory>...</memory><plan>...</plan>'),
        final='Answer the question from the memory alone.'),
    # For networks that understand examples rather than words.
    'short': Wording(update='Update the memory.', final='Answer.'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
  """How a document is read.

  Attributes:
    part_len: tokens of a part, at most.
    line_end_share: a part ends at the last line end within this share of its
      end, if there is one.
    memory_len: tokens of memory carried to the next turn, at most.
    plan_len: tokens of the plan, likewise; 0 carries none.
    wording: of the prompts; 'short' is for small models trained on it.
  """

  part_len: int = 32_768
  line_end_share: float = 0.05
  memory_len: int = 7680
  plan_len: int = 512
  wording: Literal['full', 'short'] = 'full'

  def __post_init__(self):
    for name, least in (('part_len', 2), ('memory_len', 1), ('plan_len', 0)):
      if getattr(self, name) < least:
        raise types.UserError(
            f'memory.{name}={getattr(self, name)} must be >= {least}.')
    if not 0.0 <= self.line_end_share < 1.0:
      raise types.UserError(
          f'memory.line_end_share={self.line_end_share} must lie in [0, 1).')

  @property
  def least_part_len(self) -> int:
    """Tokens of a part at least, but for the last."""
    return max(self.part_len - int(self.part_len * self.line_end_share), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notes:
  """What a turn leaves to the next.

  Attributes:
    memory: ids.
    plan: ids.
    is_parsed: False if the response had no memory between tags; all of it is
      then the memory.
  """

  memory: tuple[int, ...] = ()
  plan: tuple[int, ...] = ()
  is_parsed: bool = True


def check_cap(
    config: MemoryConfig | None, max_prompt_len: int, *, name: str
) -> None:
  """Refuses turns that could not hold a part and what was noted before.

  Raises:
    UserError: names `{name}.max_prompt_len`. The question and the words around
      it come on top, and are known when an example is.
  """
  if config is None:
    return
  least = config.part_len + config.memory_len + config.plan_len
  if max_prompt_len <= least:
    raise types.UserError(
        f'{name}.max_prompt_len={max_prompt_len} cannot hold a part of '
        f'part_len={config.part_len} tokens with memory_len='
        f'{config.memory_len} and plan_len={config.plan_len} beside the '
        f'question; use more than {least}, or lower these.')


class MemoryAgent:
  """Writes the prompts of turns and reads the responses to them."""

  def __init__(
      self, tokenizer: tokenizer_lib.Tokenizer, config: MemoryConfig
  ):
    self.config = config
    self._tokenizer = tokenizer
    self._wording = _WORDINGS[config.wording]
    # What stands around the part; the rest depends on the question.
    self._start = [
        *tokenizer.encode_template(tokenizer.turns.user_start),
        *tokenizer.encode('<part>\n')]
    self._end = tokenizer.encode_template(
        tokenizer.turns.user_end + tokenizer.turns.assistant_start
        + tokenizer.turns.think_start)
    self._ends_line: dict[int, bool] = {}

  def parts(
      self, documents: Sequence[types.Document]
  ) -> Iterator[tuple[int, ...]]:
    """The documents as ids, cut into parts; put together they are all of it.

    Encoded line by line, so that no more than a part and a line is held.
    """
    return self.cut(
        self.encode(line) for document in documents
        for line in chat.document_text(document).splitlines(keepends=True))

  def encode(self, line: str) -> list[int]:
    """Ids of a line of a document, or of some of it, tags in it made none."""
    return self._tokenizer.encode(_escaped(line))

  def cut(self, lines: Iterable[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Cuts ids into parts.

    Args:
      lines: what `encode` returned; each is taken when a part needs it.
    """
    waiting: list[int] = []
    for line in lines:
      waiting += line
      while len(waiting) > self.config.part_len:
        end = self._cut(waiting)
        yield tuple(waiting[:end])
        waiting = waiting[end:]
    if waiting:
      yield tuple(waiting)

  def _cut(self, ids: Sequence[int]) -> int:
    """Where the part ends that these ids begin with."""
    longest = self.config.part_len
    for end in range(longest, self.config.least_part_len - 1, -1):
      if self._is_line_end(ids[end - 1]):
        return end
    return longest

  def _is_line_end(self, token: int) -> bool:
    if token not in self._ends_line:
      self._ends_line[token] = self._tokenizer.decode([token]).endswith('\n')
    return self._ends_line[token]

  def update_prompt(
      self, part: Sequence[int], question: str, notes: Notes
  ) -> list[int]:
    """Ids of turn t's prompt, from x_t, q, m_{t-1} and p_{t-1}.

    Args:
      part: of the document.
      question: what is asked, see `query.split`.
      notes: of the turn before.
    """
    encode = self._tokenizer.encode
    plan = []
    if self.config.plan_len:
      plan = [*encode('<plan>'), *self._or_empty(notes.plan),
              *encode('</plan>\n')]
    return [
        *self._start, *part,
        *encode(f'\n</part>\n<question>{_escaped(question)}</question>\n'
                '<memory>'),
        *self._or_empty(notes.memory), *encode('</memory>\n'), *plan,
        *encode(self._wording.update), *self._end]

  def final_prompt(
      self, question: str, instruction: str, notes: Notes
  ) -> list[int]:
    """Ids of the last prompt, from m_K, q and f."""
    template = self._tokenizer.turns
    asked = f'{self._wording.final} {instruction}'.rstrip()
    return [
        *self._tokenizer.encode_template(template.user_start),
        *self._tokenizer.encode('<memory>'), *self._or_empty(notes.memory),
        *self._tokenizer.encode(
            f'</memory>\n<question>{_escaped(question)}</question>\n{asked}'),
        *self._end]

  def _or_empty(self, ids: Sequence[int]) -> Sequence[int]:
    return ids or self._tokenizer.encode(EMPTY)

  def read(self, response: Sequence[int]) -> Notes:
    """The memory and the plan in a response.

    Args:
      response: its ids, stop token included if it has one.
    """
    text = self._tokenizer.decode(response)
    for stop in self._tokenizer.stop_ids:
      text = text.removesuffix(self._tokenizer.decode([stop]))
    answer = chat.split_response(text).answer
    memory, plan = _between('memory', answer), _between('plan', answer)
    if memory:
      return self.notes(memory, plan)
    return dataclasses.replace(
        self.notes((answer or text).strip(), ''), is_parsed=False)

  def notes(self, memory: str, plan: str) -> Notes:
    """Texts as ids, no more than may be carried."""

    def ids(text, longest):
      return tuple(self._tokenizer.encode(_escaped(text))[:longest])

    return Notes(memory=ids(memory, self.config.memory_len),
                 plan=ids(plan, self.config.plan_len))

  def text(self, ids: Sequence[int]) -> str:
    """Of a part, a memory or a plan, tags in it as they were."""
    return _ESCAPED.sub(r'<\1', self._tokenizer.decode(ids))

  def response(self, notes: Notes) -> list[int]:
    """Ids that say these notes without thinking: a demonstration."""
    encode = self._tokenizer.encode
    plan = []
    if self.config.plan_len:
      plan = [*encode('<plan>'), *notes.plan, *encode('</plan>')]
    return [
        *chat.reasoning_tokens('', self._tokenizer),
        *encode(self._tokenizer.turns.answer_start + '<memory>'),
        *notes.memory, *encode('</memory>'), *plan,
        self._tokenizer.stop_ids[0]]

  def longest_prompts(
      self, question: str, instruction: str
  ) -> tuple[int, int]:
    """Tokens at most of the last turn's prompt, and of another turn's."""
    empty_len = len(self._tokenizer.encode(EMPTY))
    notes = Notes(
        memory=(0,) * max(self.config.memory_len, empty_len),
        plan=(0,) * max(self.config.plan_len, empty_len))
    part = (0,) * self.config.part_len
    return (len(self.final_prompt(question, instruction, notes)),
            len(self.update_prompt(part, question, notes)))


def _escaped(text: str) -> str:
  return _PLAIN.sub(r'<\\\1', text)


def _between(tag: str, text: str) -> str:
  found = re.search(rf'<{tag}>(.*?)</{tag}>', text, re.DOTALL)
  return found[1].strip() if found else ''

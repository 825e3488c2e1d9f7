"""What a judge is asked, what it may answer, and what a judge is.

A judge compares an answer with the reference where the rule found no match. It
sees the question, the reference and the answer, not the documents, and must
not solve the question. The answer was written by the policy, which is rewarded
for what the judge says: nothing in it may look like a verdict, a new line of
the prompt or a special token of the judge's chat template (`clean`).
"""

import dataclasses
import enum
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

PROMPT = """\
Two answers were given to one question. Decide only whether the candidate \
states the same thing as the reference; do not solve the question. Different \
wording, units or number formats may still agree; extra or missing facts that \
change the meaning do not.
Question: {question}
Reference: {reference}
Candidate: {candidate}
Finish with [[YES]] or [[NO]]."""

_VERDICT = re.compile(r'\[\[(YES|NO)\]\]')
_REPEATED_BRACKETS = re.compile(r'\[{2,}|\]{2,}')
_OPENING = re.compile(r'([<＜\[])(?=\S)')
# The names of the prompt's parts, as they would stand before a colon.
_LABEL = re.compile(
    r'(question|reference|candidate|verdict)(?:\s*[:：])+', re.IGNORECASE)


class Verdict(enum.StrEnum):
  """What a judge made of a case.

  Only YES raises a reward. NO and UNCLEAR (the judge answered, but gave no
  verdict) leave the rule's score as it was, and so does FAILED (there is no
  answer), which is not remembered.
  """

  YES = 'yes'
  NO = 'no'
  UNCLEAR = 'unclear'
  FAILED = 'failed'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """What a judge decides about; equal cases have one verdict.

  Attributes:
    question: without documents.
    golds: accepted answers; one of them is enough.
    prediction: the answer found in a response.
  """

  question: str
  golds: tuple[str, ...]
  prediction: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ruling:
  """A verdict and where it comes from.

  Attributes:
    verdict: the verdict.
    is_cached: it was remembered, nobody was asked.
  """

  verdict: Verdict
  is_cached: bool = False


class Judge(Protocol):
  """Decides cases; being asked does not block, collecting does."""

  def ask(self, case: Case) -> None:
    """Begins with a case; one that has been asked already is not asked twice.

    Returns at once, so that sampling goes on meanwhile.
    """

  def rulings(self, cases: Sequence[Case]) -> list[Ruling]:
    """Waits for the rulings on cases that were asked, and forgets them.

    Args:
      cases: each was given to `ask` since the last call; the same one may
        stand here many times. Others that were asked are dropped.

    Returns:
      One for each case, in this order. A judge that cannot be reached gives
      FAILED, it does not raise.
    """

  def close(self) -> None:
    """Gives up what is still asked and frees threads and connections."""


def render(case: Case) -> str:
  """The prompt of a case: one line each for question, reference, candidate."""
  return PROMPT.format(
      question=clean(case.question),
      reference=', or: '.join(map(clean, case.golds)),
      candidate=clean(case.prediction))


def clean(text: str) -> str:
  """Text that can forge neither a verdict nor the layout of the prompt.

  Line breaks and control characters become spaces, invisible characters go,
  runs of [ and ] become one, `Reference:` and the other labels lose their
  colon, and what opens a special token ('<|im_end|>', '</think>', '[/INST]')
  is set off by a space: servers read such tokens in what users say.
  """
  kept = []
  for character in text:
    match unicodedata.category(character):
      case 'Cf' | 'Cs' | 'Cn' | 'Co':
        continue
      case 'Cc' | 'Zl' | 'Zp':
        kept.append(' ')
      case _:
        kept.append(character)
  text = ' '.join(''.join(kept).split())
  text = _REPEATED_BRACKETS.sub(lambda run: run.group()[0], text)
  text = _LABEL.sub(r'\1', text)
  return _OPENING.sub(r'\1 ', text)


def parse(reply: str) -> Verdict:
  """The last [[YES]] or [[NO]] of a reply; anything else is UNCLEAR."""
  found = _VERDICT.findall(reply)
  if not found:
    return Verdict.UNCLEAR
  return Verdict.YES if found[-1] == 'YES' else Verdict.NO


def cache_key(request: Mapping[str, Any]) -> str:
  """SHA-256, in hexadecimal, of all that a verdict depends on.

  Args:
    request: ready for JSON: model, prompt and settings. Its order is no
      matter.
  """
  text = json.dumps(request, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()

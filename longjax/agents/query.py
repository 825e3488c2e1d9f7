"""What a person writes, split into what is asked and how to answer."""

import collections
import re

from longjax.data import chat
from longjax.data import tokenizer as tokenizer_lib

# A sentence that says how to answer rather than what is asked.
_INSTRUCTION = re.compile(
    r'\b(?:(?:answer|respond|reply|write|return|output|give|format|state)\b'
    r'[^.?!\n]*\b(?:with|in|as|only|using|json|letters?|numbers?|names?|words?|'
    r'format|list)\b|begin(?: your \w+)? with\b|json\b|schema\b)',
    re.IGNORECASE)
# Where sentences and lines end; a fenced block is one, with its line breaks.
_BOUNDARY = re.compile(r'(```.*?```)|(?<=[.?!])\s+|\s*\n\s*', re.DOTALL)


def split(query: str) -> tuple[str, str]:
  """What is asked and how to answer, of a query that does not say which is.

  Sentences that name a format (and fenced schemas) are the instruction; a
  query all of which looks like one is what is asked.

  Args:
    query: as a person wrote it.

  Returns:
    (question, instruction); the instruction may be ''.
  """
  sentences = [s.strip() for s in _BOUNDARY.split(query) if s and s.strip()]

  def is_instruction(sentence: str) -> bool:
    return sentence.startswith('```') or (
        not sentence.endswith('?') and bool(_INSTRUCTION.search(sentence)))

  question = [s for s in sentences if not is_instruction(s)]
  if not question:
    return query.strip(), ''
  return ' '.join(question), ' '.join(
      s for s in sentences if is_instruction(s))


def model_prompt(
    query: str, tokenizer: tokenizer_lib.Tokenizer
) -> list[int]:
  """Ids of a prompt that asks a model to split a query; see `read_split`."""
  template = tokenizer.turns
  return [
      *tokenizer.encode_template(template.user_start),
      *tokenizer.encode(
          f'{query}\n\nThe text above asks something and may also say in what '
          'form to answer. Copy what it asks between <question> and '
          '</question>, and what it says about the form between <instruction> '
          'and </instruction>. Use its own words, each of them once, and do '
          'not answer.'),
      *tokenizer.encode_template(
          template.user_end + template.assistant_start)]


def read_split(response: str, query: str) -> tuple[str, str]:
  """(question, instruction) as a model split a query.

  What it made up would be asked of the whole document: a split that is not
  made of the query's words, or asks nothing, is that of `split` instead.

  Args:
    response: to `model_prompt`.
    query: as a person wrote it.
  """
  answer = chat.split_response(response).answer or response
  question, instruction = (
      _between(tag, answer) for tag in ('question', 'instruction'))
  words = collections.Counter(f'{question} {instruction}'.split())
  if not question or words != collections.Counter(query.split()):
    return split(query)
  return question, instruction


def _between(tag: str, text: str) -> str:
  found = re.search(rf'<{tag}>(.*?)</{tag}>', text, re.DOTALL)
  return found[1].strip() if found else ''

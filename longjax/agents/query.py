"""What a person writes, split into what is asked and how to answer."""

import re

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

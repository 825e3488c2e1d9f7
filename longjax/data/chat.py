"""The chat template: what a prompt and a response look like in tokens.

  <|im_start|>user
  [title of document 1]
  text of document 1
  [title of document 2]
  text of document 2

  question instruction<|im_end|>
  <|im_start|>assistant
  <think>...reasoning...</think>The answer is 42.<|im_end|>

The prompt ends after '<think>', so a response starts inside the thinking
span. Every document and the question are encoded on their own: token counts
add up, and questions about the same documents share a prefix token by token.
"""

import dataclasses
from collections.abc import Sequence

from longjax import types
from longjax.data import tokenizer as tokenizer_lib

ANSWER_CUE = 'The answer is'

# Kinds graded on everything after '</think>', without a cue.
_WITHOUT_CUE = frozenset({'mrcr'})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
  """A response's text in two parts.

  Attributes:
    thinking: what stands before the last '</think>'.
    answer: what stands after it; '' if the thinking never ended.
  """

  thinking: str
  answer: str


def render_prompt(
    example: types.TaskExample, tokenizer: tokenizer_lib.Tokenizer
) -> list[int]:
  """Ids of the prompt: `context_tokens` followed by `question_tokens`."""
  return (
      context_tokens(example.documents, tokenizer)
      + question_tokens(example, tokenizer)
  )


def context_tokens(
    documents: Sequence[types.Document], tokenizer: tokenizer_lib.Tokenizer
) -> list[int]:
  """Ids of the turn's opening and the documents, up to the question."""
  ids = [tokenizer.special(tokenizer_lib.TURN_START)]
  ids += tokenizer.encode('user\n')
  for document in documents:
    ids += document_tokens(document, tokenizer)
  return ids


def question_tokens(
    example: types.TaskExample, tokenizer: tokenizer_lib.Tokenizer
) -> list[int]:
  """Ids from the end of the documents to the start of the response."""
  asked = ' '.join(filter(None, [example.question, example.instruction]))
  return turn_tokens(asked, tokenizer)


def turn_tokens(
    asked: str, tokenizer: tokenizer_lib.Tokenizer
) -> list[int]:
  """Ids from what is asked to the start of the response."""
  special = tokenizer.special
  return [
      *tokenizer.encode('\n' + asked),
      special(tokenizer_lib.TURN_END),
      *tokenizer.encode('\n'),
      special(tokenizer_lib.TURN_START),
      *tokenizer.encode('assistant\n'),
      special(tokenizer_lib.THINK_START),
  ]


def document_tokens(
    document: types.Document, tokenizer: tokenizer_lib.Tokenizer
) -> list[int]:
  """Ids one document adds to a prompt."""
  title = f'[{document.title}]\n' if document.title else ''
  return tokenizer.encode(f'{title}{document.text}\n')


def render_response(
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    reasoning: str,
    answer_text: str,
    kind: str = 'qa',
) -> list[int]:
  """Ids of a demonstration, stop token included.

  Args:
    tokenizer: encodes.
    reasoning: the thinking span; '' closes it at once.
    answer_text: the answer, without cue or full stop.
    kind: `TaskExample.kind`; 'mrcr' answers verbatim, the others after
      `ANSWER_CUE`.

  Returns:
    Ids to follow a prompt.
  """
  if kind in _WITHOUT_CUE:
    answer = answer_text
  else:
    stop = '' if answer_text.endswith('.') else '.'
    answer = f'{ANSWER_CUE} {answer_text}{stop}'
  return [
      *tokenizer.encode(reasoning),
      tokenizer.special(tokenizer_lib.THINK_END),
      *tokenizer.encode(answer),
      tokenizer.stop_id,
  ]


def split_response(text: str) -> Response:
  """Separates thinking from answer at the last '</think>'."""
  text = text.removesuffix(tokenizer_lib.TURN_END)
  thinking, tag, answer = text.rpartition(tokenizer_lib.THINK_END)
  if not tag:
    return Response(thinking=text, answer='')
  return Response(thinking=thinking, answer=answer)

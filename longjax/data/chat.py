"""Chat: what a prompt and a response look like in tokens.

With the template of a byte-level tokenizer of Qwen3 (`turns.CHATML`):

  <|im_start|>user
  [title of document 1]
  text of document 1
  [title of document 2]
  text of document 2

  question instruction<|im_end|>
  <|im_start|>assistant
  <think>
  ...reasoning...
  </think>

  The answer is 42.<|im_end|>

The prompt ends with '<think>' and its line break, so a response starts at the
first word of the reasoning. It is the text of the Thinking-2507 models' own
template; that of the first Qwen3 models leaves '<think>' and the line break to
the model, which writes just these. There is no system turn. The SentencePiece
tokenizers (`turns.COMPACT`) have no line breaks beside the think tags: there
the prompt ends with the tag itself.

Every document and the question are encoded on their own: token counts add up,
and questions about the same documents share a prefix token by token. Where
parts meet, ids may differ from those of the whole text encoded at once: two
line breaks are then one token.
"""

import dataclasses
from collections.abc import Sequence

from longjax import types
from longjax.data import tokenizer as tokenizer_lib
from longjax.data import turns

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
  ids = tokenizer.encode_template(tokenizer.turns.user_start)
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
  template = tokenizer.turns
  return [
      *tokenizer.encode('\n' + asked),
      *tokenizer.encode_template(
          template.user_end + template.assistant_start + template.think_start),
  ]


def document_tokens(
    document: types.Document, tokenizer: tokenizer_lib.Tokenizer
) -> list[int]:
  """Ids one document adds to a prompt."""
  return tokenizer.encode(document_text(document))


def document_text(document: types.Document) -> str:
  """A document as it stands in a prompt, title and line break included."""
  title = f'[{document.title}]\n' if document.title else ''
  return f'{title}{document.text}\n'


def reasoning_tokens(
    reasoning: str, tokenizer: tokenizer_lib.Tokenizer
) -> list[int]:
  """Ids of a response up to and including '</think>'."""
  return [
      *tokenizer.encode(reasoning + tokenizer.turns.reasoning_end),
      *tokenizer.encode_template(turns.THINK_END),
  ]


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
      *reasoning_tokens(reasoning, tokenizer),
      *tokenizer.encode(tokenizer.turns.answer_start + answer),
      tokenizer.stop_ids[0],
  ]


def response_text(
    tokens: Sequence[int], tokenizer: tokenizer_lib.Tokenizer, *,
    is_finished: bool,
) -> str:
  """Text of a response, '</think>' visible, without the stop token.

  Args:
    tokens: ids, stop token included.
    tokenizer: decodes.
    is_finished: the last one is a stop token.
  """
  return tokenizer.decode(tokens[:-1] if is_finished else tokens)


def split_response(text: str) -> Response:
  """Separates thinking from answer at the last '</think>'."""
  text = text.removesuffix(turns.TURN_END)
  thinking, tag, answer = text.rpartition(turns.THINK_END)
  if not tag:
    return Response(thinking=text, answer='')
  return Response(thinking=thinking, answer=answer)

"""Examples as the model sees them: prompts to answer, responses to imitate."""

import hashlib

from longjax import types
from longjax.data import chat
from longjax.data import tokenizer as tokenizer_lib


def to_prompt(
    example: types.TaskExample,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    max_len: int,
) -> types.Prompt:
  """The chat-formatted prompt of an example.

  Args:
    example: what to ask.
    tokenizer: encodes.
    max_len: most tokens a prompt may have.

  Returns:
    The prompt.

  Raises:
    UserError: the prompt is longer than `max_len`; nothing is cut, because a
      question without its evidence would be trained on as if answerable.
  """
  tokens = chat.render_prompt(example, tokenizer)
  if len(tokens) > max_len:
    raise types.UserError(
        f'example {example.id!r}: its prompt has {len(tokens)} tokens, '
        f'max_len={max_len}; raise the cap, or shorten or drop the example.')
  return types.Prompt(
      example=example, tokens=tuple(tokens), number=number(example.id))


def number(example_id: str) -> int:
  """A stable uint31 for an id; seeds the samples of its prompt."""
  digest = hashlib.sha256(example_id.encode()).digest()
  return int.from_bytes(digest[:4], 'big') & 0x7FFFFFFF


def demonstration(
    example: types.TaskExample,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    with_reasoning: bool,
) -> list[int]:
  """Ids of a correct response, stop token included.

  Args:
    example: what is answered.
    tokenizer: encodes.
    with_reasoning: whether to think aloud first, where a reasoning is known.

  Returns:
    The response.
  """
  return chat.render_response(
      tokenizer,
      reasoning=example.reasoning if with_reasoning else '',
      answer_text=answer_text(example),
      kind=example.kind,
  )


def answer_text(example: types.TaskExample) -> str:
  """The canonical answer as a response states it.

  A list's cells are joined by commas, or by semicolons if a cell holds a
  comma. 'mrcr' begins with `meta['required_prefix']`.
  """
  match example.kind:
    case 'list':
      has_comma = any(',' in cell for cell in example.answers)
      return ('; ' if has_comma else ', ').join(example.answers)
    case 'mrcr':
      prefix = example.meta.get('required_prefix', '')
      return prefix + example.answers[0].removeprefix(prefix)
    case _:
      return example.answers[0]

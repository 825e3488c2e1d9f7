"""How turns are written: what stands around a question and its answer.

A template's strings spell special tokens by name. `encode` turns them into
ids; text that came from elsewhere never passes through it.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping

from longjax import types

END_OF_TEXT = '<|endoftext|>'
TURN_START = '<|im_start|>'
TURN_END = '<|im_end|>'
THINK_START = '<think>'
THINK_END = '</think>'


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnTemplate:
  """The marks of one question and one response that thinks first.

  Attributes:
    user_start: before what the user says.
    user_end: after it.
    assistant_start: before a response.
    think_start: begins the thinking; the prompt ends with it.
    reasoning_end: text between the reasoning and '</think>'.
    answer_start: text between '</think>' and the answer.
    stop: the special token that ends a response.
    special_tokens: those a tokenizer must have for this template. The think
      tags are not among them: one that lacks them spells them out.
  """

  user_start: str
  user_end: str
  assistant_start: str
  think_start: str
  reasoning_end: str
  answer_start: str
  stop: str
  special_tokens: tuple[str, ...]


# Qwen2.5 and Qwen3, with the line breaks of Qwen3's thinking.
CHATML = TurnTemplate(
    user_start=f'{TURN_START}user\n',
    user_end=f'{TURN_END}\n',
    assistant_start=f'{TURN_START}assistant\n',
    think_start=f'{THINK_START}\n',
    reasoning_end='\n',
    answer_start='\n\n',
    stop=TURN_END,
    special_tokens=(TURN_START, TURN_END),
)

# Our own SentencePiece tokenizers: no line break beside the think tags. The
# base model in configs/ was trained on exactly this.
COMPACT = dataclasses.replace(
    CHATML, think_start=THINK_START, reasoning_end='', answer_start='')

# DeepSeek-R1-Distill-Qwen.
DEEPSEEK = TurnTemplate(
    user_start='<｜begin▁of▁sentence｜><｜User｜>',
    user_end='',
    assistant_start='<｜Assistant｜>',
    think_start=f'{THINK_START}\n',
    reasoning_end='\n',
    answer_start='\n\n',
    stop='<｜end▁of▁sentence｜>',
    special_tokens=(
        '<｜begin▁of▁sentence｜>', '<｜User｜>', '<｜Assistant｜>',
        '<｜end▁of▁sentence｜>'),
)

_TEMPLATES = (CHATML, DEEPSEEK)


def find(special: Collection[str], *, end_token: str | None) -> TurnTemplate:
  """The template whose special tokens a tokenizer has.

  Args:
    special: names of the tokenizer's special tokens.
    end_token: the one its files call eos_token; where two templates would
      do, the one that stops with it is taken. None if they name none.

  Raises:
    UserError: it has those of no template.
  """
  known = [t for t in _TEMPLATES if set(t.special_tokens) <= set(special)]
  if not known:
    missing = ' nor '.join(
        str([name for name in t.special_tokens if name not in special])
        for t in _TEMPLATES)
    raise types.UserError(
        f'the added tokens lack {missing}; a chat needs one of these sets: '
        'use a Qwen2.5, Qwen3 or R1-Distill-Qwen tokenizer, or add the '
        'tokens.')
  return next((t for t in known if t.stop == end_token), known[0])


def encode(
    text: str,
    *,
    special: Mapping[str, int],
    encode_text: Callable[[str], list[int]],
) -> list[int]:
  """Ids of a template's string.

  Args:
    text: special tokens spelled in it become those tokens.
    special: their ids by name; a name that is missing is ordinary text.
    encode_text: encodes what stands between them, each stretch on its own.

  Returns:
    The ids.
  """
  # The longest first: a name may begin with another.
  names = sorted(special, key=len, reverse=True)
  ids: list[int] = []
  for part in re.split(f'({"|".join(map(re.escape, names))})', text):
    if part in special:
      ids.append(special[part])
    elif part:
      ids += encode_text(part)
  return ids

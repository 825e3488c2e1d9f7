"""Every noun that crosses a package border. Read this file first.

  Document --synthesis--> TaskExample --data--> Prompt --rollout--> Rollouts
  Rollouts --reward--> Score --rl--> advantages --rows--> Rows --train--> params
"""

import dataclasses
from collections.abc import Mapping

import chex
import jax
from flax import struct

# Parameters, gradients: a nested dict of arrays.
Params = chex.ArrayTree


class UserError(ValueError):
  """A mistake the user can mend: one line naming field, value and remedy.

  `main` prints the message and exits with code 2, without a traceback. Any
  other exception is a bug of ours and keeps its traceback.
  """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """A piece of text the model may have to read.

  Attributes:
    title: a short name, shown above the text in a prompt.
    text: the content.
  """

  title: str
  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
  """Characters `[start, end)` of `documents[document].text`."""

  document: int
  start: int
  end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskExample:
  """One verifiable question over some documents.

  Attributes:
    id: unique over all splits.
    task: what batches are balanced over and statistics grouped by: 'mc',
      'multihop', 'reading', 'dialogue', 'numeric', 'keychain'.
    kind: the rule that grades it: 'mc', 'qa', 'numeric', 'count', 'list',
      'mrcr' (see `reward.hybrid`).
    documents: the context, in reading order.
    question: what is asked, without any format instruction (q_core).
    instruction: how to answer (q_inst); may be empty.
    answers: accepted answers, the first is canonical. 'mc': the letter, then
      the option's text. 'list': one cell each.
    evidence: the spans that determine the answer; may be empty.
    reasoning: a correct derivation quoting the evidence, from which
      demonstrations are written; may be empty.
    hops: number of facts combined.
    meta: anything a reader of the data set may want, e.g. 'required_prefix'
      and 'unit', which some rules read.
  """

  id: str
  task: str
  kind: str
  documents: tuple[Document, ...]
  question: str
  instruction: str = ''
  answers: tuple[str, ...]
  evidence: tuple[Span, ...] = ()
  reasoning: str = ''
  hops: int = 1
  meta: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """An example as the model sees it.

  Attributes:
    example: where it comes from; grades the response.
    tokens: ids of the chat-formatted prompt, ending where the response begins.
    number: counter-based identity (uint31) that seeds its samples.
  """

  example: TaskExample
  tokens: tuple[int, ...]
  number: int


@struct.dataclass
class Rollouts:
  """What the sampler wrote: P prompts, G responses each, up to R tokens.

  Attributes:
    tokens: i32[P, G, R] response ids including the stop token, then 0.
    lengths: i32[P, G] response lengths in tokens, stop token included.
    logprobs: f32[P, G, R] log-probability (nats) of each token under the
      tempered distribution *before* nucleus truncation; 0 past the end.
    entropy: f32[P, G, R] entropy (nats) of that distribution; 0 past the end.
    entropy_t1: f32[P, G, R] the same at temperature 1.
    is_finished: bool[P, G] True if the response ended with a stop token.
    expert_ids: [P, G, R, L, A] the experts each token read went to (slot 0 is
      the last prompt token, slot t response token t - 1); None if not asked.
    prompt_expert_ids: [P, S, L, A] the same of the prompt's tokens.
  """

  tokens: jax.Array
  lengths: jax.Array
  logprobs: jax.Array
  entropy: jax.Array
  entropy_t1: jax.Array
  is_finished: jax.Array
  expert_ids: jax.Array | None = None
  prompt_expert_ids: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
  """A grade.

  Attributes:
    reward: in [0, 1].
    answer: what was graded: the extracted answer, '' if none was found.
    rule: name of the rule that decided, for the report.
  """

  reward: float
  answer: str
  rule: str

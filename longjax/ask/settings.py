"""What can be set about an inquiry, and the prompt lengths that follow.

The longest prompt and the longest response fit into the window together. Prompt
lengths that programs are compiled for are few and depend on the settings only,
not on documents.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from longjax import config as config_lib
from longjax import types
from longjax.agents import memory as memory_lib
from longjax.model import compute as compute_lib
from longjax.parallel import mesh as mesh_lib
from longjax.rollout import decode, engine

# Of a model whose files do not say.
_DEFAULT_WINDOW = 32_768
_SHORTEST_BUCKET = 1024
# Prompts of turns are padded to multiples: questions differ in length.
_MULTIPLE = 128
_SHORTEST_PART = 16
_CHUNKS_A_PART = 8
_SHORTEST_CHUNK, _LONGEST_CHUNK = 64, 2048

# What changes how an inquiry looks, not what it answers, and what paths lead
# to: that may change where they do not.
_NO_SETTINGS = (
    'show_thinking', 'show_memory', 'model', 'documents', 'question')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskConfig:
  """An inquiry; the flags --ask.KEY set it.

  Attributes:
    model: work directory of a run, one of its checkpoints
      (WORKDIR/checkpoints/STEP), or a Hugging Face directory.
    documents: files, globs, or several with commas between them; see
      `ask.files`.
    question: what is asked; several are asked about the same documents at
      once.
    mode: 'whole' puts the documents into one prompt, 'memory' reads them part
      by part with the memory agent; 'auto' takes the first if they fit.
    split: how a question is told from what it says about the form of the
      answer, which the memory agent hears last: by 'rules', or by the 'model',
      where it does so without a change of words.
    each_file: every file is a document on its own that all questions are asked
      about, else all files are read as one.
    window: tokens of prompt and response at most; 0 is what the model's
      config.json says.
    memory: how documents are read in parts; `memory.part_len` is lowered to
      what the window leaves.
    sampler: temperature, nucleus, cap on what a turn or an answer may take.
    seed: of the sampler.
    at_once: pairs of a document and a question that are worked on at once, at
      most.
    show_thinking: also show what stands before '</think>'.
    show_memory: show the memory after every part.
    dtype: of weights and activations; 'auto' is float32 on CPUs and bfloat16
      elsewhere.
    cpu_devices: see `run_config.RunConfig`.
    mesh: devices that the model lies on.
  """

  job: Literal['ask'] = 'ask'
  model: str = ''
  documents: str | tuple[str, ...] = ''
  question: str | tuple[str, ...] = ''
  mode: Literal['auto', 'whole', 'memory'] = 'auto'
  split: Literal['rules', 'model'] = 'rules'
  each_file: bool = False
  window: int = 0
  memory: memory_lib.MemoryConfig = memory_lib.MemoryConfig()
  sampler: decode.SamplerConfig
  seed: int = 0
  at_once: int = 8
  show_thinking: bool = False
  show_memory: bool = False
  dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'
  cpu_devices: int = 0
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig(data=1, tensor=-1)

  def __post_init__(self):
    if self.window < 0:
      raise types.UserError(f'window={self.window} must be >= 0.')
    if self.at_once < 1:
      raise types.UserError(f'at_once={self.at_once} must be >= 1.')
    if not 0 <= self.seed < 1 << 31:
      raise types.UserError(f'seed={self.seed} must be in [0, 2**31).')

  @property
  def questions(self) -> tuple[str, ...]:
    """All that is asked, each once."""
    given = (
        (self.question,) if isinstance(self.question, str) else self.question)
    return tuple(dict.fromkeys(filter(None, (q.strip() for q in given))))

  @property
  def patterns(self) -> tuple[str, ...]:
    """All that documents are named by."""
    given = self.documents
    return (given,) if isinstance(given, str) else given

  def check_given(self) -> None:
    """Raises UserError unless there is something to ask, of whom and about."""
    for name, given, example in (
        ('model', self.model, 'DIRECTORY'),
        ('documents', any(self.patterns), "'texts/*.txt'"),
        ('question', self.questions, "'Who signed?'")):
      if not given:
        raise types.UserError(f'{name} is empty; set --ask.{name}={example}.')

  def compute(self, platform: str) -> compute_lib.Compute:
    """Backends and dtype on a platform."""
    if self.dtype != 'auto':
      return compute_lib.Compute(dtype=self.dtype)
    return compute_lib.Compute(
        dtype='float32' if platform == 'cpu' else 'bfloat16')

  def facts(self) -> dict[str, Any]:
    """All settings that answers depend on, ready for JSON.

    Not what is asked, of whom and about what.
    """
    resolved = config_lib.resolved(self)
    return {k: v for k, v in resolved.items() if k not in _NO_SETTINGS}


def window(config: AskConfig, directory: pathlib.Path) -> int:
  """Tokens that the model may see at once.

  Args:
    config: what is set counts.
    directory: of the model. What its config.json has there that are no numbers
      counts as not said.
  """
  if config.window:
    return config.window
  path = directory / 'config.json'
  content = json.loads(path.read_text()) if path.exists() else {}
  longest = _number(content, 'max_position_embeddings') or _DEFAULT_WINDOW
  # Newer files have the second; see `model.huggingface_config`.
  for yarn in (content.get('rope_scaling'), content.get('rope_parameters')):
    # Some models' files state the length before YaRN, some that with it.
    longest = max(longest, _number(yarn, 'factor') * _number(
        yarn, 'original_max_position_embeddings'))
  return round(longest)


def _number(table: Any, name: str) -> float:
  """A number in a table that may be none; 0 if it is not there."""
  found = table.get(name) if isinstance(table, dict) else None
  return found if isinstance(found, int | float) else 0


def room(config: AskConfig, window_len: int) -> int:
  """Tokens that a prompt may have.

  Raises:
    UserError: there are none.
  """
  left = window_len - config.sampler.max_response_len
  if left < 2:
    raise types.UserError(
        f'sampler.max_response_len={config.sampler.max_response_len} leaves '
        f'no prompt in a window of {window_len} tokens; lower it or raise '
        '--ask.window.')
  return left


def whole_engine(
    config: AskConfig, window_len: int, num_prompts: int
) -> engine.EngineConfig:
  """Shapes for prompts of whole documents."""
  longest = room(config, window_len)
  buckets = [longest]
  bucket = _SHORTEST_BUCKET
  while bucket < longest:
    buckets.append(bucket)
    bucket *= 2
  return engine.EngineConfig(
      prompt_buckets=tuple(sorted(buckets)),
      prompts_at_once=_lanes(config, num_prompts))


def part_len(config: AskConfig, window_len: int, words_len: int) -> int:
  """Tokens of a part: what is set, or what the window leaves.

  Args:
    config: what is set.
    window_len: tokens of prompt and response at most.
    words_len: longest prompt without any part.

  Returns:
    The length; at least a few tokens, which may be more than there are, see
    `check_parts`.
  """
  left = room(config, window_len) // _MULTIPLE * _MULTIPLE - words_len
  return max(min(config.memory.part_len, left), _SHORTEST_PART)


def check_parts(
    config: AskConfig, window_len: int, lengths: Sequence[int]
) -> None:
  """Raises UserError if turns with the shortest parts do not fit.

  Args:
    config: what is set.
    window_len: tokens of prompt and response at most.
    lengths: longest prompts of each kind of turn.
  """
  if max(lengths) > room(config, window_len):
    raise types.UserError(
        f'a window of {window_len} tokens is too small to read in parts: '
        f'{config.sampler.max_response_len} are for a response and '
        f'{config.memory.memory_len} for the memory; lower '
        '--ask.sampler.max_response_len or --ask.memory.memory_len.')


def memory_engine(
    config: AskConfig, lengths: Sequence[int], *, part_len: int,
    num_prompts: int,
) -> engine.EngineConfig:
  """Shapes for turns of the memory agent.

  Args:
    config: what is set.
    lengths: longest prompts of each kind of turn.
    part_len: tokens of a part.
    num_prompts: asked at once.
  """
  return engine.EngineConfig(
      prompt_buckets=tuple(sorted(
          {-(-n // _MULTIPLE) * _MULTIPLE for n in lengths})),
      # Who asks about the same part reads again what is in no whole chunk.
      chunk_len=min(max(
          part_len // _CHUNKS_A_PART, _SHORTEST_CHUNK), _LONGEST_CHUNK),
      prompts_at_once=_lanes(config, num_prompts))


def _lanes(config: AskConfig, num_prompts: int) -> int:
  """The next power of two, so that there are few programs."""
  return min(1 << (num_prompts - 1).bit_length(), config.at_once)

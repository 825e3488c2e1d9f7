"""The nouns of an inquiry: who is asked, and what about which documents."""

import dataclasses
import pathlib
from collections.abc import Callable

from longjax import types
from longjax.ask import parts, saved
from longjax.data import prompts
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import rules as rules_lib
from longjax.rollout import decode, engine

# Writes down where all readings stand.
Save = Callable[[], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """Who is asked.

  Attributes:
    config: sizes of the network.
    params: its parameters.
    tokenizer: its tokenizer.
    rules: logical axes to mesh axes.
    compute: backends and dtype.
  """

  config: architecture.ModelConfig
  params: types.Params
  tokenizer: tokenizer_lib.Tokenizer
  rules: rules_lib.Rules
  compute: compute_lib.Compute

  def session(
      self, shapes: engine.EngineConfig, sampler: decode.SamplerConfig
  ) -> engine.Session:
    """The sampler."""
    return engine.Engine(
        model=self.config, sampler=sampler, engine=shapes,
        stop_ids=self.tokenizer.stop_ids, rules=self.rules,
        compute=self.compute).session(self.params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
  """Files that are read as one document.

  Attributes:
    paths: of the files, in order.
    size: what there is to read.
  """

  paths: tuple[pathlib.Path, ...]
  size: parts.Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """A question about some files.

  Attributes:
    context: the files.
    question: what is asked.
    number: its place among all that is asked, from 0.
    heading: shown above the answer; '' if it is the only one.
    reading: how far the answer is; changed in place.
  """

  context: Context
  question: str
  number: int
  heading: str
  reading: saved.Reading

  @property
  def seed(self) -> int:
    """Of what is written."""
    return prompts.number(self.question)

  def example(
      self, documents: tuple[types.Document, ...] = ()
  ) -> types.TaskExample:
    """The question as prompts are made of it; nobody knows the answer."""
    return types.TaskExample(
        id=self.question, task='ask', kind='qa', documents=documents,
        question=self.question, answers=())

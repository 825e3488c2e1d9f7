"""Policies that a later stage begins with or merges, kept as they stood.

  {workdir}/models/{stage}   in Hugging Face's layout, as it is trained
"""

import pathlib
from collections.abc import Callable

from longjax import types
from longjax.model import huggingface
from longjax.parallel import multihost
from longjax.train import initial, run_state

FOLDER = 'models'

# Stands for the model a run begins with.
BASE = 'base'


def directory(context: run_state.Context, name: str) -> pathlib.Path:
  """Where the policy of a stage is kept."""
  return context.workdir / FOLDER / name


def keep(
    name: str,
    params: Callable[[], types.Params],
    context: run_state.Context,
    begin: initial.Initial,
) -> None:
  """Writes the policy of a stage, in the dtype it is trained in, once."""
  path = directory(context, name)
  if not multihost.on_primary(path.exists):
    huggingface.save(
        path, params(), context.model, source=begin.tokenizer_directory,
        stop_ids=context.tokenizer.stop_ids, pad_id=context.tokenizer.pad_id)
    context.publish()


def load(name: str, context: run_state.Context) -> types.Params:
  """The kept policy of a stage, on the mesh."""
  return huggingface.load(directory(context, name), rules=context.rules)[0]

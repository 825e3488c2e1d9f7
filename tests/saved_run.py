"""Work directories of runs that only ever saved checkpoints."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from longjax import config as config_lib
from longjax import stages, types
from longjax.rl import entropy_control
from longjax.train import checkpoint, initial, run_state
from longjax.train import state as state_lib
from tests import tiny_model, tiny_recipe


def begin(directory: pathlib.Path) -> initial.Initial:
  """What the tiny recipe begins with; its tokenizer goes to `directory`."""
  return initial.from_scratch(
      tiny_recipe.config().model, initialization='random', seed=0,
      directory=directory, texts=lambda: ['Some words. ' * 9],
      rules=tiny_model.rules(fsdp=2, data=-1))


def write(
    workdir: pathlib.Path, began: initial.Initial,
    params: Mapping[int, types.Params], **changes: Any,
) -> None:
  """Writes config and checkpoints.

  Args:
    workdir: a directory.
    began: what the run began with.
    params: at each step that is saved.
    **changes: of fields of the config.
  """
  config = tiny_recipe.config()
  (workdir / 'config.json').write_text(
      json.dumps(config_lib.resolved(config) | changes))
  optimizer = stages.optimizer(config.stages['sft'])
  rules = tiny_model.rules(fsdp=2, data=-1)
  with checkpoint.Checkpointer(workdir / 'checkpoints') as checkpointer:
    for step, values in params.items():
      checkpointer.save(step, run_state.RunState(
          train=state_lib.create(values, began.model, optimizer, rules),
          aepo=entropy_control.init()), {})

"""`job=convert`: what a run trained, as files that other programs read.

  a work directory (its newest checkpoint), --.
  one of its checkpoints,                  ----> a Hugging Face directory
  another Hugging Face directory           --'

The other way needs no job: `init_from` reads a Hugging Face directory.

The model lies on the devices of the mesh, in the dtype it is written in; the
host holds one layer of one parameter. Optimizer moments are not read.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from absl import logging

from longjax import types
from longjax.model import huggingface
from longjax.parallel import mesh as mesh_lib
from longjax.parallel import rules as rules_lib
from longjax.train import model_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
  """A conversion.

  Attributes:
    source: work directory of a run, one of its checkpoints
      (WORKDIR/checkpoints/STEP), or a Hugging Face directory.
    output: directory to write; it must not hold anything yet.
    dtype: of the tensors; 'source' is that of the source's tensors, or of
      the base model if a run began with one, else float32.
    max_file_bytes: more are split over several files.
    cpu_devices: see `run_config.RunConfig`.
    mesh: devices the model lies on meanwhile.
  """

  job: Literal['convert'] = 'convert'
  source: str = ''
  output: str = ''
  dtype: Literal['source', 'float32', 'bfloat16', 'float16'] = 'source'
  max_file_bytes: int = 4_000_000_000
  cpu_devices: int = 0
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig(data=1, fsdp=-1)

  def __post_init__(self):
    if self.max_file_bytes < 1:
      raise types.UserError(
          f'max_file_bytes={self.max_file_bytes} must be >= 1.')


def run(config: ConvertConfig) -> int:
  """Converts; returns the exit code.

  Raises:
    UserError: the source cannot be read, or the output not be written.
  """
  for name in ('source', 'output'):
    if not getattr(config, name):
      raise types.UserError(
          f'{name} is empty; set --config.{name}=DIRECTORY.')
  if config.cpu_devices:
    mesh_lib.split_cpu(config.cpu_devices)
  output = model_files.new_directory(config.output, field='output')
  source = model_files.find(config.source, field='source')
  dtype = source.dtype if config.dtype == 'source' else jnp.dtype(config.dtype)
  rules = rules_lib.Rules(mesh_lib.make(config.mesh))
  params = source.load(rules, dtype)
  huggingface.save(
      output, params, source.model, source=source.directory, dtype=dtype,
      stop_ids=source.stop_ids, pad_id=source.pad_id,
      max_file_bytes=config.max_file_bytes)
  count = sum(x.size for x in jax.tree.leaves(params))
  logging.info(
      '%s is now %s: %s parameters in %s.', source.name, output,
      f'{count:,}', dtype.name)
  return 0

"""What a benchmark measures: cases, each one program on one shape of work.

P prompts, G samples per prompt, R response tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from longjax import types
from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import mesh as mesh_lib

Program = Literal['prefill', 'decode', 'score', 'update', 'gap']
# How the samples of a prompt are computed: behind one copy of it, or each
# behind a copy of its own.
Variant = Literal['shared', 'unshared']
# See `attention.attention`. 'cudnn' is a yardstick on GPUs that knows causal
# order only, no groups and branches.
Backend = Literal['auto', 'reference', 'blockwise', 'tpu', 'gpu', 'cudnn']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A program, and the prompts and responses it is run on.

  Attributes:
    program: 'prefill' reads prompts, 'decode' writes responses to such, 'score'
      gives every response token its log-probability, 'update' is an optimizer
      step, 'gap' compares what the sampler and `score` say of the same tokens.
    num_prompts: P; 0 means one for each part of the mesh that rows are split
      over.
    prompt_len: tokens of a prompt.
    num_samples: G.
    response_len: R, tokens of the longest response.
    shortest_response: lengths are drawn evenly between this and `response_len`;
      0 means that all are `response_len`.
    rows_at_once: rows of a micro-batch; 0 as for `num_prompts`.
    variants: what is compared, side by side.
    num_layers: of the network in this case; 0 means those of the model.
    repeats: timed runs of each variant, of which the median counts.
  """

  program: Program
  num_prompts: int = 0
  prompt_len: int
  num_samples: int = 8
  response_len: int = 64
  shortest_response: int = 0
  rows_at_once: int = 0
  variants: tuple[Variant, ...] = ('shared', 'unshared')
  num_layers: int = 0
  repeats: int = 3

  def __post_init__(self):
    for name, least in (
        ('num_prompts', 0), ('prompt_len', 2), ('num_samples', 1),
        ('response_len', 1), ('shortest_response', 0), ('rows_at_once', 0),
        ('num_layers', 0), ('repeats', 1)):
      _check_least(self, name, least)
    if self.shortest_response > self.response_len:
      raise types.UserError(
          f'shortest_response={self.shortest_response} is more than '
          f'response_len={self.response_len}.')
    if not self.variants or len(set(self.variants)) != len(self.variants):
      raise types.UserError(
          f'variants={self.variants} must name one or two different ones.')
    if self.program == 'gap' and self.variants != ('shared',):
      raise types.UserError(
          f"program=gap compares no variants; use variants=('shared',), not "
          f'{self.variants}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCase:
  """Attention alone, by backend, with the heads of the model.

  Attributes:
    program: 'attention' measures forward and backward of one causal row,
      'parity' compares the device's results with the CPU's in float32.
    length: tokens of the row.
    backends: what computes it.
    repeats: timed runs, of which the median counts.
  """

  program: Literal['attention', 'parity']
  length: int
  backends: tuple[Backend, ...] = ('auto',)
  repeats: int = 5

  def __post_init__(self):
    for name, least in (('length', 2), ('repeats', 1)):
      _check_least(self, name, least)
    if self.program == 'parity' and 'cudnn' in self.backends:
      raise types.UserError(
          'program=parity tests rows with branches, which backend cudnn does '
          'not know; leave it out.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """A benchmark.

  Attributes:
    suite: its name, for the report.
    cases: what is measured, by name.
    init_from: a directory or work directory whose config.json gives the
      model's sizes; weights are random all the same.
    model: sizes, if `init_from` is empty.
    seed: of weights and tokens.
    cpu_devices: see `run_config.RunConfig`.
    mesh: see `mesh.MeshConfig`.
    compute: backends, dtype, remat.
    peak_tflops: of one device at `compute.dtype`; 0 takes what is known of the
      device, see `rates`.
    peak_gb_per_second: memory bandwidth of one device; 0 likewise.
  """

  job: Literal['bench'] = 'bench'
  suite: str
  cases: Mapping[str, Case | KernelCase]
  init_from: str = ''
  model: architecture.ModelConfig | None = None
  seed: int = 0
  cpu_devices: int = 0
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig()
  compute: compute_lib.Compute = compute_lib.Compute()
  peak_tflops: float = 0.0
  peak_gb_per_second: float = 0.0

  def __post_init__(self):
    if not self.cases:
      raise types.UserError('cases is empty; there is nothing to measure.')
    if bool(self.init_from) == (self.model is not None):
      raise types.UserError(
          f'init_from={self.init_from!r} and model={self.model}: set exactly '
          "one of them, a directory with a model's config.json or its sizes.")
    for name in ('seed', 'peak_tflops', 'peak_gb_per_second'):
      _check_least(self, name, 0)


def _check_least(config: object, name: str, least: int) -> None:
  if getattr(config, name) < least:
    raise types.UserError(
        f'{name}={getattr(config, name)} must be >= {least}.')

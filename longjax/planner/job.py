"""Plans the training stages of a run, prints and writes what is found."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from absl import logging

from longjax import types
from longjax.model import architecture, huggingface_config
from longjax.model import compute as compute_lib
from longjax.parallel import mesh as mesh_lib
from longjax.planner import layout, plan, report, search, topologies
from longjax.train import initial


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What is asked beside the run's configuration.

  Attributes:
    topology: see `topologies.TOPOLOGIES`.
    is_optimized: see `programs.compile_facts`.
    is_searched: also search for the longest context and the smallest slice.
    config_file: named in what is written.
  """

  topology: str
  is_optimized: bool = False
  is_searched: bool = True
  config_file: str = ''


def run(
    stages: Sequence[tuple[str, layout.Stage]],
    workdir: pathlib.Path,
    options: Options,
    *,
    model: architecture.ModelConfig | None,
    init_from: str,
    mesh: mesh_lib.MeshConfig,
    compute: compute_lib.Compute,
) -> int:
  """Plans stages one after the other.

  Args:
    stages: those that train, with their labels.
    workdir: where `plan-TOPOLOGY.json` is written.
    options: see there.
    model: sizes; None means those of `init_from`.
    init_from: a directory with config.json; weights are not needed.
    mesh: devices along each axis.
    compute: backends, dtype, remat.

  Returns:
    The exit code: 0 if all stages fit, else 1.

  Raises:
    UserError: no such topology, no libtpu, a mesh that does not fit the slice
      or batches that do not fit the mesh.
  """
  topologies.compile_only()
  num_devices = topologies.num_devices(options.topology)
  if not stages:
    raise types.UserError('--plan: no stage of this run trains.')
  model = model or huggingface_config.load(initial.find(init_from))
  path = workdir / f'plan-{options.topology.replace(":", "-")}.json'
  questions = [
      plan.Question(
          stage=stage, model=model, mesh=plan.resolve(mesh, num_devices),
          compute=compute, topology=options.topology,
          is_optimized=options.is_optimized) for _, stage in stages]
  for question in questions:  # Mistakes are told before minutes are spent.
    plan.check(question)
  planned: list[report.Planned] = []
  for (label, _), question in zip(stages, questions, strict=True):
    made = plan.make(question)
    found = report.Planned(label=label, plan=made)
    if options.is_searched:
      found = dataclasses.replace(
          found, longest=search.longest(made), is_searched=True,
          smallest=search.smallest(made))
    planned.append(found)
    report.show(found, sys.stdout)
    report.write(path, planned, config_file=options.config_file)
  logging.info('Plan: %s', path)
  return 0 if all(p.plan.fits for p in planned) else 1

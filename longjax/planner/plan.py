"""Does a run fit on a TPU slice, and how fast could it be? Asked of a laptop.

The programs of each training stage are compiled for the slice by libtpu, at
full depth, on the CPU of the machine that asks. Memory and compile time are
the compiler's; operations, bytes and seconds are estimates (`workload`,
`estimate`).
"""

import dataclasses
import functools

from absl import logging

from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import mesh as mesh_lib
from longjax.parallel import rules as rules_lib
from longjax.planner import estimate, layout, programs, topologies, workload
from longjax.train import rl_stage, sft_job

# A program fits if a quarter more than its peak does: libtpu's versions differ
# by that much, and routing may be uneven.
MARGIN = 1.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """What is asked.

  Attributes:
    stage: its programs.
    model: sizes.
    mesh: devices along each axis, all given.
    compute: backends, dtype, remat.
    topology: of the slice.
    is_optimized: see `programs.compile_facts`.
  """

  stage: layout.Stage
  model: architecture.ModelConfig
  mesh: mesh_lib.MeshConfig
  compute: compute_lib.Compute
  topology: str
  is_optimized: bool = False

  @property
  def chip(self) -> topologies.Chip:
    """What its devices can do."""
    return topologies.chip(self.topology)

  @property
  def limit(self) -> float:
    """Bytes a program may need, the margin left over."""
    return self.chip.memory_bytes / MARGIN

  def shapes(self) -> programs.Shapes:
    """What its programs are compiled for."""
    return programs.Shapes(
        stage=self.stage, model=self.model, rules=_rules(
            self.mesh, self.topology), compute=self.compute)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramPlan:
  """One program: what the compiler says, what it has to do, how long."""

  name: layout.Name
  facts: programs.Facts
  work: workload.Work
  roofline: estimate.Roofline


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
  """All programs of a stage on a slice."""

  question: Question
  programs: tuple[ProgramPlan, ...]

  @property
  def fits(self) -> bool:
    """Whether every program leaves the margin."""
    return all(fits(p.facts, self.question) for p in self.programs)

  @property
  def step_seconds(self) -> float:
    """Of a whole step of the stage, at best."""
    return sum(p.roofline.seconds * p.work.num_runs for p in self.programs)


def fits(facts: programs.Facts, question: Question) -> bool:
  """Whether a program leaves the margin."""
  return not facts.error and facts.needed <= question.limit


def resolve(
    config: mesh_lib.MeshConfig, num_devices: int
) -> mesh_lib.MeshConfig:
  """The sizes with -1 filled in; UserError if they do not divide."""
  return mesh_lib.MeshConfig(**mesh_lib.sizes(config, num_devices))


def mesh_text(mesh: mesh_lib.MeshConfig) -> str:
  """'fsdp=8, seq=16'."""
  return ', '.join(
      f'{axis}={size}' for axis, size in dataclasses.asdict(mesh).items()
      if size > 1) or 'one device'


@functools.cache
def _rules(mesh: mesh_lib.MeshConfig, topology: str) -> rules_lib.Rules:
  return rules_lib.Rules(
      mesh_lib.make(mesh, topologies.devices(topology)))


@functools.cache
def compiled(question: Question, name: layout.Name) -> programs.Facts:
  """Compiles one program; the same question is answered once.

  Raises:
    UserError: shapes and mesh do not go together.
  """
  shapes = question.shapes()
  logging.info(
      'Compiling %s for %s (%s).', name, question.topology,
      mesh_text(question.mesh))
  return programs.compile_facts(
      name, shapes, is_optimized=question.is_optimized)


def make(question: Question) -> StagePlan:
  """Compiles all programs of the stage.

  Raises:
    UserError: the stage's batches do not divide over the mesh.
  """
  shapes = question.shapes()
  check(question)
  made = []
  for name in programs.names(question.stage):
    facts = compiled(question, name)
    work = workload.WORK[name](
        question.stage, question.model, shapes.rules, question.compute)
    made.append(ProgramPlan(
        name=name, facts=facts, work=work, roofline=estimate.roofline(
            work, question.chip, shapes.rules.mesh.size)))
  return StagePlan(question=question, programs=tuple(made))


def check(question: Question) -> None:
  """Refuses batches that do not divide over the mesh, as the jobs do."""
  stage, context = question.stage, question.shapes().context
  if isinstance(stage, rl_stage.RlStage):
    rl_stage.check(stage, context)
  else:
    sft_job.check(stage, context)

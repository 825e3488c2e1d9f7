"""The longest context that fits on a slice, and the smallest slice that does.

Memory is linear in length and each question costs compilations, so few are
asked: a line through what is known says where to compile next.
"""

import dataclasses
from collections.abc import Sequence

from longjax import types
from longjax.parallel import mesh as mesh_lib
from longjax.planner import layout, memory, plan, programs, topologies
from longjax.train import rl_stage

# Lengths are multiples of so many tokens on each device along `seq`, so that
# they are whole blocks of attention.
_BLOCK = 512
_MOST_COMPILATIONS = 3
# An answer so near to a compiled length is taken from the line.
_NEAR = 0.1
# Beyond this a model's positions mean nothing anyway.
MOST_STRETCH = 16.0

# The axis that is halved first where devices are fewer: those that hold copies
# of programs before those that make each program smaller.
_HALVED_FIRST = ('data', 'fsdp', 'expert', 'seq', 'tensor')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Longest:
  """The longest sequences that fit.

  Attributes:
    stage: with these lengths.
    stretch: its lengths over those asked about.
    limited_by: the program that sets the limit.
    compiled: stretches at which that program was compiled.
  """

  stage: layout.Stage
  stretch: float
  limited_by: layout.Name
  compiled: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Smallest:
  """The smallest slice on which every program fits, compiled for it."""

  question: plan.Question
  facts: dict[layout.Name, programs.Facts]


def sequence_len(stage: layout.Stage) -> int:
  """Tokens of the longest sequence: a prompt and a response, or a row."""
  if isinstance(stage, rl_stage.RlStage):
    return stage.max_prompt_len + stage.sampler.max_response_len
  return stage.row_len


def stretched(
    stage: layout.Stage, factor: float, *, num_shards: int
) -> layout.Stage:
  """The stage with all its lengths times `factor`, rounded to whole blocks."""

  def length(tokens: float, multiple: int) -> int:
    return max(round(tokens * factor / multiple), 1) * multiple

  shortest = layout.row_lens(stage)[0]
  block = min(_BLOCK, max(1, int(shortest * factor) // (8 * num_shards)))
  block = 1 << block.bit_length() - 1
  multiple = num_shards * block
  if not isinstance(stage, rl_stage.RlStage):
    return dataclasses.replace(stage, row_len=length(stage.row_len, multiple))
  sampler = dataclasses.replace(
      stage.sampler,
      max_response_len=length(stage.sampler.max_response_len, 1))
  max_prompt_len = length(stage.max_prompt_len, multiple)
  *short, longest = (length(row_len, multiple) for row_len in stage.row_lens)
  least = max_prompt_len + sampler.max_response_len
  longest = max(longest, -(-least // multiple) * multiple)
  return dataclasses.replace(
      stage, sampler=sampler, max_prompt_len=max_prompt_len,
      row_lens=tuple(sorted({*short, longest})))


def longest(made: plan.StagePlan) -> Longest:
  """Stretches the stage until its memory is full.

  A program's line begins with what does not grow: the state. The program whose
  line meets the limit first is compiled where it does, which gives the line a
  second point.
  """
  question = made.question
  num_shards = question.mesh.seq
  points = {
      p.name: {1.0: float(p.facts.needed)} for p in made.programs}
  # Before anything is known of lengths: parameters and moments stay.
  fixed = {
      p.name: float(p.facts.beside + min(p.facts.arguments, p.facts.needed))
      for p in made.programs}

  def first_limit() -> tuple[float, layout.Name]:
    return min(
        (_reach(points[name], fixed[name], question.limit), name)
        for name in points)

  for _ in range(_MOST_COMPILATIONS):
    factor, name = first_limit()
    is_known = len(points[name]) > 1 and any(
        abs(factor / at - 1) < _NEAR for at in points[name])
    if factor >= MOST_STRETCH or is_known:
      break
    stage = stretched(question.stage, factor, num_shards=num_shards)
    facts = plan.compiled(dataclasses.replace(question, stage=stage), name)
    at = sequence_len(stage) / sequence_len(question.stage)
    if at in points[name] or not facts.needed:
      break
    points[name][at] = float(facts.needed)
  factor, name = first_limit()
  stage = stretched(question.stage, factor, num_shards=num_shards)
  return Longest(
      stage=stage, limited_by=name,
      stretch=sequence_len(stage) / sequence_len(question.stage),
      compiled=tuple(sorted(points[name])))


def _reach(
    points: dict[float, float], fixed: float, limit: float
) -> float:
  """Where the line through a program's points meets the limit."""
  known = sorted(points.items(), key=lambda p: abs(p[1] - limit))
  (at, needed), (at0, needed0) = (*known[:2], (0.0, fixed))[:2]
  slope = (needed - needed0) / (at - at0)
  if slope <= 0:
    return MOST_STRETCH
  return min(max(at + (limit - needed) / slope, 1 / 64), MOST_STRETCH)


def fitted_mesh(
    mesh: mesh_lib.MeshConfig, num_devices: int
) -> mesh_lib.MeshConfig | None:
  """The mesh with axes halved, or `fsdp` doubled, for so many devices."""
  sizes = dataclasses.asdict(mesh)
  size = 1
  for axis in sizes.values():
    size *= axis
  while size < num_devices:
    sizes['fsdp'] *= 2
    size *= 2
  while size > num_devices:
    axis = next((a for a in _HALVED_FIRST if sizes[a] % 2 == 0), None)
    if axis is None:
      return None
    sizes[axis] //= 2
    size //= 2
  return mesh_lib.MeshConfig(**sizes) if size == num_devices else None


def moved(question: plan.Question, topology: str) -> plan.Question | None:
  """The same question of another slice; None if no mesh leads there.

  What a device computes at once stays what it was: rows and prompts at once
  follow the number of data shards.
  """
  mesh = fitted_mesh(question.mesh, topologies.num_devices(topology))
  if mesh is None:
    return None

  def shards(config):
    return config.data * config.fsdp * config.expert

  def at_once(number):
    return max(number * shards(mesh) // shards(question.mesh), shards(mesh))

  stage = question.stage
  try:
    if isinstance(stage, rl_stage.RlStage):
      num_prompts = at_once(layout.prompts_at_once(stage))
      stage = dataclasses.replace(
          stage,
          rows_at_once=stage.rows_at_once and at_once(stage.rows_at_once),
          prompts_at_once=min(num_prompts, stage.num_prompts))
    else:
      rows_at_once = at_once(stage.rows_at_once or stage.num_rows)
      stage = dataclasses.replace(
          stage, rows_at_once=min(rows_at_once, stage.num_rows))
    found = dataclasses.replace(
        question, stage=stage, mesh=mesh, topology=topology)
    plan.check(found)
  except types.UserError:
    return None
  return found


def smallest(made: plan.StagePlan) -> Smallest | None:
  """The smallest slice of the generation on which all programs fit.

  Slices are tried from small to large; those that cannot hold state and caches
  alone are not compiled for.
  """
  for topology in topologies.like(made.question.topology):
    if topology == made.question.topology and made.fits:
      return Smallest(question=made.question, facts={
          p.name: p.facts for p in made.programs})
    question = moved(made.question, topology)
    if question is None or _least(question) > question.limit:
      continue
    facts = _all_fit(question, made.programs)
    if facts:
      return Smallest(question=question, facts=facts)
  return None


def _least(question: plan.Question) -> float:
  """Bytes that the hungriest program cannot do without."""
  shapes = question.shapes()
  return max(
      memory.least(
          name, question.stage, question.model, shapes.rules,
          question.compute) for name in programs.names(question.stage))


def _all_fit(
    question: plan.Question, known: Sequence[plan.ProgramPlan]
) -> dict[layout.Name, programs.Facts]:
  """Facts of all programs; {} as soon as one does not fit."""
  facts = {}
  # The hungriest first: if one does not fit, it is likely that one.
  for program in sorted(known, key=lambda p: -p.facts.needed):
    facts[program.name] = plan.compiled(question, program.name)
    if not plan.fits(facts[program.name], question):
      return {}
  return facts

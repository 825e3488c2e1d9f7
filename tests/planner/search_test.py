"""The searches, on a compiler whose memory is a formula."""

import dataclasses

import pytest

from longjax.model import compute
from longjax.parallel import mesh
from longjax.planner import (
    estimate,
    flops,
    plan,
    programs,
    search,
    topologies,
    workload,
)
from longjax.rollout import decode
from longjax.train import optimizer, sft_job
from tests import tiny_model

GIB = 1024**3
STAGE = tiny_model.rl_stage(
    num_prompts=32, num_samples=4, max_prompt_len=4096,
    row_lens=(2048, 8192), rows_at_once=8,
    sampler=decode.SamplerConfig(max_response_len=1024))
SFT = sft_job.SftStage(
    steps=1, num_rows=16, rows_at_once=8, row_len=8192,
    optimizer=optimizer.OptimizerConfig(learning_rate=1e-5))


def question(stage=STAGE, topology='v5e:4x4', **sizes):
  return plan.Question(
      stage=stage, model=tiny_model.MODEL, compute=compute.Compute(),
      topology=topology, mesh=plan.resolve(
          mesh.MeshConfig(**{'data': 1, 'fsdp': 4, 'seq': 2, 'expert': 2}
                          | sizes), topologies.num_devices(topology)))


class Compiler:
  """Stands in for `plan.compiled`: fixed GiB, and GiB at the first length."""

  def __init__(self, fixed, growing, over_devices=0.0):
    self.fixed, self.growing = fixed, growing
    self.over_devices = over_devices
    self.asked = []

  def __call__(self, asked, name):
    self.asked.append((asked, name))
    length = search.sequence_len(asked.stage) / 5120
    if isinstance(asked.stage, sft_job.SftStage):
      length = asked.stage.row_len / 8192
    needed = self.fixed[name] + self.growing[name] * length
    needed += self.over_devices / topologies.num_devices(asked.topology)
    return programs.Facts(peak=int(needed * GIB))


def made(asked, compiler):
  none = flops.Flops()
  work = workload.Work(
      what='', num_runs=1, needed=none, executed=none, imbalance=1.0,
      memory_bytes=0, transfers=[])
  roofline = estimate.Roofline(compute=1, memory=1, network=1, mfu=0)
  return plan.StagePlan(question=asked, programs=tuple(
      plan.ProgramPlan(
          name=name, facts=compiler(asked, name), work=work,
          roofline=roofline) for name in programs.names(asked.stage)))


NAMES = ('prefill', 'decode', 'score', 'update')


@pytest.mark.parametrize('fixed, growing, program', [
    (dict(update=3.0), dict(update=2.0), 'update'),
    (dict(update=5.0, decode=1.0), dict(update=0.5, decode=3.0), 'decode'),
    (dict(update=9.0), dict(update=9.0), 'update')])  # Does not fit as it is.
def test_the_longest_context_fills_memory(
    monkeypatch, fixed, growing, program):
  compiler = Compiler(*(
      dict.fromkeys(NAMES, 0.1) | values for values in (fixed, growing)))
  asked = question()
  start = made(asked, compiler)
  compiler.asked.clear()
  monkeypatch.setattr(plan, 'compiled', compiler)
  found = search.longest(start)
  assert found.limited_by == program
  assert 1 <= len(compiler.asked) <= 3
  limit = topologies.chip('v5e:4x4').memory_bytes / GIB / plan.MARGIN
  want = (limit - fixed[program]) / growing[program]
  assert abs(found.stretch / want - 1) < 0.05
  stage = found.stage
  assert stage.max_prompt_len % asked.mesh.seq == 0
  assert all(n % asked.mesh.seq == 0 for n in stage.row_lens)
  short, long = stage.row_lens
  assert abs(long / short / 4 - 1) < 0.1
  assert long >= stage.max_prompt_len + stage.sampler.max_response_len


def test_supervised_rows_are_stretched_too(monkeypatch):
  compiler = Compiler(dict(update=2.0), dict(update=1.0))
  monkeypatch.setattr(plan, 'compiled', compiler)
  found = search.longest(made(question(SFT, expert=1, fsdp=8), compiler))
  assert abs(found.stretch / (15.75 / 1.25 - 2) - 1) < 0.05
  assert found.stage.row_len % 1024 == 0


def test_the_smallest_slice_is_the_first_that_holds_every_program(monkeypatch):
  # 5 + 40 / devices GiB: 15 on 4 devices, 10 on 8; the limit is 12.6.
  compiler = Compiler(
      dict.fromkeys(NAMES, 5.0), dict.fromkeys(NAMES, 0.0), over_devices=40.0)
  monkeypatch.setattr(plan, 'compiled', compiler)
  monkeypatch.setattr(plan, 'check', lambda question: None)
  monkeypatch.setattr(search, '_least', lambda question: 0.0)
  found = search.smallest(made(question(), compiler))
  assert found.question.topology == 'v5e:2x4'
  assert found.question.mesh == mesh.MeshConfig(
      data=1, fsdp=2, seq=2, tensor=1, expert=2)
  assert set(found.facts) == set(NAMES)
  # A device has as much to do at once as before.
  assert found.question.stage.rows_at_once == 4
  assert found.question.stage.prompts_at_once == 16


def test_what_fits_nowhere_has_no_smallest_slice(monkeypatch):
  compiler = Compiler(
      dict.fromkeys(NAMES, 50.0), dict.fromkeys(NAMES, 0.0))
  monkeypatch.setattr(plan, 'compiled', compiler)
  monkeypatch.setattr(plan, 'check', lambda question: None)
  monkeypatch.setattr(search, '_least', lambda question: 0.0)
  assert search.smallest(made(question(), compiler)) is None


def test_a_mesh_gives_up_copies_first():
  sizes = mesh.MeshConfig(data=2, fsdp=2, seq=4, tensor=2, expert=2)
  meshes = [search.fitted_mesh(sizes, n) for n in (128, 64, 16, 4, 1, 3)]
  shapes = [m and tuple(dataclasses.asdict(m).values()) for m in meshes]
  # Data, fsdp, seq, tensor, expert.
  assert shapes == [
      (2, 4, 4, 2, 2), (2, 2, 4, 2, 2), (1, 1, 4, 2, 2), (1, 1, 2, 2, 1),
      (1, 1, 1, 1, 1), None]

"""A reduced model of the 30B-A3B's kind, planned end to end."""

import json
import pathlib
import subprocess
import sys

import pytest

from longjax import types
from longjax.model import architecture, compute
from longjax.parallel import mesh
from longjax.planner import flops, job, programs, topologies
from longjax.planner import summary as summary_lib
from longjax.rollout import decode
from longjax.train import optimizer, sft_job
from tests import tiny_model

ROOT = pathlib.Path(__file__).parent.parent.parent
MODEL = architecture.ModelConfig(
    vocab_size=512, embed_dim=128, ffn_dim=128, num_layers=4, num_heads=4,
    num_kv_heads=2, head_dim=128,
    moe=architecture.MoeConfig(num_experts=8, num_active=2))
STAGE = tiny_model.rl_stage(
    num_prompts=8, num_samples=2, max_prompt_len=2048, row_lens=(2048, 4096),
    rows_at_once=2,
    sampler=decode.SamplerConfig(
        temperature=0.7, top_p=0.95, max_response_len=512))
SFT = sft_job.SftStage(
    steps=1, num_rows=2, row_len=4096,
    optimizer=optimizer.OptimizerConfig(learning_rate=1e-5))
COMPUTE = compute.Compute(dtype='bfloat16', remat=compute.Remat.BLOCK)
MESH = mesh.MeshConfig(data=1, fsdp=-1, seq=2, expert=2)


def run(stages, tmp_path, topology='v5e:2x2', mesh=MESH, **options):
  return job.run(
      stages, tmp_path, job.Options(
          topology=topology, config_file='configs/some.py', **options),
      model=MODEL, init_from='', mesh=mesh, compute=COMPUTE)


def test_a_reduced_model_is_planned_for_four_chips(tmp_path, capsys):
  pytest.importorskip('libtpu')
  assert run([('stage1', STAGE)], tmp_path, is_searched=False) == 0
  text = capsys.readouterr().out
  for part in ('stage1: 8 prompts of 2,048 tokens',
               'v5e:2x2: 4 devices on 4 chips', 'mesh seq=2, expert=2',
               'FITS on v5e:2x2',
               f'Compiled by libtpu {topologies.libtpu_version()}',
               'Estimated at the length caps'):
    assert part in text
  content = json.loads((tmp_path / 'plan-v5e-2x2.json').read_text())
  assert content['config'] == 'configs/some.py'
  stage, = content['stages']
  assert stage['fits'] and list(stage['programs']) == [
      'prefill', 'decode', 'score', 'update']
  for program in stage['programs'].values():
    facts, work = program['facts'], program['work']
    assert 0 < facts['peak'] < 15.75 * 1024**3 and not facts['error']
    parts = facts['arguments'] + facts['outputs'] + facts['temporaries']
    assert 0.8 < parts / facts['peak'] < 2.0
    assert facts['beside'] > 0  # Moments, at least.
    assert work['executed_flops']['layers'] >= work['needed_flops']['layers']
    assert 0 < program['roofline']['mfu'] < 1
  # Parameters and gradients, 8 bytes a parameter in four pieces, and rows;
  # moments, as many bytes, wait beside.
  pieces = 8 * flops.num_parameters(MODEL) / 4
  facts = stage['programs']['update']['facts']
  assert pieces <= facts['arguments'] < 2 * pieces
  assert pieces <= facts['beside'] < 1.1 * pieces
  table = summary_lib.table([content])
  assert '| configs/some.py | stage1 | v5e:2x2' in table


def test_what_does_not_fit_says_how_much_it_wanted(tmp_path, capsys):
  pytest.importorskip('libtpu')
  large = architecture.ModelConfig(
      vocab_size=512, embed_dim=8192, ffn_dim=32768, num_layers=2,
      num_heads=64, num_kv_heads=8, head_dim=128)
  code = job.run(
      [('sft', SFT)], tmp_path,
      job.Options(topology='v5e:1x1', is_searched=False), model=large,
      init_from='', mesh=mesh.MeshConfig(), compute=COMPUTE)
  assert code == 1
  text = capsys.readouterr().out
  assert 'DOES NOT FIT on v5e:1x1: update' in text
  content = json.loads((tmp_path / 'plan-v5e-1x1.json').read_text())
  facts = content['stages'][0]['programs']['update']['facts']
  assert 'exceeds available HBM' in facts['error']
  assert facts['needed'] > 12 * flops.num_parameters(large)


@pytest.mark.parametrize('message, gib', [
    ('E1000: the total memory required for HLO temporaries (46.04G) exceeds '
     'available HBM (15.75G).', 46.04), ('INTERNAL: something else', 0.0)])
def test_what_the_compiler_wanted_is_read_from_its_message(message, gib):
  assert programs._wanted(message) == int(gib * 1024**3)


def test_a_wrong_slice_on_the_command_line_is_one_line(tmp_path):
  done = subprocess.run(
      [sys.executable, '-m', 'longjax', '--config=configs/tiny.py',
       '--plan=v5p-256', f'--workdir={tmp_path}'], cwd=ROOT,
      capture_output=True, text=True, check=False)
  assert done.returncode == 2
  line, = done.stderr.splitlines()
  assert line.startswith(
      'longjax: error: --plan=v5p-256 is no topology; did you mean v5p:4x4x8?')


def test_mistakes_are_named(tmp_path):
  pytest.importorskip('libtpu')
  with pytest.raises(types.UserError, match='--plan=v5e:3x3 is no topology'):
    run([('sft', SFT)], tmp_path, 'v5e:3x3')
  with pytest.raises(types.UserError, match='needs a multiple of 8 devices'):
    run([('sft', SFT)], tmp_path, mesh=mesh.MeshConfig(data=1, fsdp=-1, seq=8))
  with pytest.raises(types.UserError, match='no stage of this run trains'):
    run([], tmp_path)
  with pytest.raises(types.UserError, match='num_rows=2 does not divide'):
    run([('sft', SFT)], tmp_path, mesh=mesh.MeshConfig())
  assert not list(tmp_path.glob('plan-*'))

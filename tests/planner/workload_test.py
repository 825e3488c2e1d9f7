"""What programs are said to do at the length caps."""

import dataclasses

import numpy as np

from longjax.model import compute
from longjax.planner import (
    estimate,
    flops,
    layout,
    programs,
    topologies,
    workload,
)
from longjax.rl import loss
from longjax.rollout import decode
from longjax.train import optimizer, sft_job
from tests import tiny_model

STAGE = tiny_model.rl_stage(
    num_prompts=10, num_samples=3, max_prompt_len=17, row_lens=(48,),
    rows_at_once=4,
    sampler=decode.SamplerConfig(max_response_len=8))
SFT = sft_job.SftStage(
    steps=1, num_rows=8, rows_at_once=4, row_len=64,
    optimizer=optimizer.OptimizerConfig(learning_rate=1e-5))
BLOCKS = compute.Compute(attention='blockwise', block_len=8)


def shapes(made):
  return [(len(part.rows), part.row_len) for part in made.micro_batches]


def test_rows_hold_whole_groups_or_repeat_their_prefix():
  # A group takes 16 + 3 * 8 = 40 of 48 tokens.
  made = layout.layout(STAGE, tiny_model.rules())
  assert (made.num_groups, made.group) == (10, (16, (8, 8, 8)))
  assert shapes(made) == [(4, 48)] * 3
  assert [row for part in made.micro_batches for row in part.rows] == [
      *((made.group,),) * 10, (), ()]
  made = layout.layout(dataclasses.replace(
      STAGE, row_lens=(24, 32), rows_at_once=0),
      tiny_model.rules(fsdp=4, tensor=2))
  # 32 tokens hold 16 + 8 + 8, the third response stands in a row of 24.
  assert shapes(made) == [(4, 32)] * 3 + [(4, 24)] * 2
  rows = [row for part in made.micro_batches for row in part.rows if row]
  assert rows == [((16, (8, 8)),)] * 10 + [((16, (8,)),)] * 10
  made = layout.layout(SFT, tiny_model.rules())
  assert shapes(made) == [(4, 64), (4, 64)]
  assert made.micro_batches[0].rows == (((64, ()),),) * 4


def test_an_update_needs_each_group_once_and_executes_padding_too():
  rules = tiny_model.rules()
  work = workload.update(STAGE, tiny_model.MODEL, rules, BLOCKS)
  needed = flops.needed_update(flops.forward(
      tiny_model.MODEL, num_tokens=400, num_scored=240,
      num_pairs=10 * flops.visible_pairs(16, (8, 8, 8))))
  assert work.needed == needed
  # Twelve rows of 48 tokens in place of ten of 40; attention skips what is
  # empty.
  np.testing.assert_allclose(
      work.executed.layers / work.needed.layers, 12 * 48 / 400)
  # Recomputed scores: 1 + 5 / 2 in place of 3; recomputed logits: 4.
  blocks = 2 * 3 // 2 + 3 * (2 + 1)
  np.testing.assert_allclose(
      work.executed.attention,
      3.5 / 3 * needed.attention * 10 * blocks * 64
      / (10 * flops.visible_pairs(16, (8, 8, 8))))
  assert not work.transfers and work.imbalance == 1.0


def test_the_device_with_the_longest_row_sets_the_pace():
  # Six groups on four devices: in the second micro-batch two wait.
  stage = dataclasses.replace(STAGE, num_prompts=6)
  work = workload.update(
      stage, tiny_model.MODEL, tiny_model.rules(fsdp=4, tensor=2), BLOCKS)
  np.testing.assert_allclose(work.imbalance, 8 / 6)


def test_a_group_over_several_rows_costs_its_prefix_again():
  rules = tiny_model.rules()
  whole, split = (
      workload.update(
          dataclasses.replace(STAGE, row_lens=row_lens, rows_at_once=1),
          tiny_model.MODEL, rules, BLOCKS)
      for row_lens in ((40,), (24, 32)))
  assert split.needed == whole.needed
  np.testing.assert_allclose(
      split.executed.layers / whole.executed.layers, (32 + 24) / 40)


def test_scoring_is_a_third_of_an_update_and_runs_once():
  rules = tiny_model.rules(fsdp=4, seq=2)
  score, update = (
      f(STAGE, tiny_model.MODEL, rules, BLOCKS)
      for f in (workload.score, workload.update))
  np.testing.assert_allclose(3 * score.needed.total, update.needed.total)
  assert score.num_runs == 1
  trusting = dataclasses.replace(STAGE, entropy_source='sampler')
  assert workload.score(
      trusting, tiny_model.MODEL, rules, BLOCKS).num_runs == 0


def test_decoding_repeats_work_where_prompts_are_fewer_than_devices():
  rules = tiny_model.rules(fsdp=2, seq=4)
  few, many = (
      workload.decode(
          dataclasses.replace(STAGE, num_prompts=n), tiny_model.MODEL, rules,
          BLOCKS) for n in (4, 16))
  np.testing.assert_allclose(few.executed.layers / few.needed.layers, 4)
  np.testing.assert_allclose(many.executed.layers / many.needed.layers, 1)
  # Each device keeps the samples of two prompts' worth of keys either way.
  assert few.num_runs == many.num_runs == 8


def test_the_slowest_part_sets_the_time():
  rules = tiny_model.rules(fsdp=4, seq=2)
  chip = topologies.chip('v5p:2x2x2')
  work = workload.update(SFT, tiny_model.MODEL, rules, BLOCKS)
  line = estimate.roofline(work, chip, 8)
  assert line.seconds == max(line.compute, line.memory, line.network)
  assert 0.0 < line.mfu < 1.0
  alone = dataclasses.replace(work, memory_bytes=0.0, transfers=[])
  line = estimate.roofline(alone, chip, 8)
  assert line.bound == 'compute'
  executed = work.executed.total / 8 / chip.flops
  assert executed <= line.seconds <= work.imbalance * executed
  np.testing.assert_allclose(
      line.mfu, work.needed.total / (8 * chip.flops * line.seconds))


def test_steps_that_are_cut_read_begun_responses_again():
  cut = dataclasses.replace(
      STAGE, cut_tokens=10, loss=loss.LossConfig(tis_cap=2.0))
  assert programs.names(cut) == (
      'prefill', 'resume', 'decode', 'score', 'update')
  assert 'resume' not in programs.names(STAGE)
  work = workload.resume(
      cut, tiny_model.MODEL, tiny_model.rules(fsdp=2, tensor=4), BLOCKS)
  # Ten lanes on two shards: a sample of each, half of eight tokens behind 17.
  assert work.num_runs == 30 / 2
  np.testing.assert_allclose(work.needed.layers, flops.forward(
      tiny_model.MODEL, num_tokens=8, num_scored=0, num_pairs=0).layers)
  assert work.executed.layers == 2 * work.needed.layers

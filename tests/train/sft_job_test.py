"""Tests for longjax.train.sft_job; `shared_prefix_test` has its gradients."""

import types as python_types

import pytest

from longjax import types
from longjax.synthesis import pretraining
from longjax.train import optimizer as optimizer_lib
from longjax.train import sft_job
from tests import tiny_model

OPTIMIZER = optimizer_lib.OptimizerConfig(learning_rate=1e-3)


def sft(**overrides):
  return sft_job.SftStage(**dict(
      steps=3, num_rows=8, row_len=64, optimizer=OPTIMIZER) | overrides)


@pytest.mark.parametrize('overrides, message', [
    (dict(steps=0), 'steps=0 must be >= 1'),
    (dict(row_len=0), 'row_len=0 must be >= 1'),
    (dict(rows_at_once=3), 'rows_at_once=3 must be 0 or divide num_rows=8'),
    (dict(reasoning_fraction=1.5), 'reasoning_fraction=1.5'),
    (dict(lookahead=0), 'lookahead=0'),
])
def test_impossible_stages_are_refused(overrides, message):
  with pytest.raises(types.UserError, match=message):
    sft(**overrides)


def test_texts_longer_than_a_row_are_refused():
  def pretrain(row_len):
    return sft_job.PretrainStage(
        steps=3, num_rows=8, row_len=row_len, optimizer=OPTIMIZER,
        text=pretraining.PretrainingConfig(min_len=64))

  pretrain(64)
  with pytest.raises(types.UserError, match='text.min_len=64 is more than'):
    pretrain(63)


@pytest.mark.parametrize('overrides, message', [
    (dict(num_rows=12), 'num_rows=12 does not divide over the 8'),
    (dict(num_rows=24, rows_at_once=4), 'rows_at_once=4 does not divide over'),
])
def test_rows_that_do_not_divide_over_the_mesh_are_refused(overrides, message):
  context = python_types.SimpleNamespace(
      rules=tiny_model.rules(data=2, fsdp=4))
  sft_job.check(sft(num_rows=24, rows_at_once=8), context)
  with pytest.raises(types.UserError, match=message):
    sft_job.check(sft(**overrides), context)

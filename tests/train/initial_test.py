"""Tests for longjax.train.initial; `recipe_test` has `find`."""

import jax
import numpy as np
import pytest

from longjax import types
from longjax.data import tokenizer as tokenizer_lib
from longjax.model import architecture, huggingface
from longjax.train import initial
from tests import tiny_model

MODEL = architecture.ModelConfig(
    vocab_size=400, embed_dim=16, ffn_dim=16, num_layers=1, num_heads=4,
    num_kv_heads=4, head_dim=8)


def texts():
  yield 'Some words. ' * 9


def begin(directory, *, seed=0, texts=texts, **mesh):
  return initial.from_scratch(
      MODEL, initialization='random', seed=seed, directory=directory,
      texts=texts, rules=tiny_model.rules(**mesh))


def leaves(made):
  return [np.asarray(x) for x in jax.tree.leaves(made.load())]


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  made = tmp_path_factory.mktemp('initial') / 'tokenizer'
  begin(made)
  return made


def test_a_tokenizer_is_trained_once_and_then_kept(directory):
  before = (directory / tokenizer_lib.MODEL_FILE).read_bytes()
  made = begin(directory, texts=None)
  assert (directory / tokenizer_lib.MODEL_FILE).read_bytes() == before
  # So little text gives fewer pieces than asked for.
  assert made.model.vocab_size == made.tokenizer.vocab_size < 400
  assert made.load()['embedding'].shape == (made.model.vocab_size, 16)


def test_a_tokenizer_that_was_cut_short_is_trained_again(directory, tmp_path):
  tmp_path.joinpath(tokenizer_lib.MODEL_FILE).write_bytes(b'torn')
  made = begin(tmp_path)
  assert made.tokenizer.encode('words') == begin(
      directory).tokenizer.encode('words')


def test_a_seed_gives_the_same_parameters_on_any_mesh(directory):
  one, sharded, other = (
      leaves(begin(directory, **how))
      for how in ({}, {'data': 2, 'fsdp': 4}, {'seed': 1}))
  for a, b in zip(one, sharded, strict=True):
    np.testing.assert_array_equal(a, b)
  assert any((a != b).any() for a, b in zip(one, other, strict=True))


def saved(directory, path, model):
  made = begin(directory)
  huggingface.save(
      path, made.load(), model, source=directory,
      stop_ids=made.tokenizer.stop_ids, pad_id=made.tokenizer.pad_id)
  return path


def test_a_base_model_begins_where_it_ended(directory, tmp_path):
  made = begin(directory)
  base = initial.from_base(
      str(saved(directory, tmp_path / 'base', made.model)),
      rules=tiny_model.rules(data=2, fsdp=4))
  assert base.model == made.model
  for a, b in zip(leaves(base), leaves(made), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_tokenizer_of_another_model_is_refused(
    directory, tmp_path, monkeypatch):
  path = saved(directory, tmp_path / 'base', begin(directory).model)
  monkeypatch.setattr(
      initial.huggingface_config, 'load', lambda _: tiny_model.MODEL)
  assert tiny_model.MODEL.vocab_size < begin(directory).model.vocab_size
  with pytest.raises(types.UserError, match='they do not belong together'):
    initial.from_base(str(path), rules=tiny_model.rules())

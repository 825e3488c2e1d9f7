"""Tests for longjax.rollout.streaming."""

import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from longjax.data import tokenizer as tokenizer_lib
from longjax.rollout import engine, streaming
from tests import tiny_bpe

TEXT = 'Grüße, 漢字 und 👩‍🚀! Naïve  spaces\n\tand <think>no</think>.'


@pytest.fixture(scope='module', params=['byte_level', 'sentencepiece'])
def tokenizer(request, tmp_path_factory):
  if request.param == 'sentencepiece':
    return tokenizer_lib.load('configs/tiny_base')
  return tokenizer_lib.load(tiny_bpe.write(tmp_path_factory.mktemp('bpe')))


def written(ids, *, prompt=0, sample=0, is_stopped=False):
  """The tokens of a response."""
  return [
      engine.Token(
          prompt=prompt, sample=sample, token=token, logprob=-1.0,
          is_stop=is_stopped and i == len(ids) - 1, is_last=i == len(ids) - 1)
      for i, token in enumerate(ids)]


def joined(tokens, tokenizer):
  return ''.join(p.text for p in streaming.pieces(tokens, tokenizer))


@hypothesis.settings(
    deadline=None, suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(st.integers(8, 400), min_size=1, max_size=60))
def test_pieces_make_up_the_text_of_any_ids(tokenizer, ids):
  assert joined(written(ids), tokenizer) == tokenizer.decode(ids)


def broken_ids(tokenizer):
  """Tokens that are parts of characters."""
  found = [i for i in range(400) if tokenizer.decode([i]) == '\ufffd']
  assert len(found) > 20
  return found


@hypothesis.settings(
    deadline=None, suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data())
def test_pieces_make_up_the_text_of_broken_characters(tokenizer, data):
  some = st.sampled_from(broken_ids(tokenizer))
  whole = st.sampled_from('漢👩é').map(tokenizer.encode)
  ids = list(itertools.chain(*data.draw(st.lists(
      st.one_of(st.lists(some, max_size=20), whole), min_size=1))))
  hypothesis.assume(ids)
  assert joined(written(ids), tokenizer) == tokenizer.decode(ids)


def test_broken_characters_are_not_decoded_again_and_again(tokenizer):
  ids = broken_ids(tokenizer)[:12] * 20
  decoded = []

  class Watched:

    def decode(self, given):
      decoded.append(len(given))
      return tokenizer.decode(given)

  pieces = list(streaming.pieces(written(ids), Watched()))
  assert ''.join(p.text for p in pieces) == tokenizer.decode(ids)
  assert max(decoded) < 24
  assert len(pieces) > 10


def test_characters_come_whole_and_as_soon_as_they_are_certain(tokenizer):
  ids = tokenizer.encode(TEXT)
  pieces = list(streaming.pieces(written(ids), tokenizer))
  assert ''.join(p.text for p in pieces) == tokenizer.decode(ids)
  assert not any('\ufffd' in p.text for p in pieces)
  assert len(pieces) > 0.6 * len(ids)  # Few tokens are parts of characters.
  assert [p.is_last for p in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_stop_token_is_no_text(tokenizer):
  ids = [*tokenizer.encode('Yes.'), tokenizer.stop_ids[0]]
  pieces = list(streaming.pieces(written(ids, is_stopped=True), tokenizer))
  assert ''.join(p.text for p in pieces) == 'Yes.'
  assert pieces[-1].is_last
  # Not even one that ends a character half written.
  half = tokenizer.encode('漢')[:-1]
  ids = [*half, tokenizer.stop_ids[0]]
  assert joined(written(ids, is_stopped=True), tokenizer) == (
      tokenizer.decode(half))


def test_responses_written_at_the_same_time_do_not_mix(tokenizer):
  first, second = tokenizer.encode('漢字 one'), tokenizer.encode('👩‍🚀 two')
  tokens = []
  for i in range(max(len(first), len(second))):
    for sample, ids in enumerate((first, second)):
      tokens += written(ids, prompt=3, sample=sample)[i:i + 1]
  texts = {}
  for piece in streaming.pieces(tokens, tokenizer):
    assert piece.prompt == 3
    texts[piece.sample] = texts.get(piece.sample, '') + piece.text
  assert texts == {0: tokenizer.decode(first), 1: tokenizer.decode(second)}

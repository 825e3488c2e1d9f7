import errno
import json
import os

import hypothesis
import pytest
import sentencepiece
from hypothesis import strategies as st

from longjax import types
from longjax.data import sentencepiece_tokenizer
from longjax.data import tokenizer as tokenizer_lib

NAMES = sentencepiece_tokenizer.SPECIAL_TOKENS

CORPUS = [
    'The mayor of Oslo met Ada in 1984.\n\nShe paid 12.5% of 1,300 crowns. ',
    'def area(width, height=2):\n    return width * height\n',
    'Él dijo: «¿dónde está?» 中文 😀\n',
] * 20

NASTY = (
    ' \n\t\r\0\u2581\ufeff\ufffd\u00a0\u3000\u2028\u0301\u200d😀👩‍🚀中é<>|_/'
    'im_endthink0123456789abcAZ')


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return tokenizer_lib.train(
      CORPUS, vocab_size=400, directory=tmp_path_factory.mktemp('tokenizer'))


def special_ids(tokenizer):
  return {tokenizer.special(name) for name in NAMES}


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(text=st.text() | st.text(alphabet=NASTY))
def test_decoding_what_was_encoded_gives_the_same_string(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert not special_ids(tokenizer) & set(ids)
  assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize('text', [
    '', ' ', '   a  b ', '\n\n\na\n', '\u2581', ' \u2581 x\u2581\u2581', '\0',
    '\r\n\t', '<s></s><unk><pad><0x41>\u2047', *NAMES,
    'x' * 20_000, CORPUS[0],
])
def test_awkward_texts_survive(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert not special_ids(tokenizer) & set(ids)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(ids=st.lists(st.integers(0, 420)))
def test_any_ids_decode(tokenizer, ids):
  text = tokenizer.decode(ids)
  text.encode()
  expected = sum(i >= tokenizer.vocab_size for i in ids)
  assert text.count('\ufffd') >= bool(expected)


def test_special_tokens_are_written_out(tokenizer):
  ids = [tokenizer.special('<think>'), *tokenizer.encode('so'),
         tokenizer.special('</think>'), *tokenizer.stop_ids, tokenizer.pad_id]
  assert tokenizer.decode(ids) == '<think>so</think><|im_end|><|endoftext|>'
  assert len(special_ids(tokenizer)) == 5


def test_frequent_words_take_fewer_tokens_than_bytes(tokenizer):
  assert len(tokenizer.encode(CORPUS[0])) < 0.7 * len(CORPUS[0].encode())


def test_digits_are_never_merged(tokenizer):
  for text in ('1984', '12.5', '1300'):
    digits = sum(c.isdigit() for c in text)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
    assert sum(p.isdigit() for p in pieces) == digits


def test_training_repeats_itself_bit_by_bit(tmp_path, tokenizer):
  tokenizer_lib.train(CORPUS, vocab_size=400, directory=tmp_path / 'a')
  tokenizer_lib.train(iter(CORPUS), vocab_size=400, directory=tmp_path / 'b')
  a, b = (tmp_path / d / 'tokenizer.model' for d in 'ab')
  assert a.read_bytes() == b.read_bytes()


def test_a_loaded_tokenizer_is_the_saved_one(tmp_path, tokenizer):
  tokenizer_lib.save(tokenizer, tmp_path)
  loaded = tokenizer_lib.load(tmp_path)
  assert loaded.encode(CORPUS[2]) == tokenizer.encode(CORPUS[2])
  assert (loaded.vocab_size, loaded.pad_id, loaded.stop_ids) == (
      tokenizer.vocab_size, tokenizer.pad_id, tokenizer.stop_ids)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      'tokenizer.model', 'tokenizer_config.json']
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert config['eos_token'] == '<|im_end|>'


def test_a_wide_alphabet_falls_back_to_bytes(tmp_path):
  wide = ''.join(chr(c) for c in range(0x4E00, 0x5200))
  tokenizer = tokenizer_lib.train(
      [wide, 'common words ' * 50], vocab_size=350, directory=tmp_path)
  assert tokenizer.vocab_size <= 350
  assert tokenizer.decode(tokenizer.encode(wide)) == wide
  assert len(tokenizer.encode('common words')) <= 4


def test_odd_training_texts_are_taken(tmp_path):
  texts = ['a\tb\0c\u2581d\ud800e', '<|im_end|> is a tag', '', 'x' * 200_000]
  tokenizer = tokenizer_lib.train(texts, vocab_size=300, directory=tmp_path)
  assert tokenizer.stop_ids[0] not in tokenizer.encode('<|im_end|>')


@pytest.mark.parametrize('texts', [[], ['', ' \n'], ['\t\u2581']])
def test_training_without_text_is_refused(tmp_path, texts):
  with pytest.raises(types.UserError, match='no text'):
    tokenizer_lib.train(texts, vocab_size=400, directory=tmp_path)


def test_a_vocabulary_without_room_is_refused(tmp_path):
  with pytest.raises(types.UserError, match=r'vocab_size=270.*at least 294'):
    tokenizer_lib.train(CORPUS, vocab_size=270, directory=tmp_path)


def test_half_a_surrogate_pair_is_refused(tokenizer):
  with pytest.raises(types.UserError, match='character 2'):
    tokenizer.encode('ab\ud83d')


def test_a_negative_id_is_refused(tokenizer):
  with pytest.raises(ValueError, match='negative'):
    tokenizer.decode([-1])


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(
      types.UserError, match=r'no tokenizer\.model in .*nowhere'):
    tokenizer_lib.load(tmp_path / 'nowhere')


@pytest.mark.parametrize('damage', [
    lambda b: b'', lambda b: b'not a model', lambda b: b[:len(b) // 2]])
def test_a_torn_file_is_refused(tmp_path, tokenizer, damage):
  tokenizer_lib.save(tokenizer, tmp_path)
  file = tmp_path / 'tokenizer.model'
  file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(types.UserError, match=r'tokenizer\.model'):
    tokenizer_lib.load(tmp_path)


def test_a_model_without_the_special_tokens_is_refused(tmp_path):
  sentencepiece.SentencePieceTrainer.Train(
      sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / 'tokenizer'),
      model_type='bpe', vocab_size=90, hard_vocab_limit=False,
      minloglevel=2)
  with pytest.raises(types.UserError, match=r'lacks.*im_start'):
    tokenizer_lib.load(tmp_path)


def test_a_place_that_cannot_be_written_is_reported(tmp_path, tokenizer):
  (tmp_path / 'file').touch()
  with pytest.raises(types.UserError, match=r'tokenizer\.model cannot be wri'):
    tokenizer_lib.save(tokenizer, tmp_path / 'file' / 'deeper')


def test_a_failed_save_keeps_the_old_file(tmp_path, tokenizer, monkeypatch):
  tokenizer_lib.save(tokenizer, tmp_path)
  before = (tmp_path / 'tokenizer.model').read_bytes()

  def full(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(types.UserError, match='No space left on device'):
    tokenizer_lib.save(tokenizer, tmp_path)
  assert (tmp_path / 'tokenizer.model').read_bytes() == before
  assert len(list(tmp_path.iterdir())) == 2

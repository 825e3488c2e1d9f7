import json
import unicodedata

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st

from longjax import types
from longjax.data import tokenizer as tokenizer_lib
from tests import tiny_bpe

GOLDEN = json.loads(tiny_bpe.GOLDEN_FILE.read_text())
NUM_PIECES = tiny_bpe.NUM_PIECES
END_OF_TEXT, TURN_START, TURN_END, _, THINK, THINK_END = range(
    NUM_PIECES, NUM_PIECES + 6)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tiny_bpe.write(tmp_path_factory.mktemp('qwen3'))


@pytest.fixture(scope='module')
def tokenizer(directory):
  return tokenizer_lib.load(directory)


@pytest.fixture(scope='module')
def original(directory):
  """What the library itself makes of the file."""
  return tokenizers.Tokenizer.from_file(str(directory / 'tokenizer.json'))


def test_there_are_golden_ids_for_every_text():
  assert list(GOLDEN) == tiny_bpe.TEXTS
  assert len(GOLDEN) >= 30


@pytest.mark.parametrize('text', GOLDEN)
def test_ids_are_the_golden_ones(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids == GOLDEN[text]
  assert tokenizer.decode(ids) == unicodedata.normalize('NFC', text)


def test_transformers_gives_the_golden_ids(tmp_path):
  pytest.importorskip('transformers')
  assert tiny_bpe.transformers_ids(tmp_path, list(GOLDEN)) == list(
      GOLDEN.values())


def test_transformers_decodes_alike(directory, tokenizer):
  transformers = pytest.importorskip('transformers')
  reference = transformers.AutoTokenizer.from_pretrained(directory)
  for ids in [*GOLDEN.values(), [THINK, 64, THINK_END, TURN_END, END_OF_TEXT]]:
    assert tokenizer.decode(ids) == reference.decode(
        ids, clean_up_tokenization_spaces=False)
  assert reference.eos_token_id == tokenizer.stop_ids[0]
  assert reference.pad_token_id == tokenizer.pad_id


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(text=st.text() | st.text(
    alphabet=' \n\t\r\0\ufffd\u0301\u200d😀中éåe<>|_/im_endthink01ĠÅ'))
def test_decoding_what_was_encoded_gives_the_normalised_text(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == unicodedata.normalize('NFC', text)
  assert all(0 <= i < NUM_PIECES for i in ids)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(ids=st.lists(st.integers(0, NUM_PIECES + 5)))
def test_any_ids_decode_as_the_library_decodes_them(tokenizer, original, ids):
  assert tokenizer.decode(ids) == original.decode(
      ids, skip_special_tokens=False)


def test_parts_of_characters_and_padded_ids_are_replaced(tokenizer):
  eye = tokenizer.encode('ꙮ')
  assert len(eye) == 3
  assert tokenizer.decode(eye[:2]) == '\ufffd'
  assert tokenizer.decode([*eye[:2], TURN_END]) == '\ufffd<|im_end|>'
  assert tokenizer.decode(eye[1:]) == '\ufffd\ufffd'
  assert tokenizer.vocab_size == NUM_PIECES + 6
  assert tokenizer.decode([64, NUM_PIECES + 6, 10**6]) == 'a\ufffd\ufffd'
  with pytest.raises(ValueError, match='negative'):
    tokenizer.decode([-1])


def test_half_a_surrogate_pair_is_refused(tokenizer):
  with pytest.raises(types.UserError, match='character 2'):
    tokenizer.encode('ab\ud83d')


@pytest.mark.parametrize('name', tiny_bpe.QWEN3)
def test_special_tokens_come_from_templates_only(tokenizer, original, name):
  # The library makes the token of the text, flagged special or not.
  i = tokenizer.special(name)
  assert original.encode(f'a{name}b').ids == [64, i, 65]
  assert tokenizer.encode_template(f'a{name}b') == [64, i, 65]
  ids = tokenizer.encode(f'a{name}b')
  assert max(ids) < NUM_PIECES
  assert tokenizer.decode(ids) == f'a{name}b'


def test_a_special_token_that_is_also_a_piece_is_spelled_out(tmp_path):
  content = tiny_bpe.content()
  # The whole text is one piece, which is in the vocabulary as it is.
  content['pre_tokenizer']['pretokenizers'].pop(0)
  content['model']['ignore_merges'] = True
  content['model']['vocab'] |= {
      token['content']: token['id'] for token in content['added_tokens']}
  raw = tokenizers.Tokenizer.from_str(json.dumps(content))
  assert tokenizers.Tokenizer(raw.model).encode('<|im_end|>').ids == [TURN_END]
  tokenizer = tokenizer_lib.load(tiny_bpe.write(tmp_path, content))
  ids = tokenizer.encode('<|im_end|>')
  assert TURN_END not in ids
  assert tokenizer.decode(ids) == '<|im_end|>'
  assert tokenizer.special('<|im_end|>') == TURN_END
  assert TURN_END not in tokenizer.ordinary_ids()


def test_settings_for_other_programs_change_nothing(tmp_path):
  content = tiny_bpe.content()
  content |= {
      'truncation': {'direction': 'Right', 'max_length': 2,
                     'strategy': 'LongestFirst', 'stride': 0},
      'post_processor': {
          'type': 'TemplateProcessing',
          'single': [{'SpecialToken': {'id': '<|im_start|>', 'type_id': 0}},
                     {'Sequence': {'id': 'A', 'type_id': 0}}],
          'pair': [{'Sequence': {'id': 'A', 'type_id': 0}},
                   {'Sequence': {'id': 'B', 'type_id': 0}}],
          'special_tokens': {'<|im_start|>': {
              'id': '<|im_start|>', 'ids': [TURN_START],
              'tokens': ['<|im_start|>']}}},
  }
  tokenizer = tokenizer_lib.load(tiny_bpe.write(tmp_path, content))
  for text, ids in GOLDEN.items():
    assert tokenizer.encode(text) == ids


def test_ordinary_ids_stand_for_whole_characters(tokenizer):
  ids = tokenizer.ordinary_ids().tolist()
  assert all('\ufffd' not in tokenizer.decode([i]) for i in ids)
  assert max(ids) < NUM_PIECES
  others = set(range(NUM_PIECES)) - set(ids)
  assert all('\ufffd' in tokenizer.decode([i]) for i in others)


@pytest.mark.parametrize('eos_token, generation, stop_ids, pad_id', [
    ('<|im_end|>', None, (TURN_END,), END_OF_TEXT),
    ('<|im_end|>', {'eos_token_id': [TURN_END, END_OF_TEXT]},
     (TURN_END, END_OF_TEXT), END_OF_TEXT),
    # A base model, which ends texts, still has to end turns.
    ('<|endoftext|>', {'eos_token_id': END_OF_TEXT},
     (TURN_END, END_OF_TEXT), END_OF_TEXT),
    ({'__type': 'AddedToken', 'content': '<|endoftext|>'}, {},
     (TURN_END, END_OF_TEXT), END_OF_TEXT),
    (None, {'eos_token_id': [3, TURN_END], 'pad_token_id': 5},
     (TURN_END, 3), 5),
    (None, {'eos_token_id': None}, (TURN_END,), TURN_END),
])
def test_stop_and_pad_ids_come_from_the_files(
    tmp_path, eos_token, generation, stop_ids, pad_id):
  pad_token = None if eos_token is None else '<|endoftext|>'
  tokenizer = tokenizer_lib.load(tiny_bpe.write(
      tmp_path, config={'eos_token': eos_token, 'pad_token': pad_token},
      generation_config=generation))
  assert tokenizer.stop_ids == stop_ids
  assert tokenizer.pad_id == pad_id


def test_tokenizer_json_alone_is_enough(tmp_path, directory):
  content = (directory / 'tokenizer.json').read_bytes()
  (tmp_path / 'tokenizer.json').write_bytes(content)
  tokenizer = tokenizer_lib.load(tmp_path)
  assert tokenizer.stop_ids == (TURN_END,)
  assert tokenizer.encode('你好') == GOLDEN['你好，世界！中文分词'][:2]


def test_a_sentencepiece_model_beside_it_counts(tmp_path):
  kept = tokenizer_lib.train(
      ['Some words. ' * 9], vocab_size=400, directory=tmp_path)
  tiny_bpe.write(tmp_path)
  loaded = tokenizer_lib.load(tmp_path)
  assert loaded.encode('Some words') == kept.encode('Some words')
  assert loaded.vocab_size == kept.vocab_size


def unigram(content):
  content['model'] = {
      'type': 'Unigram', 'unk_id': 0, 'vocab': [['<unk>', 0.0], ['a', -1.0]]}


def no_byte(content):
  vocab = content['model']['vocab']
  vocab['zzz'] = vocab.pop('ÿ')  # This byte occurs in no text.


def split_by_metaspace(content):
  content['pre_tokenizer'] = {
      'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'never',
      'split': False}


def prefixed(content):
  content['pre_tokenizer']['pretokenizers'][1]['add_prefix_space'] = True


def moved(content):
  content['added_tokens'][2]['id'] += 30


def without_turns(content):
  del content['added_tokens'][1:3]
  for i, token in enumerate(content['added_tokens']):
    token['id'] = NUM_PIECES + i


@pytest.mark.parametrize('damage, message', [
    (unigram, r"tokenizer\.json: model.type='Unigram' .*byte-level BPE"),
    (split_by_metaspace, r"model.type='BPE' .*\['Metaspace'\].*not supported"),
    (no_byte, r"tokenizer\.json lacks the pieces of 1 bytes, 'ÿ' first"),
    (prefixed, r'tokenizer\.json: pre_tokenizer add_prefix_space=true'),
    (moved, rf"'<\|im_end\|>' has id {TURN_END + 30}, but .* {TURN_END};"),
    (without_turns,
     r"added tokens lack \['<\|im_start\|>', '<\|im_end\|>'\] nor \['<｜begin"),
])
def test_a_file_that_cannot_be_used_is_refused(tmp_path, damage, message):
  content = tiny_bpe.content()
  damage(content)
  with pytest.raises(types.UserError, match=message) as error:
    tokenizer_lib.load(tiny_bpe.write(tmp_path, content))
  assert str(error.value).startswith(f'{tmp_path}: ')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('damage', [
    lambda b: b'', lambda b: b'{}', lambda b: b'[]', lambda b: b'\x80' + b,
    lambda b: b[:len(b) // 2], lambda b: b.replace(b'"vocab"', b'"vocap"'),
    lambda b: b.replace(b'The', b'T\xffe')])
def test_a_torn_file_is_refused(tmp_path, directory, damage):
  content = (directory / 'tokenizer.json').read_bytes()
  (tmp_path / 'tokenizer.json').write_bytes(damage(content))
  with pytest.raises(
      types.UserError, match=r'tokenizer\.json is not a .*download') as error:
    tokenizer_lib.load(tmp_path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('config, generation, message', [
    ({'eos_token': '</s>'}, None,
     r"tokenizer_config\.json: eos_token='</s>' is not among the added tok"),
    ({'pad_token': '[PAD]'}, None, r"pad_token='\[PAD\]' is not among"),
    ({'eos_token': 7}, None, r'tokenizer_config\.json: eos_token=7 is no tok'),
    ({}, {'eos_token_id': 151645},
     r'generation_config\.json: eos_token_id=151645 names no token .* to 425'),
    ({}, {'eos_token_id': [TURN_END, 426]},
     r'eos_token_id=\[422, 426\] names no'),
    ({}, {'eos_token_id': '<|im_end|>'}, r"eos_token_id='<\|im_end\|>' names"),
    ({}, {'pad_token_id': -1}, r'pad_token_id=-1 names no token'),
    ({}, [], r'generation_config\.json holds no JSON object'),
])
def test_files_that_do_not_belong_together_are_refused(
    tmp_path, config, generation, message):
  with pytest.raises(types.UserError, match=message) as error:
    tokenizer_lib.load(tiny_bpe.write(
        tmp_path, config=config, generation_config=generation))
  assert '\n' not in str(error.value)


def test_a_config_that_is_no_json_is_refused(tmp_path):
  tiny_bpe.write(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_bytes(b'{"eos')
  with pytest.raises(
      types.UserError, match=r'tokenizer_config\.json is no JSON'):
    tokenizer_lib.load(tmp_path)


def test_no_tokenizer_at_all_is_reported(tmp_path):
  with pytest.raises(
      types.UserError, match=r'no tokenizer\.model .* no tokenizer\.json'):
    tokenizer_lib.load(tmp_path)

"""A byte-level BPE tokenizer in the manner of Qwen, trained on the spot.

`write` makes the files of a model directory. Run as a program it writes the
golden ids again, as `transformers` gives them:

  python -m tests.tiny_bpe
"""

import functools
import json
import pathlib
import tempfile

import tokenizers
from tokenizers import (
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

GOLDEN_FILE = pathlib.Path(__file__).parent / 'testdata' / 'tiny_bpe_ids.json'

# Ids 0 to 419 are pieces; special tokens follow, as in Qwen's files.
NUM_PIECES = 420
QWEN3 = {
    # Name: whether it is flagged special.
    '<|endoftext|>': True, '<|im_start|>': True, '<|im_end|>': True,
    '<tool_call>': False, '<think>': False, '</think>': False,
}
QWEN2 = {k: v for k, v in QWEN3.items() if 'think' not in k}
R1_DISTILL = {
    '<｜end▁of▁sentence｜>': True, '<｜User｜>': False,
    '<｜Assistant｜>': False, '<｜begin▁of▁sentence｜>': True,
    '<think>': False, '</think>': False,
}

CORPUS = [
    'user\n\nThe mayor of Oslo met Ada in 1984\n\n'
    'She paid 12.5% of 1,300 crowns. ',
    'def area(width, height=2):\n\treturn width * height\r\n    # done\n',
    "It's what they've said: the user asked, the assistant answered.\n\n",
    'Él dijo: «¿dónde está?» 中文分词很有趣。你好，世界！ '
    '😀👩\u200d🚀 привет мир ',
] * 8

TEXTS = [
    '', ' ', '  ', '\n', '\n\n', '\r\n', '\t', ' \t \n \r\n  x', '    a   b  ',
    'a', 'The mayor of Oslo', ' The mayor', "They've said it's 'quoted' I'LL",
    '1984', '12.5% of 1,300', '٣٤٥ ½ Ⅷ',
    'def area(width):\n\tif x:\n\t\treturn  x\n\n\n', 'a\r\nb\rc\n\r',
    'for(i=0;i<n;++i){a[i]+=b->c;}//!?', '你好，世界！中文分词',
    '日本語とカナ 한국어', 'привет мир', 'שלום עולם',
    'مرحبا بالعالم \u200fabc\u200e', '\u00e9', 'e\u0301', 'o\u0308\u0323',
    '\u0301', '\u00c5 \u212b A\u030a', 'ﬁ ﬀ ①', '😀',
    '👩\u200d🚀👨\u200d👩\u200d👧\u200d👦', '👍🏽🇳🇴', '\0', 'a\0b\x7f\x1b[0m',
    '\ufeffbom\ufffd', '\u00a0\u3000\u2028x',
    'zero\u200bwidth\u200d', '\U0010ffff𝔘𝕟𝕚', 'x' * 300, 'ab' * 100 + '你' * 50,
    '- ' * 40, '<think>', '</think>', 'so</think>\n\nThe answer',
    '<|im_end|>\n<|im_start|>assistant\n', '<|endoftext|>', '<tool_call>{}',
    '<|im_end', '< think >', 'Ġ▁Ċ',
]


@functools.cache
def _trained() -> tokenizers.Tokenizer:
  """The pieces; equal versions of the library give equal pieces."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(
          tokenizers.Regex('|'.join([
              "(?i:'[stmd]|'re|'ve|'ll)",  # English contractions
              r'[^\p{L}\p{N}\r\n]?\p{L}+',  # a word and what is before it
              r'\p{N}',  # digits one by one
              r' ?[^\p{L}\p{N}\s]+[\n\r]*',  # punctuation
              r'\s*[\n\r]+',  # line breaks
              r'\s+(?!\S)',  # blanks, but for the last before a word
              r'\s+',
          ])), behavior='isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
      vocab_size=NUM_PIECES, show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return tokenizer


def content(special: dict[str, bool] = QWEN3) -> dict:
  """What tokenizer.json holds."""
  tokenizer = tokenizers.Tokenizer.from_str(_trained().to_str())
  for name, is_special in special.items():
    token = tokenizers.AddedToken(
        name, special=is_special, normalized=False)
    tokenizer.add_tokens([token])
  return json.loads(tokenizer.to_str())


def write(
    directory: pathlib.Path,
    tokenizer_json: dict | None = None,
    *,
    config: dict | None = None,
    generation_config: dict | None = None,
) -> pathlib.Path:
  """Writes the files a model directory has; returns the directory."""
  directory.mkdir(parents=True, exist_ok=True)
  for name, value in {
      'tokenizer.json': tokenizer_json or content(),
      'tokenizer_config.json': {
          'tokenizer_class': 'PreTrainedTokenizerFast',
          'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>',
          'clean_up_tokenization_spaces': False,
      } if config is None else config,
      'generation_config.json': generation_config,
  }.items():
    if value is not None:
      (directory / name).write_text(json.dumps(value), encoding='utf-8')
  return directory


def transformers_ids(directory: pathlib.Path, texts: list[str]) -> list:
  """What `transformers` makes of plain text that holds no special tokens.

  For the sake of texts that spell them out, all of them are flagged special:
  `split_special_tokens` concerns no others.
  """
  import transformers  # Not everybody has it.

  flagged = write(directory, content(dict.fromkeys(QWEN3, True)))
  reference = transformers.AutoTokenizer.from_pretrained(flagged)
  return [
      reference.encode(
          text, add_special_tokens=False, split_special_tokens=True)
      for text in texts]


if __name__ == '__main__':
  with tempfile.TemporaryDirectory() as folder:
    found = transformers_ids(pathlib.Path(folder), TEXTS)
  lines = [
      f'{json.dumps(text)}: {json.dumps(ids)}'
      for text, ids in zip(TEXTS, found, strict=True)]
  GOLDEN_FILE.write_text('{\n' + ',\n'.join(lines) + '\n}\n')

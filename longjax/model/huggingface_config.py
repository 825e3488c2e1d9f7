"""Our ModelConfig and Hugging Face's config.json, in one table.

Also the tokenizer's files, which travel along unread.
"""

import json
import os
import pathlib
import shutil
from typing import Any

from longjax import types
from longjax.model import architecture

# config.json field -> (ModelConfig field, type).
_CONFIG_FIELDS: dict[str, tuple[str, type]] = {
    'vocab_size': ('vocab_size', int),
    'hidden_size': ('embed_dim', int),
    'intermediate_size': ('ffn_dim', int),
    'num_hidden_layers': ('num_layers', int),
    'num_attention_heads': ('num_heads', int),
    'num_key_value_heads': ('num_kv_heads', int),
    'head_dim': ('head_dim', int),
    'rope_theta': ('rope_theta', float),
    'rms_norm_eps': ('norm_epsilon', float),
    'tie_word_embeddings': ('tied_embeddings', bool),
}

# The only values of these fields that the network implements.
_IMPLEMENTED: dict[str, Any] = {
    'model_type': 'qwen3',
    'hidden_act': 'silu',
    'attention_bias': False,
    'rope_scaling': None,
    'use_sliding_window': False,
    'quantization_config': None,
}

_TOKENIZER_FILES = (
    'tokenizer.model', 'tokenizer.json', 'tokenizer_config.json',
    'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
    'chat_template.jinja',
)

# Rotary positions have no end of their own, but inference engines refuse
# inputs beyond what config.json names.
_MAX_POSITION = 262_144


def load(directory: str | os.PathLike) -> architecture.ModelConfig:
  """Reads config.json; UserError names a field that is missing or unknown."""
  path = pathlib.Path(directory) / 'config.json'
  content = read_json(path)
  rope = content.get('rope_parameters')
  if isinstance(rope, dict):  # How newer files write rope_theta.
    content.setdefault('rope_theta', rope.get('rope_theta'))
    if rope.get('rope_type', 'default') != 'default':
      content['rope_scaling'] = rope
  for name, value in _IMPLEMENTED.items():
    found = content.get(name, None if name == 'model_type' else value)
    if found != value:
      raise types.UserError(
          f'{path}: {name}={found!r} is not supported, only {value!r}.')
  kwargs: dict[str, Any] = {}
  for name, (ours, kind) in _CONFIG_FIELDS.items():
    value = content.get(name)
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind:
      raise types.UserError(
          f'{path}: {name}={value!r} must be given, as {kind.__name__}.')
    kwargs[ours] = value
  return architecture.ModelConfig(**kwargs)


def fields(config: architecture.ModelConfig) -> dict[str, Any]:
  """The content of config.json."""
  return {
      'architectures': ['Qwen3ForCausalLM'],
      'attention_dropout': 0.0,
      'max_position_embeddings': _MAX_POSITION,
      **{k: v for k, v in _IMPLEMENTED.items() if v is not None},
      **{k: getattr(config, ours) for k, (ours, _) in _CONFIG_FIELDS.items()},
  }


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; UserError names the file that has none."""
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise types.UserError(
        f'cannot read {path}: {error}; is it a Qwen3 checkpoint?') from error
  if not isinstance(content, dict):
    raise types.UserError(f'{path} holds no JSON object.')
  return content


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes a JSON object with sorted keys."""
  path.write_text(
      json.dumps(content, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies tokenizer files; UserError if `source` has none."""
  found = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
  if not found:
    raise types.UserError(
        f'tokenizer_directory={source} holds no tokenizer files '
        f'({", ".join(_TOKENIZER_FILES[:3])}, ...).')
  for name in found:
    shutil.copyfile(source / name, target / name)

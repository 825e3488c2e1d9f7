"""Writes a trained checkpoint as a Hugging Face directory, in any dtype.

  python -m longjax --config=configs/convert.py \
      --config.source=runs/tiny --config.output=/tmp/tiny_hf

`source` is a work directory (its newest checkpoint), one of its checkpoints
(runs/tiny/checkpoints/300) or a Hugging Face directory, which is written in
another dtype or in other files: --config.dtype=bfloat16,
--config.max_file_bytes=2000000000. `output` is a directory to make;
transformers loads it.

Nothing has to be converted to begin with: `init_from` of every other config
reads a Hugging Face directory as it was downloaded.

Hardware: devices that hold the model once in the dtype written; on a CPU that
is host memory. Beyond it the host needs less than 2 GB.
Time: seconds for the tiny model, otherwise what reading and writing the files
takes.
Score: none; a round trip gives the same bits.
"""

from ml_collections import config_dict

from longjax import types


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """The conversion; it has no variants."""
  if arg:
    raise types.UserError(f'configs/convert.py has no variant {arg!r}.')
  return config_dict.ConfigDict({'job': 'convert'})

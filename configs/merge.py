"""Merges what several models learnt from one base into one model, by SCE.

  python -m longjax --config=configs/merge.py \
      --config.base=runs/base/model \
      --config.experts=runs/full_context,runs/memory \
      --config.output=runs/merged

`base` is the model that RL began from; `experts` are models trained from it,
perhaps one from the other. Each is a work directory (its newest checkpoint),
one of its checkpoints (runs/memory/checkpoints/300) or a Hugging Face
directory. `output` is a Hugging Face directory to make: `init_from` of the
next stage's config, and `transformers`, read it.

By default every change of an expert takes part, weighted in each matrix by its
mean square. --config.merge.density=0.1 takes only the tenth in which the
experts differ most, and resets the rest to the base; not for experts trained
one from the other, unless --config.merge.select=coef_only.
--config.merge.method=linear or ties, with --config.merge.weights=0.7,0.3, are
what to compare with.

The tensors have the base's dtype. Changes of RL are small: bfloat16 rounds
most of them away, so --config.dtype=float32 if training goes on.

Hardware: any host; no devices are needed. Of Hugging Face directories it holds
one tensor of each at a time: 1.4 GB for Qwen3-0.6B in bfloat16, 2.3 GB with a
density below 1. Of checkpoints it holds one parameter, all its layers.
Time: 19 s for Qwen3-0.6B on one core of an Intel Xeon, 33 s with a density
below 1, and as much more for a larger model as it has parameters.
Score: none; what QwenLong-L1.5 reports of its merge is 71.2 on average over
its benchmarks, and 21.7 on MRCR beyond 512K tokens, where the experts had 71.6
and 12.7 (full context), 68.5 and 20.3 (memory).
"""

from ml_collections import config_dict

from longjax import types


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """The merge; it has no variants."""
  if arg:
    raise types.UserError(f'configs/merge.py has no variant {arg!r}.')
  return config_dict.ConfigDict({'job': 'merge'})

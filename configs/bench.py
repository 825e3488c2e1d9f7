"""Measures this machine: prefill, decode, score and update on random tokens.

  python -m longjax --config=configs/bench.py          cpu: a small Qwen3
  python -m longjax --config=configs/bench.py:gpu      Qwen3-1.7B on one GPU
  python -m longjax --config=configs/bench.py:tpu      Qwen3-1.7B on a slice

prints tables and writes bench.json to the work directory. Every program runs
with prompts *shared* by their samples and *unshared*, each sample behind a copy
of its own, in turn; tokens and operations count each prompt once. The first
lines say which peak rates are assumed; --config.peak_tflops and
--config.peak_gb_per_second set others. On a slice of several hosts the same
command with --distributed runs on each.

Hardware: cpu two cores, gpu one of 80 GB or more, tpu four chips or more of
16 GB or more (prompts and rows grow with the slice).
Time: cpu 4 min 17 s on two cores that do nothing else; gpu and tpu have
not been run yet.
Score: what sharing gains, in the second table. On two idle CPU cores,
at G=8: an update of 1K + 128 tokens 3.9 times (104% of the ratio of
operations), of 4K + 128 tokens 5.8 times (98%), prefill of 1K 8.4 times,
64 tokens of decoding behind 4K 2.7 times, behind 16K 3.8 times.
"""

from ml_collections import config_dict

from longjax import types

VARIANTS = ('cpu', 'gpu', 'tpu')


def _only_shared(program, prompt_len, **facts):
  return dict(
      program=program, prompt_len=prompt_len, variants=('shared',), **facts)


def _both(program, prompt_len, response_len, **facts):
  return dict(
      program=program, prompt_len=prompt_len, response_len=response_len,
      **facts)


def _row(program, length, **facts):
  """One sequence of which all is trained."""
  return _only_shared(
      program, 2, num_prompts=1, num_samples=1, response_len=length - 1,
      **facts)


# The sampler reuses whole chunks of a prompt: those of `decode` have one token
# more than chunks, which the samples begin with.
def _cpu() -> dict[str, dict]:
  two = dict(num_prompts=2)
  return dict(
      prefill_1k=_both('prefill', 1024, 1, **two),
      prefill_4k=_only_shared('prefill', 4096, **two),
      decode_4k=_both('decode', 4097, 64, **two),
      decode_16k=_both('decode', 16_385, 64, repeats=2, **two),
      score_1k=_both('score', 1024, 128, shortest_response=32, **two),
      update_1k=_both('update', 1024, 128, **two),
      update_4k=_both('update', 4096, 128, repeats=2, **two),
      gap_1k=_only_shared('gap', 1024, response_len=64, repeats=1, **two))


def _gpu() -> dict[str, dict]:
  one = dict(num_prompts=1)
  lengths = (8192, 32_768, 131_072)
  # Blockwise, one step of its loop is one pair of short blocks: at 128K there
  # are two million.
  backends = {8192: ('auto', 'blockwise', 'cudnn'), 32_768: ('auto', 'cudnn'),
              131_072: ('auto', 'cudnn')}
  return dict(
      parity=dict(program='parity', length=1024),
      **{f'attention_{n // 1024}k': dict(
          program='attention', length=n, backends=backends[n])
         for n in lengths},
      **{f'update_{n // 1024}k': _row('update', n) for n in lengths},
      score_32k=_row('score', 32_768),
      # Fewer layers: the unshared rows of all would take minutes a run.
      update_60k_6k=_both(
          'update', 61_440, 6144, num_layers=7, repeats=2, **one),
      prefill_32k=_only_shared('prefill', 32_768, **one),
      decode_4k=_both('decode', 4097, 128, num_prompts=8),
      decode_32k=_only_shared(
          'decode', 32_769, response_len=128, num_prompts=8),
      gap_4k=_only_shared(
          'gap', 4096, response_len=256, num_prompts=2, repeats=1))


def _tpu() -> dict[str, dict]:
  return dict(
      parity=dict(program='parity', length=1024),
      attention_8k=dict(program='attention', length=8192),
      attention_32k=dict(program='attention', length=32_768),
      prefill_8k=_only_shared('prefill', 8192),
      decode_8k=_both('decode', 8193, 128),
      score_8k=_both('score', 8192, 512),
      update_8k=_both('update', 8192, 512),
      update_32k=_only_shared('update', 28_672, response_len=512),
      gap_4k=_only_shared('gap', 4096, response_len=256, repeats=1))


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """A suite; see above."""
  suite = arg or 'cpu'
  if suite not in VARIANTS:
    raise types.UserError(
        f'configs/bench.py has no variant {arg!r}; use one of '
        f'{", ".join(VARIANTS)}.')
  config = config_dict.ConfigDict()
  config.job = 'bench'
  config.suite = suite
  config.cases = dict(cpu=_cpu, gpu=_gpu, tpu=_tpu)[suite]()
  if suite == 'cpu':
    config.cpu_devices = 2
    # Faster than to keep all: fresh memory costs a CPU more than to compute.
    config.compute = dict(remat='attention')
    config.model = dict(
        vocab_size=4096, embed_dim=256, ffn_dim=768, num_layers=4, num_heads=8,
        num_kv_heads=4, head_dim=32, rope_theta=1e6)
    return config
  config.model = dict(
      vocab_size=151_936, embed_dim=2048, ffn_dim=6144, num_layers=28,
      num_heads=16, num_kv_heads=8, head_dim=128, rope_theta=1e6,
      tied_embeddings=True)
  config.compute = dict(dtype='bfloat16', remat='block')
  if suite == 'tpu':
    config.mesh = dict(data=1, fsdp=-1)
  return config

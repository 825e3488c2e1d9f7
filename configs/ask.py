"""Asks about documents of any length.

  python -m longjax --config=configs/ask.py \
      --ask.model=runs/tiny --ask.documents='texts/*.txt' \
      --ask.question='Who signed the treaty?'

`model` is a Hugging Face directory as it was downloaded, the work directory of
a run (its newest checkpoint) or one of its checkpoints. `documents` are files
or globs ('**' is any folders) with commas between them: .jsonl is read as an
object a line ({"text": ..}, {"title": .., "text": ..} or {"documents": [..]}),
everything else as UTF-8 text (.txt, .md, .py). The flags --ask.documents and
--ask.question may be repeated; all questions are asked about a part before the
next one is read. --ask.KEY=VALUE is --config.KEY=VALUE.

What fits into the window of the model (its config.json, or --ask.window) is
read whole, what does not is read by the memory agent, part by part:
--ask.mode=whole or memory decides otherwise. --ask.each_file reads every file
as a document of its own. --ask.split=model lets the model tell what a question
asks from what it says about the form of the answer. The answer goes to standard
output, followed by the places that the memory's sentences came from;
--ask.show_thinking shows what precedes an answer, --ask.show_memory the memory
after every part.

Inquiries are kept in --workdir (default runs/ask), each in a folder named by
a hash of the model, the documents, the questions and the settings. One that
was killed goes on after its last part with the same bits when the same command
is given again, one that is finished shows its answer again.

  tiny  parts and memory of the tiny model's size, on a laptop

Hardware: memory for the model and for a prompt of the window for each question;
it does not grow with the documents. The tiny base model held 670 MiB of host
memory and 9 MiB of arrays after an eighth, a half and all of 256K, 1M and 4M
tokens (python -m tests.ask.flat_memory 262144 1048576 4194304).
Time: grows with the number of parts: there, with responses of 32 tokens, 1 min,
3 min and 11 min on two busy cores.
Score: none of its own; evaluations with a `memory` score the same agent.
"""

from ml_collections import config_dict

from longjax import types

VARIANTS = ('tiny',)


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """An inquiry; see above."""
  if arg and arg not in VARIANTS:
    raise types.UserError(
        f'configs/ask.py has no variant {arg!r}; use one of '
        f'{", ".join(VARIANTS)}.')
  config = config_dict.ConfigDict({'job': 'ask'})
  # What Qwen3 advises for thinking.
  config.sampler = dict(
      temperature=0.6, top_p=0.95, top_k=20, max_response_len=8192)
  if arg == 'tiny':
    config.model = 'configs/tiny_base'
    config.window = 4096
    config.memory = dict(
        part_len=2048, memory_len=256, plan_len=32, wording='short')
    config.sampler = dict(temperature=0.0, max_response_len=320)
  return config

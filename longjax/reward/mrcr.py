"""Multi-round co-reference: how closely an earlier reply is repeated.

The dense reward of dialogue memory, as in the openai/mrcr benchmark: a required
random prefix proves that the instruction was read, and the rest is compared
character by character.
"""

import difflib

MAX_CHARS = 20_000


def similarity(response: str, gold: str, *, required_prefix: str = '') -> float:
  """Ratio of matching characters, in [0, 1].

  `difflib.SequenceMatcher` keeps its `autojunk` heuristic, which changes scores
  of texts over 200 characters, for parity with the benchmark. Both texts are
  cut at 20,000 characters, since the comparison is quadratic.

  Args:
    response: the whole text after thinking.
    gold: the reply to be repeated, with or without the prefix.
    required_prefix: what the response must begin with; '' asks for none.

  Returns:
    The ratio; 0 without the prefix or if nothing follows it.
  """
  if not response.startswith(required_prefix):
    return 0.0
  response = response.removeprefix(required_prefix)[:MAX_CHARS]
  gold = gold.removeprefix(required_prefix)[:MAX_CHARS]
  if not response or not gold:
    return 0.0
  return difflib.SequenceMatcher(None, response, gold).ratio()

"""Dialogue memory: which of several identical requests got which reply.

After MRCR (multi-round coreference resolution): a user asks for many small
texts by form and topic; one request occurs two or three times. The k-th reply
must be repeated word for word after a random prefix, so a response cannot
score by being generally similar.
"""

import random
from collections.abc import Iterator

from longjax import types
from longjax.synthesis import distractors
from longjax.synthesis import world as world_lib

ORDINALS = ('first', 'second', 'third', 'fourth')
FORMS = ('poem', 'song', 'note', 'tale', 'joke', 'speech')
TOPICS = (
    'rain', 'snow', 'bread', 'tea', 'ships', 'birds', 'stones', 'clocks',
    'bees', 'fire', 'roads', 'moons', 'wolves', 'salt', 'gloves', 'trees')
_ADJECTIVES = (
    'cold', 'old', 'warm', 'small', 'grey', 'loud', 'soft', 'wild', 'dark',
    'bright', 'slow', 'tall')
_NOUNS = (
    'rivers', 'lamps', 'hills', 'horses', 'drums', 'clouds', 'sailors',
    'doors', 'fields', 'kings', 'bells', 'leaves', 'boats', 'towers')
_VERBS = (
    'carry', 'follow', 'hide', 'find', 'watch', 'paint', 'lift', 'guard',
    'call', 'miss', 'hold', 'chase')
_LINKS = ('near', 'under', 'before', 'behind', 'above')


def _reply(rng: random.Random) -> str:
  """A sentence of five, six, eight or nine words."""
  words = [rng.choice(_ADJECTIVES), rng.choice(_NOUNS), rng.choice(_VERBS),
           rng.choice(_ADJECTIVES), rng.choice(_NOUNS)]
  if rng.random() < 0.5:
    words += [rng.choice(_LINKS), rng.choice(_ADJECTIVES), rng.choice(_NOUNS)]
  if rng.random() < 0.5:
    words.append('again')
  return ' '.join(words).capitalize() + '.'


def _request(form: str, topic: str) -> str:
  return f'Write a {form} about {topic}.'


def _exchange(rng: random.Random, request: str) -> str:
  return f'User: {request}\nBot: {_reply(rng)}'


def _chat(exchanges: list[str]) -> types.Document:
  return types.Document(title='Chat', text='\n'.join(exchanges))


def _other_requests(
    rng: random.Random, form: str, topic: str
) -> Iterator[str]:
  """Requests that share the form, the topic or neither, never both."""
  while True:
    other = (rng.choice(FORMS), rng.choice(TOPICS))
    kept = rng.random()
    if kept < 0.3:
      other = (form, other[1])
    elif kept < 0.5:
      other = (other[0], topic)
    if other != (form, topic):
      yield _request(*other)


def _other_chats(
    rng: random.Random, requests: Iterator[str]
) -> Iterator[types.Document]:
  while True:
    yield _chat(
        [_exchange(rng, next(requests)) for _ in range(rng.randint(1, 3))])


def generate(
    world: world_lib.World,
    *,
    example_id: str,
    prefix_len: int = 4,
    repeats_max: int = 3,
) -> distractors.Draft:
  """Asks for the k-th reply to a request made two or more times.

  Args:
    world: source of randomness and of the prefix.
    example_id: id of the example.
    prefix_len: characters of the required prefix (MRCR publishes 10).
    repeats_max: most identical requests, at least 2.
  """
  rng = world.rng
  form, topic = rng.choice(FORMS), rng.choice(TOPICS)
  request = _request(form, topic)
  others = _other_requests(rng, form, topic)
  matches: list[str] = []
  documents = []
  for _ in range(rng.randint(2, repeats_max)):
    match = _exchange(rng, request)
    # Equal replies would make two of the answers indistinguishable.
    while match in matches:
      match = _exchange(rng, request)
    matches.append(match)
    chat = [match] + [_exchange(rng, next(others))
                      for _ in range(rng.randint(1, 2))]
    rng.shuffle(chat)
    documents.append(_chat(chat))
  asked = rng.randrange(len(matches))
  replies = [match.split('\nBot: ')[1] for match in matches[:asked + 1]]
  prefix = world.code(prefix_len)
  reasoning = ' '.join(
      f'{ordinal.capitalize()}: {reply}'
      for ordinal, reply in zip(ORDINALS, replies, strict=False))
  example = types.TaskExample(
      id=example_id,
      task='dialogue',
      kind='mrcr',
      documents=tuple(documents),
      question=f'Repeat the {ORDINALS[asked]} reply to: {request}',
      instruction=f'Begin with {prefix}.',
      answers=(f'{prefix} {replies[-1]}',),
      evidence=world_lib.locate(documents, matches[:asked + 1]),
      reasoning=reasoning,
      hops=asked + 1,
      meta={
          'required_prefix': prefix,
          distractors.PROTECTED: f'{form} about {topic}',
      },
  )
  return distractors.Draft(
      example=example, distractors=_other_chats(rng, others))

"""Context extension."""

import dataclasses
import itertools
import random
import time

import pytest

from longjax import types
from longjax.data import chat
from longjax.data import tokenizer as tokenizer_lib
from longjax.synthesis import (
    dialogue,
    distractors,
    keychain,
    knowledge_graph,
    verify,
)
from longjax.synthesis import world as world_lib


def count_tokens(text):
  return len(text.split())


def draft(generate=knowledge_graph.generate, seed=0):
  world = world_lib.World('train', random.Random(seed))
  return generate(world, example_id=f'x-{seed}')


def extended(made, target_tokens, seed=0, stream=None):
  return distractors.extend(
      made.example, made.distractors if stream is None else stream,
      target_tokens=target_tokens, count_tokens=count_tokens,
      rng=random.Random(seed))


@pytest.mark.parametrize('generate', [
    knowledge_graph.generate, keychain.generate, dialogue.generate])
@pytest.mark.parametrize('target_tokens', [150, 400, 2000, 20000])
def test_the_target_is_reached_and_never_exceeded(generate, target_tokens):
  example = extended(draft(generate), target_tokens)
  used = distractors.context_tokens(example, count_tokens)
  largest = max(count_tokens(distractors.render_document(d))
                for d in example.documents)
  assert target_tokens - largest < used <= target_tokens
  assert not verify.problems(example)


@pytest.mark.parametrize('generate', [
    knowledge_graph.generate, dialogue.generate])
def test_lengths_are_measured_on_the_text_of_the_prompt(generate, tmp_path):
  example = extended(draft(generate), 200)
  tokenizer = tokenizer_lib.train(
      map(distractors.render_document, example.documents), vocab_size=360,
      directory=tmp_path)
  for document in example.documents:
    text = distractors.render_document(document)
    assert chat.document_tokens(document, tokenizer) == tokenizer.encode(text)
  asked = tokenizer.encode(distractors.render_question(example))
  assert chat.question_tokens(example, tokenizer)[:len(asked)] == asked
  turn = chat.render_prompt(
      dataclasses.replace(example, documents=(), question='', instruction=''),
      tokenizer)
  # The line break before the question is counted with it.
  assert len(chat.render_prompt(example, tokenizer)) == (
      distractors.context_tokens(example, lambda t: len(tokenizer.encode(t)))
      + len(turn) - len(tokenizer.encode('\n')))


def test_a_target_below_the_core_adds_nothing():
  made = draft()
  example = extended(made, 10)
  assert sorted(d.title for d in example.documents) == sorted(
      d.title for d in made.example.documents)
  assert not verify.problems(example)


def test_spans_move_with_their_documents():
  made = draft()
  quotes = [made.example.documents[s.document].text[s.start:s.end]
            for s in made.example.evidence]
  for seed in range(20):
    example = extended(made, 600, seed=seed)
    assert quotes == [example.documents[s.document].text[s.start:s.end]
                      for s in example.evidence]


def test_evidence_is_as_likely_in_every_quarter_of_the_context():
  quarters = [0] * 4
  for seed in range(400):
    example = extended(draft(seed=seed), 800, seed=seed)
    place = example.evidence[0].document / len(example.documents)
    quarters[int(4 * place)] += 1
    assert 0.0 < float(example.meta['depth']) < 1.0
    assert float(example.meta['scope']) < float(example.meta['diffusion'])
  assert min(quarters) > 70 and max(quarters) < 130  # Mean 100, sigma 9.


def test_conversations_keep_their_order():
  for seed in range(30):
    made = draft(dialogue.generate, seed)
    example = extended(made, 500, seed=seed)
    own = [d.text for d in made.example.documents]
    assert own == [d.text for d in example.documents if d.text in own]


def test_distractors_with_the_gold_or_a_path_entity_are_passed_over():
  made = draft()
  gold = made.example.answers[0]
  bridge = made.example.meta[distractors.PROTECTED].split('\n')[1]
  relation = made.example.question.split()[3]
  bad = [
      types.Document(title='Gossip', text=f'The rival of Tolken is {gold}.'),
      types.Document(title='Rumor',
                     text=f'The {relation} of {bridge} is Tolken.'),
      types.Document(title=made.example.documents[0].title, text='Nothing.'),
  ]
  good = types.Document(title='Tolken', text='The pet of Tolken is owl.')
  example = extended(made, 10**6, stream=[*bad, good])
  added = [d for d in example.documents if d not in made.example.documents]
  assert added == [good]
  # The rumor would have changed what the query gives.
  texts = [d.text for d in (*example.documents, bad[1])]
  assert verify.answer(made.example, texts) != {gold}


def test_names_that_only_contain_the_gold_do_not_count_as_it():
  made = draft()
  gold = made.example.answers[0]
  other = types.Document(title='Other', text=f'The pet of {gold}us is cat.')
  example = extended(made, 10**6, stream=[other])
  assert other in example.documents


def test_a_stream_of_unusable_documents_ends():
  made = draft()
  clone = made.example.documents[0]
  example = extended(made, 10**4, stream=itertools.repeat(clone))
  assert len(example.documents) == len(made.example.documents)


def test_time_is_linear_in_the_target():
  def seconds(target_tokens):
    made = draft()
    start = time.process_time()
    extended(made, target_tokens)
    return time.process_time() - start

  seconds(1000)
  # Quadratic time would take 100 times as long for ten times the length.
  assert seconds(100_000) < 40 * max(seconds(10_000), 0.01)

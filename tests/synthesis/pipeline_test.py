"""All tasks through the whole pipeline, judged by independent readers."""

import collections
import dataclasses
import functools
import itertools
import re
import sqlite3

import pytest

from longjax import types
from longjax.reward import hybrid
from longjax.synthesis import distractors, names, pipeline, verify

CONFIG = pipeline.SynthConfig(
    numeric_operations=('total', 'difference', 'count', 'most'))


def count_tokens(text):
  return len(re.findall(r'[A-Za-z]+|\d|[^\w\s]|\n', text))


@functools.cache
def examples(names_of='train', num_per_task=300, seed=0, config=CONFIG):
  split = pipeline.SplitConfig(
      name='some', names=names_of, num_per_task=num_per_task, min_tokens=100,
      max_tokens=500)
  return tuple(pipeline.synthesize(
      split, config=config, seed=seed, count_tokens=count_tokens))


def of_task(task, **kwargs):
  return [e for e in examples(**kwargs) if e.task == task]


def words(example):
  texts = [example.question, example.instruction]
  texts += [f'{d.title} {d.text}' for d in example.documents]
  return re.findall(r'\w+', ' '.join(texts))


@pytest.mark.parametrize('task', pipeline.TASKS)
def test_the_oracle_answers_every_example_from_the_whole_context(task):
  found = of_task(task)
  assert len(found) == 300
  for example in found:
    texts = [document.text for document in example.documents]
    assert verify.answer(example, texts) == {example.answers[0]}, example.id
    assert not verify.problems(example)


@pytest.mark.parametrize('task', pipeline.TASKS)
def test_evidence_suffices_and_no_document_of_it_can_be_spared(task):
  for example in of_task(task):
    quotes = [example.documents[s.document].text[s.start:s.end]
              for s in example.evidence]
    assert verify.answer(example, quotes) == {example.answers[0]}
    for missing in {span.document for span in example.evidence}:
      kept = [document.text for index, document
              in enumerate(example.documents) if index != missing]
      assert verify.answer(example, kept) != {example.answers[0]}, example.id


@pytest.mark.parametrize('task', pipeline.TASKS)
def test_spans_are_whole_sentences_that_the_reasoning_quotes(task):
  for example in of_task(task):
    assert example.evidence and len(example.evidence) >= example.hops
    for span in example.evidence:
      text = example.documents[span.document].text
      quote = text[span.start:span.end]
      assert quote[-1] in '.?' and quote[0].isupper()
      assert span.start == 0 or text[span.start - 1] in ' \n'
      assert span.end == len(text) or text[span.end] in ' \n'
      assert quote.split('\nBot: ')[-1] in example.reasoning


def test_the_reasoning_ends_in_the_answer_and_stays_short():
  for example in examples():
    gold = example.answers[0].removeprefix(
        example.meta.get('required_prefix', '')).strip()
    last = re.findall(r'\w+', gold)[-1]
    assert re.findall(r'\w+', example.reasoning)[-1] == last, example.id
    assert count_tokens(example.reasoning) <= 60


def test_the_reward_accepts_the_gold_answer_and_rejects_a_distractor():
  pools = collections.defaultdict(list)
  for example in examples():
    pools[example.task].append(example)
  for pool in pools.values():
    for example, other in itertools.pairwise(pool[:50]):
      cue = '' if example.kind == 'mrcr' else 'The answer is '
      good = f'{example.reasoning}</think>{cue}{example.answers[0]}'
      assert hybrid.score(example, good).reward == 1.0
      if other.answers[0] != example.answers[0]:
        bad = f'{other.reasoning}</think>{cue}{other.answers[0]}'
        assert hybrid.score(example, bad).reward < 1.0


def test_examples_depend_on_seed_split_and_number_alone():
  assert examples.__wrapped__(num_per_task=5) == examples()[:30]
  assert examples.__wrapped__(num_per_task=5, seed=1) != examples()[:30]
  alone = dataclasses.replace(CONFIG, tasks=('numeric',))
  assert list(examples(num_per_task=5, config=alone)) == of_task(
      'numeric')[:5]


def test_name_spaces_are_disjoint_and_nothing_leaks_between_splits():
  invented = {}
  for split in names.SPLITS:
    seen = {word for example in examples(names_of=split, num_per_task=40)
            for word in words(example)}
    # Invented: long capitalised names and mixed codes.
    invented[split] = {
        word for word in seen
        if re.fullmatch('[BDFGHKLMPRTV][aeio][lrn][a-z]{2,}(n|s|th)', word)
        or (re.search('[0-9]', word) and re.search('[a-f]', word))}
    assert len(invented[split]) > 300
    assert {names.split_of(word) for word in invented[split]} == {split}
  assert not invented['train'] & (invented['validation'] | invented['test'])


def test_ids_are_unique_and_name_task_split_and_number():
  ids = [example.id for example in examples()]
  assert len(set(ids)) == len(ids)
  assert ids[:2] == ['mc-some-000000', 'multihop-some-000000']


def test_no_question_comes_twice():
  asked = [(e.question, e.answers) for e in examples()]
  assert len(set(asked)) == len(asked)


@pytest.mark.parametrize('task', pipeline.TASKS)
def test_lengths_keep_the_cap_and_are_spread_log_uniformly(task):
  lengths = [distractors.context_tokens(e, count_tokens)
             for e in of_task(task)]
  assert max(lengths) <= 500
  # Above the longest core the law is log-uniform: as many between 240 and
  # 346 as between 346 and 500, give or take a document.
  low = sum(240 <= n < 346 for n in lengths)
  high = sum(346 <= n <= 500 for n in lengths)
  assert 0.6 < low / high < 1.9


def test_numeric_golds_are_what_sqlite_computes_from_the_rendered_text():
  pattern = re.compile(
      r'(?:The (badge) of (\w+) is (\w+)\.)|(?:(\w+) holds (\d+) (\w+)\.)')
  operations = collections.Counter()
  for example in of_task('numeric'):
    rows = []
    for document in example.documents:
      for relation, name, word, holder, number, item in pattern.findall(
          document.text):
        rows.append((name, relation, word) if relation else
                    (holder, item, int(number)))
    table = sqlite3.connect(':memory:')
    table.execute('CREATE TABLE facts (subject, relation, value)')
    table.executemany('INSERT INTO facts VALUES (?, ?, ?)', rows)
    value, = table.execute(example.meta['sql']).fetchone()
    assert example.answers == (str(value),)
    operations[example.meta['operation']] += 1
  assert set(operations) == set(CONFIG.numeric_operations)
  assert min(operations.values()) > 40


def test_following_the_keys_by_regular_expression_recovers_the_question():
  for example in of_task('keychain'):
    text = ' '.join(document.text for document in example.documents)
    links = re.findall(r'Key (\w+) lands on key (\w+)\.', text)
    asks = re.findall(r'Key (\w+) asks: (\w+ is [^?]+\?)', text)
    assert len(dict(links)) == len(links)  # No key starts two links.
    assert len(dict(asks)) == len(asks) >= CONFIG.num_chains
    assert not set(dict(links)) & set(dict(asks))
    key = re.findall(r'key (\w+)', example.question)[0]
    hops = 0
    while key in dict(links):
      key, hops = dict(links)[key], hops + 1
    relation, name = re.fullmatch(
        r'Wh\w+ is the (\w+) of (\w+)\?', dict(asks)[key]).groups()
    assert hops == CONFIG.key_hops - 1
    assert (f'The {relation} of {name} is {example.answers[0]}.' in text)


def test_options_are_four_true_values_of_the_relation_in_the_context():
  letters = collections.Counter()
  for example in of_task('mc'):
    text = ' '.join(document.text for document in example.documents)
    relation = re.search(r'the (\w+) of', example.question)[1]
    stated = re.findall(rf'The {relation} of \w+ is (\w+)\.', text)
    options = re.findall(r'\(([A-D])\) (\w+)', example.question)
    assert [letter for letter, _ in options] == list('ABCD')
    assert len({option for _, option in options}) == 4
    assert {option for _, option in options} <= set(stated)
    assert dict(options)[example.answers[0]] == example.answers[1]
    letters[example.answers[0]] += 1
  assert min(letters.values()) > 45


def test_dialogue_repeats_a_request_and_wants_one_reply_word_for_word():
  for example in of_task('dialogue'):
    text = '\n'.join(document.text for document in example.documents)
    request = example.question.partition(': ')[2]
    parts = text.split(f'User: {request}\nBot: ')[1:]
    replies = [part.split('\n')[0] for part in parts]
    ordinal = example.question.split()[2]
    asked = ('first', 'second', 'third').index(ordinal)
    prefix = example.meta['required_prefix']
    assert 2 <= len(replies) <= 3 and len(set(replies)) == len(replies)
    assert example.answers == (f'{prefix} {replies[asked]}',)
    assert prefix in example.instruction
    assert 5 <= len(replies[asked].split()) <= 9


def test_multihop_facts_stand_in_different_documents():
  config = dataclasses.replace(CONFIG, tasks=('multihop',), hops=4)
  for example in examples(num_per_task=50, config=config):
    assert example.hops == 4
    assert len({span.document for span in example.evidence}) == 4
    assert example.question.count(' of ') == 4


def test_harder_settings_stay_verifiable_in_every_sentence_form():
  config = dataclasses.replace(
      CONFIG, variety=4, hops=3, key_fact_hops=2, key_hops=3, num_chains=4,
      key_len=8, prefix_len=10, numeric_entities_max=5, number_max=500)
  found = examples(num_per_task=60, config=config)
  for example in found:
    texts = [document.text for document in example.documents]
    assert verify.answer(example, texts) == {example.answers[0]}
  text = ' '.join(d.text for e in found for d in e.documents)
  for form in (r'The \w+ of \w+ is', r'\w+ is the \w+ of', r' has \w+ as',
               r'As \w+, \w+ has', r'are held by', r'In the house of'):
    assert re.search(form, text), form


def test_the_corpus_holds_everything_a_tokenizer_will_meet():
  split = pipeline.SplitConfig(
      name='some', num_per_task=3, min_tokens=100, max_tokens=300)
  texts = list(pipeline.corpus(split, config=CONFIG, seed=0))
  joined = ''.join(texts)
  assert max(map(len, texts)) < 2000
  for expected in ('Bot: ', 'holds', ' lands on key ', 'The answer is',
                   'Answer with the letter only.', '\n', '('):
    assert expected in joined


def test_a_cap_below_the_smallest_example_is_a_user_error():
  split = pipeline.SplitConfig(
      name='tiny', num_per_task=1, min_tokens=5, max_tokens=10)
  with pytest.raises(types.UserError, match=r'max_tokens=10 .*mc'):
    list(pipeline.synthesize(
        split, config=CONFIG, seed=0, count_tokens=count_tokens))


@pytest.mark.parametrize(('build', 'field'), [
    (lambda: pipeline.SplitConfig(name='a', names='dev'), 'names'),
    (lambda: pipeline.SplitConfig(name='a-b'), 'name'),
    (lambda: pipeline.SplitConfig(name='a', num_per_task=-1), 'num_per_task'),
    (lambda: pipeline.SplitConfig(name='a', min_tokens=9, max_tokens=8),
     'min_tokens'),
    (lambda: pipeline.SynthConfig(tasks=('sums',)), 'tasks'),
    (lambda: pipeline.SynthConfig(tasks=()), 'tasks'),
    (lambda: pipeline.SynthConfig(variety=5), 'variety'),
    (lambda: pipeline.SynthConfig(hops=0), 'hops'),
    (lambda: pipeline.SynthConfig(facts_min=4, facts_max=3), 'facts_min'),
    (lambda: pipeline.SynthConfig(code_share=1.5), 'code_share'),
    (lambda: pipeline.SynthConfig(numeric_operations=('mean',)),
     'numeric_operations'),
    (lambda: pipeline.SynthConfig(
        splits=(pipeline.SplitConfig(name='a'),) * 2), 'splits'),
])
def test_impossible_settings_are_user_errors_naming_the_field(build, field):
  with pytest.raises(types.UserError, match=rf'\b{field}\b'):
    build()

"""Worlds, graphs and tables below the pipeline."""

import itertools
import random
import re

import pytest

from longjax.synthesis import knowledge_graph, tables
from longjax.synthesis import world as world_lib

Fact = world_lib.Fact


def test_executing_a_path_unites_every_branch():
  graph = knowledge_graph.Graph([
      Fact(subject='A', relation='owner', value='B'),
      Fact(subject='A', relation='owner', value='C'),
      Fact(subject='B', relation='seat', value='D'),
      Fact(subject='C', relation='seat', value='E')])
  assert graph.execute('A', ['owner', 'seat']) == {'D', 'E'}
  assert graph.execute('A', ['seat']) == set()
  assert graph.execute('A', []) == {'A'}


def test_walks_respect_the_kinds_of_their_relations():
  world = world_lib.World('train', random.Random(0))
  for hops in (1, 2, 3, 4):
    for _ in range(50):
      walk = knowledge_graph.schema_walk(world, hops)
      assert len(walk) == hops
      assert all(before.value == after.subject
                 for before, after in itertools.pairwise(walk))


def test_the_question_names_the_last_relation_first():
  relations = [world_lib.RELATIONS[name] for name in ('captain', 'home')]
  assert knowledge_graph.question_text('Tornis', relations) == (
      'What is the home of the captain of Tornis?')


def test_a_world_has_about_twenty_relations_and_pages_say_one_fact_each():
  assert len(world_lib.RELATIONS) >= 20
  world = world_lib.World(
      'train', random.Random(0), facts_min=3, facts_max=6)
  for page, _ in zip(world.pages(world_lib.KINDS), range(200), strict=False):
    keys = {(fact.subject, fact.relation) for fact in page.facts}
    assert 3 <= len(page.sentences) <= 6
    assert len(keys) == len(page.facts) == len(page.sentences)
    for fact, sentence in zip(page.facts, page.sentences, strict=True):
      assert fact.subject == page.title
      assert fact.subject in sentence and fact.value in sentence


def test_locate_refuses_a_sentence_nobody_wrote():
  with pytest.raises(ValueError, match='No document'):
    world_lib.locate([], ['The pet of Tornis is owl.'])


@pytest.mark.parametrize(('operation', 'expected'), [
    ('total', 7), ('difference', 3), ('most', 5)])
def test_queries_ignore_other_people_and_other_items(operation, expected):
  facts = [Fact(subject='A', relation='ropes', value='5'),
           Fact(subject='B', relation='ropes', value='2'),
           Fact(subject='C', relation='ropes', value='9'),
           Fact(subject='A', relation='bells', value='8')]
  _, sql = tables.query(operation, ['A', 'B'], 'ropes', '')
  assert tables.execute(facts, sql) == expected


def test_more_people_than_numbers_still_have_one_most():
  # Numbers are 2 to 9, so some of nine people must hold as many.
  for seed in range(20):
    draft = tables.generate(
        world_lib.World('train', random.Random(seed)), example_id='x',
        operations=['most'], entities_max=9)
    numbers = re.findall(r'holds (\d+) \w+\.', draft.example.reasoning)
    assert draft.example.answers == (max(numbers),)
    assert numbers.count(max(numbers)) == 1


def test_counting_compares_words():
  facts = [Fact(subject=name, relation='badge', value=color)
           for name, color in zip('ABC', ('red', 'blue', 'red'), strict=True)]
  _, sql = tables.query('count', ['A', 'B', 'C'], 'badge', 'red')
  assert tables.execute(facts, sql) == 2


def test_an_empty_sum_is_none():
  _, sql = tables.query('total', ['A', 'B'], 'ropes', '')
  assert tables.execute([], sql) is None

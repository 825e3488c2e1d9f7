"""Name spaces."""

import random
import re

import pytest

from longjax import types
from longjax.synthesis import names


def test_the_three_spaces_share_no_name():
  spaces = [set(names.short_names(split)) for split in names.SPLITS]
  assert not spaces[0] & spaces[1]
  assert not spaces[0] & spaces[2]
  assert not spaces[1] & spaces[2]
  assert all(len(space) > 200 for space in spaces)
  assert all(re.fullmatch('[A-Z][a-z]{5,6}', name)
             for space in spaces for name in space)


def test_the_split_of_a_name_never_changes():
  # Data sets written by earlier versions must stay disjoint from later ones.
  known = {'Dorvan': 'train', 'Kelmis': 'train', 'a3f': 'validation'}
  assert {name: names.split_of(name) for name in known} == known


@pytest.mark.parametrize('split', names.SPLITS)
def test_sources_draw_from_their_space_without_repeating(split):
  source = names.NameSource(split, random.Random(0))
  drawn = [source.name() for _ in range(6000)]
  drawn += [source.code(3) for _ in range(800)]
  assert len(set(drawn)) == len(drawn)
  assert {names.split_of(name) for name in drawn} == {split}


def test_codes_have_the_wanted_length_and_cannot_be_words_or_numbers():
  source = names.NameSource('train', random.Random(0))
  for code in [source.code(length) for length in (3, 4, 8) for _ in range(50)]:
    assert re.search('[0-9]', code) and re.search('[a-f]', code)
  assert len(source.code(8)) == 8


def test_an_unknown_space_is_a_user_error():
  with pytest.raises(types.UserError, match="'dev'"):
    names.short_names('dev')

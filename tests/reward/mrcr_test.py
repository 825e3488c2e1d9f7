import difflib
import random

import pytest

from longjax.reward import mrcr

POEM = 'The river keeps the names of stones, and hums them to the sea.'


@pytest.mark.parametrize('response', [
    POEM, POEM[:20], POEM.upper(), 'entirely different', POEM[::-1], 'x'])
def test_the_score_is_the_ratio_of_difflib(response):
  expected = difflib.SequenceMatcher(None, response, POEM).ratio()
  got = mrcr.similarity(
      'k3Jd9aQz01' + response, 'k3Jd9aQz01' + POEM,
      required_prefix='k3Jd9aQz01')
  assert got == expected
  assert mrcr.similarity(response, POEM) == expected


def test_autojunk_is_left_on_as_in_the_benchmark():
  text = random.Random(0).choices('abcde', k=400)
  gold, response = ''.join(text), ''.join(reversed(text))
  expected = difflib.SequenceMatcher(None, response, gold).ratio()
  plain = difflib.SequenceMatcher(
      None, response, gold, autojunk=False).ratio()
  assert mrcr.similarity(response, gold) == expected != plain


@pytest.mark.parametrize('response', [
    POEM, '', 'k3Jd9aQz0', ' k3Jd9aQz01' + POEM, POEM + 'k3Jd9aQz01',
    'K3JD9AQZ01' + POEM, 'k3Jd9aQz01'])
def test_without_the_prefix_or_without_text_there_is_no_score(response):
  assert mrcr.similarity(
      response, 'k3Jd9aQz01' + POEM, required_prefix='k3Jd9aQz01') == 0.0


def test_the_prefix_may_be_missing_from_the_gold():
  assert mrcr.similarity('p1' + POEM, POEM, required_prefix='p1') == 1.0


def test_the_prefix_earns_nothing_by_itself():
  prefix = 'z' * 30
  got = mrcr.similarity(prefix + 'qq', prefix + POEM, required_prefix=prefix)
  assert got < 0.1


def test_both_texts_are_cut_at_the_cap():
  line = ''.join(chr(0x4e00 + i) for i in range(20_000))
  assert mrcr.similarity(line + 'tail' * 9, line + 'other' * 9) == 1.0
  cut = mrcr.similarity('p' + line[:-1] + 'XY', 'p' + line,
                        required_prefix='p')
  assert cut == pytest.approx(2 * 19_999 / 40_000)

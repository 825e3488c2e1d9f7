import pytest

from longjax import config, types
from longjax.bench import suite
from tests import tiny_model


@pytest.mark.parametrize('facts, match', [
    (dict(prompt_len=1), r'prompt_len=1 must be >= 2'),
    (dict(repeats=0), r'repeats=0 must be >= 1'),
    (dict(shortest_response=9, response_len=8), r'shortest_response=9 is more'),
    (dict(variants=()), r'variants=\(\) must name'),
    (dict(variants=('shared', 'shared')), r'must name one or two different'),
    (dict(program='gap'), r"use variants=\('shared',\)"),
])
def test_mistakes_in_a_case_are_told(facts, match):
  with pytest.raises(types.UserError, match=match):
    suite.Case(**dict(program='update', prompt_len=8) | facts)


def test_parity_refuses_what_knows_no_branches():
  with pytest.raises(types.UserError, match='cudnn does not know'):
    suite.KernelCase(program='parity', length=64, backends=('cudnn',))


@pytest.mark.parametrize('facts, match', [
    (dict(cases={}), 'nothing to measure'),
    (dict(model=None), 'set exactly one of them'),
    (dict(init_from='somewhere'), 'set exactly one of them'),
    (dict(peak_tflops=-1.0), r'peak_tflops=-1.0 must be >= 0'),
])
def test_mistakes_in_a_benchmark_are_told(facts, match):
  case = suite.Case(program='update', prompt_len=8)
  with pytest.raises(types.UserError, match=match):
    suite.BenchConfig(**dict(
        suite='test', model=tiny_model.MODEL, cases={'one': case}) | facts)


def test_the_program_tells_what_kind_of_case_it_is():
  built = config.build(suite.BenchConfig, dict(
      suite='test', model=tiny_model.MODEL, cases=dict(
          one=dict(program='decode', prompt_len=8),
          two=dict(program='attention', length=64, backends=('blockwise',)))))
  assert isinstance(built.cases['one'], suite.Case)
  assert isinstance(built.cases['two'], suite.KernelCase)

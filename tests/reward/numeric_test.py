import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from longjax.reward import numeric


@pytest.mark.parametrize('text, value', [
    ('5', 5.0),
    ('-5', -5.0),
    ('+5', 5.0),
    ('- 5', -5.0),
    ('−5', -5.0),
    ('minus 5', -5.0),
    ('negative 5', -5.0),
    ('(5)', -5.0),
    ('(1,234.5)', -1234.5),
    ('$(5.2)', -5.2),
    ('($5.2 million)', -5.2e6),
    ('(5%)', -5.0),
    ('(5)%', -5.0),
    ('$1,234.50', 1234.5),
    ('€ 7', 7.0),
    ('-$7', -7.0),
    ('$-7', -7.0),
    ('.5', 0.5),
    ('12%', 12.0),
    ('12 percent', 12.0),
    ('1.2e-3', 1.2e-3),
    ('1.2E3', 1200.0),
    ('5 x 10^6', 5e6),
    ('5 × 10**-2', 0.05),
    ('3/4', 0.75),
    ('-3/4', -0.75),
    ('5k', 5e3),
    ('5 thousand', 5e3),
    ('5.2 million dollars', 5.2e6),
    ('$5.2 billion', 5.2e9),
    ('about 42 apples', 42.0),
    ('5 km2', 5.0),
    ('3 + 4 = 7', 7.0),
    ('7 (that is, 7.0)', 7.0),
    ('1,234,567', 1234567.0),
    ('5 (five)', 5.0),
])
def test_numbers_are_read_as_written(text, value):
  assert numeric.single(text).value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize('text', [
    '', 'five', 'Q3', '5 or 6', '5-7', '3/4/2019', '10^6', '5.5.5', '1,23',
    '12,345,67', '1_000', '1e999', '1/0', '0e999', '1/0 or 5', '1e999, 5',
    '12 of 30', '5% or 5', 'v3.1a', 'nan', 'inf', '9' * 400,
])
def test_what_is_not_one_finite_number_is_none(text):
  assert numeric.single(text) is None


@pytest.mark.parametrize('prediction, gold', [
    ('42', '42'),
    ('$42', '42'),
    ('42.0', '42'),
    ('1,234', '1234'),
    ('1001', '1000'),  # 0.1%.
    ('998.6', '1000'),
    ('3.14', '3.1'),  # Within half a unit of the last stated decimal.
    ('3.15', '3.1'),
    ('3.05', '3.1'),
    ('(42)', '-42'),
    ('-42', '(42)'),
    ('5.2 million', '5,200,000'),
    ('5200000', '5.2 million'),
    ('5%', '5%'),
    ('0.05', '5%'),
    ('5', '5%'),
    ('5%', '0.05'),
    ('0.75', '3/4'),
    ('0', '0'),
    ('-0.04', '0.0'),
])
def test_equal_numbers_match(prediction, gold):
  assert numeric.is_equal(prediction, gold)


@pytest.mark.parametrize('prediction, gold', [
    ('-42', '42'),  # Sign.
    ('42', '-42'),
    ('(42)', '42'),
    ('minus 42', '42'),
    ('-0.01', '0.04'),
    ('420', '42'),  # Powers of ten, all accepted by QwenLong-L1.
    ('4.2', '42'),
    ('4200', '42'),
    ('0.42', '42'),
    ('42000', '42'),
    ('42,000,000', '42'),
    ('42 million', '42'),
    ('42', '42 million'),
    ('500%', '5%'),  # A hundredfold percentage is not the percentage.
    ('500', '5%'),
    ('0.05%', '5%'),
    ('1002', '1000'),  # 0.2%.
    ('3.16', '3.1'),
    ('3.04', '3.1'),
    ('41', '42'),
    ('0.001', '0'),
    ('42 or 43', '42'),
    ('41 42 43', '42'),
    ('forty-two', '42'),
    ('', '42'),
    ('the', '42'),
    ('YES', '42'),
    ('6*7', '42'),  # Nothing is evaluated.
    ('__import__("os")', '42'),
    ('42', 'unknown'),
])
def test_other_numbers_do_not(prediction, gold):
  assert not numeric.is_equal(prediction, gold)


def test_a_question_about_percent_admits_fractions():
  question = 'What percentage of the trees are oaks?'
  assert numeric.is_equal('0.25', '25', question=question)
  assert numeric.is_equal('25', '0.25', question=question)
  assert not numeric.is_equal('0.25', '25', question='How many oaks?')
  assert not numeric.is_equal('2.5', '25', question=question)
  assert not numeric.is_equal('-0.25', '25', question=question)


def test_a_declared_unit_admits_the_number_in_full_and_no_other_power():
  assert numeric.is_equal('5,200,000', '5.2', unit='million dollars')
  assert numeric.is_equal('5.2 million', '5.2', unit='million dollars')
  assert numeric.is_equal('5.2', '5.2', unit='million dollars')
  assert numeric.is_equal('5,200,000', '5.2 million', unit='million')
  assert not numeric.is_equal('5,200', '5.2', unit='million dollars')
  assert not numeric.is_equal('5.2 billion', '5.2', unit='million dollars')
  assert not numeric.is_equal('5,200,000', '5.2', unit='dollars')
  assert not numeric.is_equal('5,200,000', '5.2')
  assert not numeric.is_equal('0.0000052', '5.2', unit='million')


@pytest.mark.parametrize('prediction, is_right', [
    ('7', True), ('7 houses', True), ('7.0', True), ('+7', True),
    ('8', False), ('7.005', False), ('-7', False), ('70', False),
    ('7%', False), ('6 or 7', False), ('seven', False), ('', False),
    ('the', False), ('7k', False),
])
def test_counts_are_exact(prediction, is_right):
  assert numeric.is_equal_count(prediction, '7') == is_right


def test_large_counts_have_no_tolerance():
  assert numeric.is_equal_count('10,000', '10000')
  assert not numeric.is_equal_count('10001', '10000')


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    st.integers(1, 10**7), st.integers(1, 6), st.sampled_from(['', '-']))
def test_no_power_of_ten_and_no_sign_error_is_forgiven(value, power, sign):
  gold = f'{sign}{value}'
  flipped = f'{value}' if sign else f'-{value}'
  assert numeric.is_equal(f'{sign}{value:,}', gold)
  assert not numeric.is_equal(flipped, gold)
  assert not numeric.is_equal(f'{sign}{value * 10**power}', gold)
  shrunk = np.format_float_positional(value / 10**power, trim='-')
  assert not numeric.is_equal(f'{sign}{shrunk}', gold)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.floats(-1e6, 1e6))
def test_every_float_is_read_back(value):
  text = np.format_float_positional(value)
  assert numeric.single(text).value == pytest.approx(value, rel=1e-12)

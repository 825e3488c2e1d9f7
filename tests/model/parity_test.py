"""Our network computes what transformers computes.

Small random checkpoints of every family go through our loader and through
transformers'. What transformers computed is kept in tests/testdata/parity;
where transformers is installed that is computed anew and compared too. After a
change of the checkpoints in `tests.model.checkpoints`:

  LONGJAX_UPDATE_GOLDEN=1 python -m pytest tests/model/parity_test.py
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longjax import rows
from longjax.model import (
    compute,
    head,
    huggingface,
    parameters,
    transformer,
)
from longjax.parallel import rules as rules_lib
from tests import tiny_model
from tests.model import checkpoints, chunk_by_chunk, transformers_reference

GOLDEN = pathlib.Path(__file__).parent.parent / 'testdata' / 'parity'
PROMPT_LEN, LENGTH = 18, 24
TEMPERATURE = 0.7
# Two prompts with two continuations each.
TOKENS = np.random.default_rng(5).integers(0, 96, (2, 2, LENGTH))
TOKENS[:, 1, :PROMPT_LEN] = TOKENS[:, 0, :PROMPT_LEN]
ROWS = TOKENS.reshape(4, LENGTH)

by_family = pytest.mark.parametrize('family', checkpoints.FAMILIES)


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
  """The checkpoints, stored in bfloat16."""
  made = tmp_path_factory.mktemp('families')
  return {
      name: checkpoints.write(made / name, config, {
          k: v.astype(ml_dtypes.bfloat16)
          for k, v in checkpoints.random_tensors(config).items()})
      for name, config in checkpoints.FAMILIES.items()}


def compute_reference(directory: pathlib.Path) -> dict[str, np.ndarray]:
  """What transformers makes of a checkpoint."""
  model = transformers_reference.load(directory)
  experts = []
  with transformers_reference.recorded_experts(model, experts):
    logits = transformers_reference.logits(model, ROWS)
  logprobs, entropy = transformers_reference.logprobs_and_entropy(
      logits[:, :-1], ROWS[:, 1:], TEMPERATURE)
  cached = transformers_reference.cached_logits(model, ROWS, PROMPT_LEN)
  half = transformers_reference.load(directory, 'bfloat16')
  with transformers_reference.given_experts(half, experts):
    gap = transformers_reference.logits(half, ROWS) - logits
  return {
      'logits': logits, 'logprobs': logprobs, 'entropy': entropy,
      'cached_logits': cached, 'bfloat16_gap': np.sqrt(np.mean(gap**2))}


@pytest.fixture(scope='module')
def golden(directories):
  """What it made of each when it was last asked."""
  if os.environ.get('LONGJAX_UPDATE_GOLDEN'):
    GOLDEN.mkdir(exist_ok=True)
    for name, directory in directories.items():
      np.savez_compressed(
          GOLDEN / f'{name}.npz', **compute_reference(directory))
  return {name: np.load(GOLDEN / f'{name}.npz') for name in directories}


@pytest.fixture(scope='module')
def models(directories):
  """(parameters, configuration) of each family, read when first asked."""
  return functools.cache(lambda name: huggingface.load(directories[name]))


def forward(model, dtype='float32', expert_ids=None):
  """What the layers make of ROWS."""
  params, config = model
  return jax.jit(functools.partial(
      transformer.hidden_states, config=config, rules=tiny_model.rules(),
      compute=compute.Compute(dtype=dtype)))(
          params, jnp.int32(ROWS), causal(4, LENGTH), expert_ids=expert_ids)


def causal(num_rows, length):
  """One sequence a row."""
  position = np.tile(np.arange(length), (num_rows, 1))
  return rows.TokenMeta(
      group=np.zeros_like(position), branch=np.zeros_like(position),
      position=position)


def largest(difference) -> float:
  return float(np.abs(np.asarray(difference)).max())


@by_family
def test_logits_logprobs_and_entropies_are_those_of_transformers(
    models, golden, family):
  want = golden[family]
  hidden = forward(models(family)).states
  weights = parameters.head_weights(models(family)[0])
  assert largest(head.logits(hidden, weights) - want['logits']) <= 2e-5
  # The test means something: logits spread.
  assert want['logits'].std() > 0.5
  scored = head.logprobs_and_entropy(
      hidden[:, :-1], weights, jnp.int32(ROWS[:, 1:]),
      np.ones((4, LENGTH - 1), bool), temperature=TEMPERATURE, chunk_len=16)
  assert largest(scored.logprobs - want['logprobs']) <= 2e-5
  assert largest(scored.entropy - want['entropy']) <= 2e-5


@by_family
def test_prefill_and_decoding_are_those_of_transformers_with_its_cache(
    models, golden, family):
  params, config = models(family)
  # The last token of the prompt is read by decoding, the others in chunks.
  hidden = chunk_by_chunk.hidden_states(
      params, list(TOKENS[:, 0, :PROMPT_LEN - 1]),
      TOKENS[:, :, PROMPT_LEN - 1:], config=config, chunk_len=6,
      rules=rules_lib.for_sampler(tiny_model.rules(), 2).decode)
  got = head.logits(
      jnp.asarray(hidden).reshape(4, LENGTH - PROMPT_LEN + 1, -1),
      parameters.head_weights(params))
  assert largest(got - golden[family]['cached_logits']) <= 2e-5


@by_family
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(
    models, golden, family):
  # Both go to the experts float32 chose: which of two that are as good is
  # taken is chance, and would drown all else.
  routing = forward(models(family)).routing
  hidden = forward(
      models(family), 'bfloat16', routing and routing.expert_ids).states
  assert hidden.dtype == jnp.bfloat16
  logits = head.logits(hidden, parameters.head_weights(models(family)[0]))
  gap = np.asarray(logits) - golden[family]['logits']
  assert np.sqrt(np.mean(gap**2)) <= golden[family]['bfloat16_gap']


@by_family
def test_the_goldens_are_what_transformers_computes_today(
    directories, golden, family):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  for name, value in compute_reference(directories[family]).items():
    # bfloat16 sums in an order that depends on the processor.
    tolerance = 0.3 * golden[family][name] if 'bfloat16' in name else 2e-5
    assert largest(value - golden[family][name]) <= tolerance, name


@by_family
def test_transformers_reads_what_we_save(directories, tmp_path, family):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  source = directories[family]
  params, config = huggingface.load(source)
  huggingface.save(
      tmp_path / 'saved', params, config, dtype=jnp.bfloat16,
      max_file_bytes=50_000)
  assert len(list((tmp_path / 'saved').glob('*.safetensors'))) > 1
  want, got = (transformers_reference.load(directory, 'bfloat16')
               for directory in (source, tmp_path / 'saved'))
  assert type(got).__name__ == (
      checkpoints.FAMILIES[family]['architectures'][0])
  theirs, ours = want.state_dict(), got.state_dict()
  assert theirs.keys() == ours.keys()
  for name, value in theirs.items():
    assert value.equal(ours[name]), name
  np.testing.assert_array_equal(
      transformers_reference.logits(want, ROWS),
      transformers_reference.logits(got, ROWS))

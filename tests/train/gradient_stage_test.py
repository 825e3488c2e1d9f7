"""Entropy and gradients of responses, against full logits in float64."""

import dataclasses
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from longjax import rows, types
from longjax.evals import gradients
from longjax.model import compute, parameters, transformer
from longjax.rl import loss as loss_lib
from longjax.train import gradient_stage, rl_job
from tests import tiny_model
from tests.train import rl_job_test

STAGE = gradient_stage.GradientStage(
    rl=rl_job_test.stage(steps=2), num_exact=3)


@pytest.fixture(scope='module')
def measured():
  context = dataclasses.replace(
      rl_job_test.context(),
      stop=python_types.SimpleNamespace(agree_now=lambda: False))
  made = gradient_stage.run(
      STAGE, 'after', context, tiny_model.params(),
      examples=rl_job_test.EXAMPLES, score=rl_job_test.Grader())
  # The same responses once more.
  job = rl_job.RlJob(
      context, STAGE.rl, examples=rl_job_test.EXAMPLES,
      score=rl_job_test.Grader(), name='after')
  drawn = [job.rollout(tiny_model.params(), step) for step in range(2)]
  return made, drawn


@jax.jit
def _hidden(params, tokens, meta):
  return transformer.hidden_states(
      params, tokens, meta, config=tiny_model.MODEL, rules=tiny_model.rules(),
      compute=compute.Compute(attention='reference')).states[0]


def logits_of(params, group):
  """Logits before each response token, with a row of its own; f[R, V]."""
  (branch,) = group.branches
  row = rows.write([[group]], row_len=64)
  hidden = _hidden(params, jnp.asarray(row.tokens), jax.tree.map(
      jnp.asarray, row.meta))
  trained = np.flatnonzero(row.loss_mask[0])
  assert len(trained) == len(branch.response)
  return hidden[trained] @ parameters.head_weights(params)


def alone(drawn):
  """Each response's group with nothing else in it, and its reward."""
  for graded in drawn:
    num_samples = graded.sampled.rollouts.lengths.shape[1]
    means = graded.rewards.reshape(-1, num_samples).mean(1)
    for p, (group,) in enumerate(graded.sampled.groups):
      for branch in group.branches:
        reward = graded.rewards[branch.trajectory]
        yield (dataclasses.replace(group, branches=[branch]), reward,
               reward - means[p])


def test_entropy_and_logit_gradient_are_those_of_full_logits(measured):
  made, drawn = measured
  params = tiny_model.params()
  tokens = []
  responses = list(made.responses)
  assert len(responses) == len(list(alone(drawn)))
  for found, (group, reward, advantage) in zip(
      responses, alone(drawn), strict=True):
    logits = np.asarray(logits_of(params, group), np.float64)
    probs = special.softmax(logits, axis=1)
    entropy = special.entr(probs).sum(1)
    actions = np.eye(probs.shape[1])[np.asarray(group.branches[0].response)]
    norm = np.linalg.norm(actions - probs, axis=1)  # d log p_a / d z.
    assert found['entropy'] == pytest.approx(entropy.mean(), rel=1e-4)
    assert found['logit_norm'] == pytest.approx(norm.mean(), rel=1e-3)
    assert found['reward'] == reward
    assert found['is_failed'] == (advantage < -1e-6)
    if advantage < -1e-6:
      tokens.append(np.stack([entropy, norm]))
  want = np.concatenate(tokens, axis=1)
  np.testing.assert_allclose(made.tokens, want, rtol=2e-3, atol=1e-4)


def test_gradients_of_parameters_are_of_the_first_failed_responses(measured):
  made, drawn = measured
  params = tiny_model.params()

  def mean_logprob(params, group):
    logprobs = jax.nn.log_softmax(logits_of(params, group))
    response = np.asarray(group.branches[0].response)
    return logprobs[np.arange(len(response)), response].mean()

  num_exact = 0
  for found, (group, _, advantage) in zip(
      made.responses, alone(drawn), strict=True):
    if advantage > -1e-6 or num_exact == 3:
      assert found['parameter_norm'] is None
      continue
    num_exact += 1
    gradient = jax.grad(mean_logprob)(
        jax.tree.map(jnp.asarray, params), group)
    want = np.sqrt(sum(
        np.square(np.asarray(leaf, np.float64)).sum()
        for leaf in jax.tree.leaves(gradient)))
    assert found['parameter_norm'] == pytest.approx(want, rel=1e-4)
  assert num_exact == 3


def test_the_report_has_rank_correlations_and_a_drawing(measured, tmp_path):
  made, _ = measured
  assert gradients.section(tmp_path) == ''
  gradients.save(
      tmp_path, 'after_0', responses=made.responses, tokens=made.tokens)
  shown = gradients.section(tmp_path)
  failed = [r for r in made.responses if r['is_failed']]
  ranks = [np.argsort(np.argsort([r[name] for r in failed]))
           for name in ('entropy', 'logit_norm')]
  want = np.corrcoef(*ranks)[0, 1]  # No two are equal.
  assert f'<td>{len(failed)}</td><td>{want:.2f}</td>' in shown
  assert 'after_0' in shown and '<svg' in shown


def test_what_has_no_order_has_no_correlation():
  assert gradients.spearman([1, 2], [2, 1]) == 0.0
  assert gradients.spearman([1, 1, 1], [1, 2, 3]) == 0.0
  assert gradients.spearman([1, 2, 3], [9, 5, 1]) == pytest.approx(-1.0)


def test_turns_and_negative_numbers_are_refused():
  with pytest.raises(types.UserError, match='num_exact=-1'):
    gradient_stage.GradientStage(rl=rl_job_test.stage(), num_exact=-1)
  with pytest.raises(types.UserError, match='do not go with job=gradients'):
    gradient_stage.GradientStage(rl=rl_job_test.stage(
        cut_tokens=3, loss=loss_lib.LossConfig(tis_cap=2.0)))

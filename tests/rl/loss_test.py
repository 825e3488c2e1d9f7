import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from longjax import reductions, rows, types
from longjax.rl import diagnostics, loss

N, R, V, F = 8, 6, 5, 3
NUM_GROUPS = 3
GROUPS = np.int32([0, 0, 0, 1, 1, 2, 2, 2])
LENGTHS = np.int32([3, 6, 1, 2, 4, 5, 1, 3])
OFF_POLICY = dict(objective='off_policy', tis_cap=2.0)
ROW_LEN = 32


def problem(seed=0):
  """A softmax policy over features, and what the sampler recorded, [N, R]."""
  rng = np.random.default_rng(seed)
  data = dict(
      features=rng.normal(size=(N, R, F)),
      targets=rng.integers(0, V, (N, R)),
      # Wide enough for every clip to act.
      old=rng.normal(-1.6, 0.6, size=(N, R)),
      sampler=rng.normal(-1.6, 0.6, size=(N, R)),
      advantages=rng.normal(size=N),
      keep=np.array([1, 1, 0, 1, 0, 0, 0, 0], bool),
  )
  return rng.normal(size=(F, V)), data


def reference_logprob(params, data, i, t):
  logits = data['features'][i, t] @ params
  shifted = logits - logits.max()
  return shifted[data['targets'][i, t]] - np.log(np.exp(shifted).sum())


def reference_token(lp, old, sampler, advantage, *, objective, tis_cap,
                    eps_low=0.2, eps_high=0.28, dual_clip=3.0):
  """The objective for one token; the on-policy form has lp = old."""
  if objective == 'on_policy':
    u = advantage * np.exp(lp - old)
  else:
    rho = np.exp(np.clip(lp - old, -20, 20))
    u = min(rho * advantage,
            np.clip(rho, 1 - eps_low, 1 + eps_high) * advantage)
    if advantage < 0:
      u = max(u, dual_clip * advantage)
  if tis_cap is None:
    return u
  return u * min(np.exp(np.clip(old - sampler, -20, 20)), tis_cap)


def reference_weight(i, norm, aepo_norm, keep):
  """Each `loss_norm` for a token of response i."""
  if not keep[i]:
    return 0.0
  rows_in = [j for j in range(N) if aepo_norm == 'all' or keep[j]]
  if norm == 'batch_tokens':
    return 1 / sum(LENGTHS[j] for j in rows_in)
  if norm == 'group_tokens':
    groups = {GROUPS[j] for j in rows_in}
    in_group = sum(LENGTHS[j] for j in rows_in if GROUPS[j] == GROUPS[i])
    return 1 / (len(groups) * in_group)
  if norm == 'seq_mean':
    return 1 / (len(rows_in) * LENGTHS[i])
  return 1 / (len(rows_in) * R)


def reference_loss(params, data, *, norm='batch_tokens', aepo_norm='all',
                   keep=None, frozen=None, objective='on_policy',
                   tis_cap=None):
  keep = np.ones(N, bool) if keep is None else keep
  total = 0.0
  for i in range(N):
    for t in range(LENGTHS[i]):
      lp = reference_logprob(params, data, i, t)
      old = data['old'][i, t]
      if objective == 'on_policy':
        old = reference_logprob(frozen, data, i, t)
      total -= reference_weight(i, norm, aepo_norm, keep) * reference_token(
          lp, old, data['sampler'][i, t], data['advantages'][i],
          objective=objective, tis_cap=tis_cap)
  return total


def reference_gradient(params, data, **kwargs):
  """Central differences in float64; what is stopped stays at `params`."""
  grad, h = np.zeros_like(params), 1e-6
  for index in np.ndindex(*params.shape):
    step = np.zeros_like(params)
    step[index] = h
    grad[index] = (
        reference_loss(params + step, data, frozen=params, **kwargs)
        - reference_loss(params - step, data, frozen=params, **kwargs)
    ) / (2 * h)
  return grad


def packed(order=None, row_len=ROW_LEN, num_rows=None):
  """The responses as packed rows, groups in any order."""
  groups = []
  for g in range(NUM_GROUPS) if order is None else order:
    groups.append(rows.Group(prompt=[1, 2], branches=[
        rows.Branch(response=[3] * LENGTHS[i], trajectory=int(i))
        for i in np.flatnonzero(GROUPS == g)]))
  return rows.pack(groups, row_len=row_len, num_rows=num_rows)


def our_loss(params, batch, weights, data, *, objective='on_policy',
             tis_cap=None):
  """The loss of packed rows under the softmax policy."""
  at = (batch.trajectory, batch.response_index)
  logits = jnp.float32(data['features'])[at] @ params
  logprobs = jnp.take_along_axis(
      jax.nn.log_softmax(logits), jnp.int32(data['targets'])[at][..., None],
      axis=-1)[..., 0]
  # Padding is as bad as it can be.
  logprobs = jnp.where(batch.loss_mask, logprobs, -jnp.inf)
  sampler = jnp.float32(data['sampler'])[at]
  return loss.policy_gradient_loss(
      logprobs=logprobs,
      old_logprobs=None if objective == 'on_policy' else jnp.float32(
          data['old'])[at],
      sampler_logprobs=jnp.where(batch.loss_mask, sampler, -jnp.inf),
      advantages=jnp.float32(data['advantages'])[batch.trajectory],
      weights=weights[batch.trajectory],
      loss_mask=jnp.asarray(batch.loss_mask),
      objective=objective, tis_cap=tis_cap)


@functools.partial(jax.jit, static_argnames=('objective', 'tis_cap'))
def value_and_gradient(params, batch, weights, data, **kwargs):
  def value(p):
    out = our_loss(p, batch, weights, data, **kwargs)
    return out.loss, out.metrics
  (total, metrics), grad = jax.value_and_grad(value, has_aux=True)(params)
  return total, grad, metrics


def weights_of(norm='batch_tokens', aepo_norm='all', keep=None):
  keep = np.ones(N, bool) if keep is None else keep
  return loss.response_weights(
      jnp.array(LENGTHS), jnp.array(GROUPS), jnp.array(keep), loss_norm=norm,
      num_groups=NUM_GROUPS + 1, max_response_len=R, aepo_norm=aepo_norm)


@pytest.mark.parametrize('aepo_norm', ['all', 'kept'])
@pytest.mark.parametrize('norm', loss.NORMS)
def test_loss_and_gradient_equal_float64_for_every_normalisation(
    norm, aepo_norm):
  params, data = problem()
  kwargs = dict(norm=norm, aepo_norm=aepo_norm, keep=data['keep'])
  total, grad, _ = value_and_gradient(
      jnp.float32(params), packed(), weights_of(**kwargs), data)
  np.testing.assert_allclose(
      total, reference_loss(params, data, frozen=params, **kwargs), rtol=1e-5)
  np.testing.assert_allclose(
      grad, reference_gradient(params, data, **kwargs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('kwargs', [
    dict(objective='on_policy', tis_cap=2.0),
    dict(objective='off_policy', tis_cap=None),
    OFF_POLICY,
])
def test_loss_and_gradient_equal_float64_for_every_objective(kwargs, seed):
  params, data = problem(seed)
  total, grad, _ = value_and_gradient(
      jnp.float32(params), packed(), weights_of(), data, **kwargs)
  if kwargs['objective'] == 'off_policy':
    np.testing.assert_allclose(
        total, reference_loss(params, data, **kwargs), rtol=2e-5)
    np.testing.assert_allclose(
        grad, reference_gradient(params, data, **kwargs),
        rtol=1e-4, atol=1e-5)
    return
  # On policy the old policy is the present one, also in the TIS weights.
  at_params = dict(data, old=np.array([[
      reference_logprob(params, data, i, t) for t in range(R)]
      for i in range(N)]))
  expected = np.zeros_like(params)
  for i in range(N):
    for t in range(LENGTHS[i]):
      x = data['features'][i, t]
      p = np.exp(x @ params) / np.exp(x @ params).sum()
      w = min(np.exp(at_params['old'][i, t] - data['sampler'][i, t]), 2.0)
      onehot = np.eye(V)[data['targets'][i, t]]
      expected -= w * data['advantages'][i] * np.outer(x, onehot - p) / (
          LENGTHS.sum())
  np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


def test_on_policy_gradient_is_advantage_times_score():
  # One token: d loss / d lp = -weight * A, and the loss value is -weight * A.
  def value(lp):
    one = jnp.ones((1, 1))
    return loss.policy_gradient_loss(
        logprobs=lp * one, old_logprobs=None, sampler_logprobs=-one,
        advantages=-0.7 * one, weights=0.5 * one,
        loss_mask=jnp.ones((1, 1), bool)).loss
  total, grad = jax.value_and_grad(value)(jnp.float32(-2.0))
  np.testing.assert_allclose([total, grad], [0.35, 0.35], rtol=1e-6)


def token(ratio, advantage, **kwargs):
  """Gain and its gradient over the ratio for one off-policy token."""
  old = jnp.float32(-1.0)
  def value(lp):
    def full(x):
      return jnp.full((1, 1), x)
    return -loss.policy_gradient_loss(
        logprobs=full(lp), old_logprobs=full(old), sampler_logprobs=full(old),
        advantages=full(jnp.float32(advantage)), weights=jnp.ones((1, 1)),
        loss_mask=jnp.ones((1, 1), bool), objective='off_policy',
        **kwargs).loss
  return jax.value_and_grad(value)(old + jnp.log(ratio))


@pytest.mark.parametrize('ratio, advantage, gain, has_gradient', [
    (1.1, 1.0, 1.1, True),
    (1.27, 1.0, 1.27, True),  # Above 1.2: clip-higher lets it pass.
    (1.5, 1.0, 1.28, False),
    (0.5, 1.0, 0.5, True),  # A good token that became unlikely is pulled back.
    (0.5, -1.0, -0.8, False),
    (1.5, -1.0, -1.5, True),
    (3.5, -1.0, -3.0, False),  # Dual clip.
])
def test_off_policy_clips(ratio, advantage, gain, has_gradient):
  got, grad = token(ratio, advantage)
  np.testing.assert_allclose(got, gain, rtol=1e-5)
  np.testing.assert_allclose(
      grad, ratio * advantage if has_gradient else 0.0, rtol=1e-5)


@pytest.mark.parametrize('kwargs', [dict(), OFF_POLICY])
def test_micro_batches_add_up_to_the_whole(kwargs):
  params, data = problem()
  params, weights = jnp.float32(params), weights_of('group_tokens')
  batch = packed(row_len=16)
  assert batch.tokens.shape[0] >= 2
  whole = value_and_gradient(params, batch, weights, data, **kwargs)
  total, grad, metrics = 0.0, 0.0, diagnostics.zero_loss_metrics()
  for r in range(batch.tokens.shape[0]):
    part = jax.tree.map(lambda x, r=r: x[r:r + 1], batch)
    part_total, part_grad, part_metrics = value_and_gradient(
        params, part, weights, data, **kwargs)
    total, grad = total + part_total, grad + part_grad
    metrics += part_metrics
  np.testing.assert_allclose(total, whole[0], rtol=1e-5)
  np.testing.assert_allclose(grad, whole[1], rtol=1e-5, atol=1e-7)
  for name, value in whole[2].summary().items():
    np.testing.assert_allclose(
        metrics.summary()[name], value, rtol=1e-5, err_msg=name)


def test_packing_and_padding_change_no_gradient():
  params, data = problem()
  params, weights = jnp.float32(params), weights_of('seq_mean')
  tight = value_and_gradient(params, packed(), weights, data)
  for other in (packed([2, 0, 1]), packed(row_len=17), packed(
      row_len=64, num_rows=3)):
    got = value_and_gradient(params, other, weights, data)
    np.testing.assert_allclose(got[0], tight[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], tight[1], rtol=1e-5, atol=1e-7)


def test_device_count_changes_no_gradient():
  params, data = problem()
  params, weights = jnp.float32(params), weights_of()
  batch = packed(row_len=16, num_rows=8)
  mesh = jax.make_mesh(
      (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.P('data'))
  one = value_and_gradient(params, batch, weights, data, **OFF_POLICY)
  many = value_and_gradient(
      params, jax.device_put(batch, sharding), weights, data, **OFF_POLICY)
  np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
  np.testing.assert_allclose(many[1], one[1], rtol=1e-5, atol=1e-7)


def test_jit_changes_nothing():
  params, data = problem()
  jitted = value_and_gradient(
      jnp.float32(params), packed(), weights_of(), data, **OFF_POLICY)
  with jax.disable_jit():
    eager = value_and_gradient(
        jnp.float32(params), packed(), weights_of(), data, **OFF_POLICY)
  np.testing.assert_allclose(jitted[0], eager[0], rtol=1e-5)
  np.testing.assert_allclose(jitted[1], eager[1], rtol=1e-5, atol=1e-7)


def test_an_empty_mask_gives_zero_loss_and_a_finite_gradient():
  params, data = problem()
  batch = rows.empty(2, 8)
  total, grad, metrics = value_and_gradient(
      jnp.float32(params), batch, weights_of(), data, **OFF_POLICY)
  assert float(total) == 0.0
  np.testing.assert_array_equal(grad, 0.0)
  assert all(float(v) == 0.0 for v in metrics.summary().values())


def test_metrics_equal_counts_over_the_masked_tokens():
  params, data = problem()
  _, _, metrics = value_and_gradient(
      jnp.float32(params), packed(), weights_of(), data, **OFF_POLICY)
  ratio, advantages, importance = [], [], []
  for i in range(N):
    for t in range(LENGTHS[i]):
      ratio.append(np.exp(
          reference_logprob(params, data, i, t) - data['old'][i, t]))
      importance.append(np.exp(data['old'][i, t] - data['sampler'][i, t]))
      advantages.append(data['advantages'][i])
  ratio, advantages = np.array(ratio), np.array(advantages)
  expected = {
      'ratio/mean': ratio.mean(),
      'ratio/clip_high': np.mean((advantages > 0) & (ratio > 1.28)),
      'ratio/clip_low': np.mean((advantages < 0) & (ratio < 0.8)),
      'ratio/clip_dual': np.mean((advantages < 0) & (ratio > 3.0)),
      'ratio/tis_capped': np.mean(np.array(importance) > 2.0),
      'gap/logprob_mean': np.mean(np.abs(np.log(importance))),
  }
  got = metrics.summary()
  for name, value in expected.items():
    assert value > 0.0, f'{name} is not exercised'
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_the_ratio_is_one_on_policy():
  params, data = problem()
  _, _, metrics = value_and_gradient(
      jnp.float32(params), packed(), weights_of(), data)
  got = metrics.summary()
  assert float(got['ratio/mean']) == 1.0
  assert float(got['ratio/clip_high']) == 0.0
  assert float(got['ratio/clip_low']) == 0.0


def test_off_policy_without_old_logprobs_is_refused():
  one = jnp.ones((1, 1))
  with pytest.raises(ValueError, match='old_logprobs'):
    loss.policy_gradient_loss(
        logprobs=one, old_logprobs=None, sampler_logprobs=one, advantages=one,
        weights=one, loss_mask=one > 0, objective='off_policy')


@pytest.mark.parametrize('norm', loss.NORMS)
def test_nothing_kept_gives_zero_weights_not_nan(norm):
  for aepo_norm in ('all', 'kept'):
    got = weights_of(norm, aepo_norm, np.zeros(N, bool))
    np.testing.assert_array_equal(got, 0.0)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    hnp.arrays(np.int32, N, elements=st.integers(0, R)),
    st.permutations(range(N)), st.sampled_from(loss.NORMS),
    hnp.arrays(bool, N))
def test_weights_follow_a_permutation_and_ignore_empty_responses(
    lengths, order, norm, keep):
  def weights(lengths, groups, keep):
    return np.asarray(_jit_weights(
        jnp.array(lengths), jnp.array(groups), jnp.array(keep), norm=norm))
  order = np.array(order)
  before = weights(lengths, GROUPS, keep)
  np.testing.assert_allclose(
      weights(lengths[order], GROUPS[order], keep[order]), before[order],
      rtol=1e-6)
  np.testing.assert_array_equal(before[lengths == 0], 0.0)
  # Whether an empty response is kept moves nobody.
  np.testing.assert_array_equal(
      weights(lengths, GROUPS, keep | (lengths == 0)), before)


@functools.partial(jax.jit, static_argnames='norm')
def _jit_weights(lengths, groups, keep, norm):
  return loss.response_weights(
      lengths, groups, keep, loss_norm=norm, num_groups=NUM_GROUPS,
      max_response_len=R, aepo_norm='kept')


@pytest.mark.parametrize('norm', ['batch_tokens', 'group_tokens', 'seq_mean'])
def test_token_weights_sum_to_one(norm):
  np.testing.assert_allclose(
      np.sum(np.asarray(weights_of(norm)) * LENGTHS), 1.0, rtol=1e-6)


def test_masked_responses_still_count_in_the_denominator():
  _, data = problem()
  keep = data['keep']
  full, masked = weights_of(), weights_of(keep=keep)
  np.testing.assert_array_equal(masked[keep], full[keep])
  kept = weights_of(aepo_norm='kept', keep=keep)
  np.testing.assert_allclose(
      kept[keep], 1.0 / LENGTHS[keep].sum(), rtol=1e-6)


def test_cross_entropy_is_a_sum_and_its_count():
  logprobs = jnp.float32([[-1.0, -2.0, -jnp.inf], [-6.0, jnp.nan, 0.0]])
  mask = jnp.array([[True, True, False], [True, False, False]])
  got = loss.cross_entropy(logprobs=logprobs, loss_mask=mask)
  assert float(got.total) == 9.0
  assert float(got.count) == 3.0
  parts = sum((
      loss.cross_entropy(logprobs=logprobs[i:i + 1], loss_mask=mask[i:i + 1])
      for i in range(2)), start=reductions.zero())
  assert float(parts.mean()) == 3.0


@pytest.mark.parametrize('kwargs, word', [
    (dict(loss_norm='tokens'), 'tokens'),
    (dict(objective='ppo'), 'ppo'),
    (dict(eps_low=1.0), 'eps_low=1.0'),
    (dict(eps_high=-0.1), 'eps_high=-0.1'),
    (dict(dual_clip=1.0), 'dual_clip=1.0'),
    (dict(tis_cap=0.0), 'tis_cap=0.0'),
])
def test_bad_configuration_is_one_line_naming_the_value(kwargs, word):
  with pytest.raises(types.UserError, match=word) as error:
    loss.LossConfig(**kwargs)
  assert '\n' not in str(error.value)

"""Tests for longjax.train.step and longjax.train.state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from longjax import reductions, types
from longjax import rows as rows_lib
from longjax.model import architecture, compute, parameters
from longjax.rl import batch as batch_lib
from longjax.train import optimizer as optimizer_lib
from longjax.train import rl_job, state, step
from tests import tiny_model

PROMPTS = tiny_model.prompts([3, 12, 1, 7])
ROLLOUTS = tiny_model.rollouts(4, 3, 8)
PACKED = tiny_model.packed(PROMPTS, ROLLOUTS, row_len=40, num_rows=8)
MESHES = {'one': {}, 'data=2,fsdp=4': dict(data=2, fsdp=4)}


@struct.dataclass
class Seen:
  """How many tokens were trained on."""

  tokens: reductions.Average

  def __add__(self, other):
    return Seen(tokens=self.tokens + other.tokens)

  def summary(self):
    return {'trained_share': self.tokens.mean()}


def bigram_loss(params, rows, extras):
  """Cheap to compile; a bad batch makes the loss or only its gradient NaN."""
  hidden = params['embedding'][rows.tokens] + sum(
      jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
  logits = jnp.einsum('btd,dv->btv', hidden, params['head'])
  logprobs = jnp.take_along_axis(
      jax.nn.log_softmax(logits), rows.targets[..., None], axis=-1)[..., 0]
  total = -jnp.sum(jnp.where(rows.loss_mask, logprobs, 0.0))
  # The root's value at 0 is 0, its slope is infinite.
  root = jnp.sqrt(extras['under_root'] * jnp.sum(params['final_norm'] ** 2))
  root *= jnp.sum(rows.loss_mask) / 100.0
  seen = reductions.average(rows.loss_mask, rows.meta.group >= 0)
  return extras['scale'] * total + root, Seen(tokens=seen)


def extras(scale=0.01, under_root=1.0):
  return {'scale': jnp.float32(scale), 'under_root': jnp.float32(under_root)}


BAD = {'loss': extras(scale=np.nan), 'gradient': extras(under_root=0.0),
       'infinity': extras(scale=np.inf)}


@functools.cache
def compiled(mesh='one', schedule='constant'):
  """update, optimizer and rules."""
  rules = tiny_model.rules(**MESHES[mesh])
  optimizer = optimizer_lib.make(
      optimizer_lib.OptimizerConfig(
          learning_rate=1e-2, weight_decay=0.1,
          schedule=optimizer_lib.Schedule(schedule)),
      num_steps=10)
  update = step.make_update(
      bigram_loss, optimizer, config=tiny_model.MODEL, rules=rules)
  return update, optimizer, rules


@functools.cache
def created(mesh):
  _, optimizer, rules = compiled(mesh)
  return state.create(
      tiny_model.params(), tiny_model.MODEL, optimizer, rules)


def start(mesh='one'):
  """A state to be donated."""
  return jax.tree.map(lambda x: x.copy(), created(mesh))


def run(steps, mesh='one'):
  """Takes steps given as (extras, is_applied); host state and metrics."""
  update, *_ = compiled(mesh)
  now, metrics = start(mesh), []
  for values, is_applied in steps:
    now, one = update(now, [PACKED], values, is_applied)
    metrics.append(jax.device_get(one))
  return jax.device_get(now), metrics


GOOD = (extras(), True)


def assert_identical(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize('mesh', MESHES)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad, mesh):
  before, _ = run([GOOD], mesh)
  after, metrics = run(
      [GOOD, (BAD[bad], True), (BAD[bad], True), GOOD], mesh)
  at_bad, _ = run([GOOD, (BAD[bad], True)], mesh)
  assert_identical(at_bad.params, before.params)
  assert_identical(at_bad.opt_state, before.opt_state)
  assert at_bad.step == 2 and at_bad.num_skipped == 1
  assert [int(m['skipped']) for m in metrics] == [0, 1, 2, 2]
  assert [int(m['skipped_in_a_row']) for m in metrics] == [0, 1, 2, 0]
  assert after.step == 4
  # The run goes on as if the bad steps had not been.
  two, _ = run([GOOD, GOOD], mesh)
  assert_identical(after.params, two.params)
  assert_identical(after.opt_state, two.opt_state)


def test_only_the_gradient_may_be_bad():
  _, metrics = run([(BAD['gradient'], True)])
  assert np.isfinite(metrics[0]['loss'])
  assert not np.isfinite(metrics[0]['grad_norm'])


def test_a_step_that_is_not_applied_changes_nothing_and_is_not_counted():
  one, _ = run([GOOD])
  after, metrics = run([GOOD, (extras(), False)])
  assert_identical(after.params, one.params)
  assert_identical(after.opt_state, one.opt_state)
  assert after.step == 2 and after.num_skipped == 0
  assert metrics[1]['skipped_in_a_row'] == 0
  assert metrics[1]['grad_norm'] > 0


def test_a_good_step_changes_every_parameter_and_lowers_the_loss():
  after, metrics = run([GOOD] * 5)
  for new, old in zip(
      jax.tree.leaves(after.params), jax.tree.leaves(tiny_model.params())):
    assert (new != old).any()
  losses = [m['loss'] for m in metrics]
  assert losses == sorted(losses, reverse=True)


def test_the_state_is_donated_and_the_given_parameters_are_not():
  update, optimizer, rules = compiled()
  given = jax.device_put(tiny_model.params(), rules.sharding())
  first = state.create(given, tiny_model.MODEL, optimizer, rules)
  second, _ = update(first, [PACKED], extras(), True)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
  assert_identical(jax.device_get(given), tiny_model.params())
  assert int(second.step) == 1
  # The next stage starts from these parameters, which outlive its steps.
  third = state.create(second.params, tiny_model.MODEL, optimizer, rules)
  update(third, [PACKED], extras(), True)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(second.params))


@pytest.mark.parametrize('mesh', MESHES)
def test_each_shape_of_rows_is_compiled_once(mesh):
  traced = []

  def counted_loss(params, rows, extras):
    traced.append(rows.tokens.shape)
    return bigram_loss(params, rows, extras)

  rules, (_, optimizer, _) = tiny_model.rules(**MESHES[mesh]), compiled(mesh)
  update = step.make_update(
      counted_loss, optimizer, config=tiny_model.MODEL, rules=rules)
  longer = tiny_model.packed(PROMPTS, ROLLOUTS, row_len=56, num_rows=8)
  now = start(mesh)
  for i in range(4):
    # Another number of micro-batches each time, in another order.
    now, _ = update(
        now, [longer, *[PACKED] * i, longer][i % 2:],
        extras(scale=0.01 * (i + 1)), i % 2 == 0)
    now, _ = update(now, [PACKED], extras(), True)
  assert update.accumulate._cache_size() == 2
  assert update.apply._cache_size() == 1
  # Each for its program, and for the sums' shapes where it came first.
  assert {shape: traced.count(shape) for shape in traced} == {
      (8, 40): 2, (8, 56): 2}


def test_a_step_without_rows_is_refused():
  update, *_ = compiled()
  with pytest.raises(ValueError, match='at least one micro-batch'):
    update(start(), [], extras(), True)


def test_micro_batches_do_not_change_metrics_or_the_step():
  outcomes = []
  update, *_ = compiled()
  for num_rows in (8, 4, 1):
    after, metrics = update(
        start(), rows_lib.split(PACKED, num_rows), extras(), True)
    adam = optax.tree_utils.tree_get(after.opt_state, 'ScaleByAdamState')
    outcomes.append(jax.device_get((metrics, adam.mu)))
  (want, want_mu), *others = outcomes
  assert 0.0 < want['trained_share'] < 1.0
  for got, got_mu in others:
    assert got.keys() == want.keys()
    for name, value in want.items():
      np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)
    tiny_model.assert_trees_close(got_mu, want_mu)


def test_moments_lie_with_their_parameters():
  now = start('data=2,fsdp=4')
  _, optimizer, rules = compiled('data=2,fsdp=4')
  adam = optax.tree_utils.tree_get(now.opt_state, 'ScaleByAdamState')
  for moments in (adam.mu, adam.nu):
    jax.tree.map(
        lambda m, p: m.sharding.is_equivalent_to(p.sharding, p.ndim) or
        pytest.fail(f'{m.sharding} is not {p.sharding}'), moments, now.params)
  query = adam.mu['layers']['query']  # [L, D, N, H], D over fsdp=4.
  assert query.addressable_shards[0].data.shape == (2, 8, 4, 8)
  assert adam.count.sharding.is_fully_replicated
  # What a checkpoint restores into is the same.
  abstract = state.abstract(tiny_model.MODEL, optimizer, rules)

  def same(got, want):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert got.sharding.is_equivalent_to(want.sharding, len(want.shape))

  jax.tree.map(same, now, abstract)
  update = compiled('data=2,fsdp=4')[0]
  after, _ = update(now, [PACKED], extras(), True)
  jax.tree.map(same, after, abstract)


def test_parameters_that_do_not_divide_over_the_mesh_are_named():
  with pytest.raises(types.UserError, match='heads.*tensor=8'):
    state.param_shardings(tiny_model.MODEL, tiny_model.rules(tensor=8))


def test_score_gives_the_logprobs_the_loss_is_formed_from():
  stage = tiny_model.rl_stage()
  rules = tiny_model.rules()
  score = step.make_score(
      config=tiny_model.MODEL, temperature=stage.sampler.temperature,
      rules=rules, compute=compute.Compute(attention='reference'))
  scores = score(tiny_model.params(), PACKED)
  by_response = batch_lib.unpack(
      [np.asarray(scores.logprobs)], [PACKED], num_responses=12,
      max_response_len=8)
  given = tiny_model.extras(ROLLOUTS) | {
      'old_logprobs': by_response, 'sampler_logprobs': by_response}
  _, metrics = jax.jit(functools.partial(
      rl_job.loss, stage=stage, context=tiny_model.context(rules)))(
          tiny_model.params(), PACKED, given)
  summary = metrics.summary()
  np.testing.assert_allclose(summary['ratio/mean'], 1.0, atol=1e-6)
  assert summary['gap/logprob_max'] < 1e-6
  assert not np.asarray(scores.logprobs)[~PACKED.loss_mask].any()


def test_scores_do_not_depend_on_how_many_rows_run_at_once():
  for mesh, rows_at_once in (('one', 2), ('data=2,fsdp=4', 8)):
    rules = tiny_model.rules(**MESHES[mesh])
    packed = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), PACKED)
    score = step.make_score(
        config=tiny_model.MODEL, temperature=0.7, rules=rules,
        compute=compute.Compute(attention='reference'))
    want, *parts = (
        score(tiny_model.params(), step.put_rows(part, rules))
        for part in (packed, *rows_lib.split(packed, rows_at_once)))
    got = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        got, want)


def test_the_logical_axes_name_every_parameter():
  axes = parameters.axes(tiny_model.MODEL)
  shapes = parameters.abstract(tiny_model.MODEL)

  def one(names, leaf):
    assert len(names) == leaf.ndim

  jax.tree.map(one, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def test_factored_moments_lie_as_their_parameters_do():
  model = architecture.ModelConfig(
      vocab_size=128, embed_dim=256, ffn_dim=384, num_layers=2, num_heads=4,
      num_kv_heads=2, head_dim=64)
  optimizer = optimizer_lib.make(
      optimizer_lib.OptimizerConfig(
          learning_rate=1e-2, moments=optimizer_lib.Moments.FACTORED),
      num_steps=10)
  rules = tiny_model.rules(fsdp=4, tensor=2)
  abstract = state.abstract(model, optimizer, rules)
  factored = optax.tree_utils.tree_get(abstract.opt_state, 'FactoredState')
  by_row, by_column = factored.v_row['layers']['up'], factored.v_col[
      'layers']['up']
  # f32[L, D, F] with D over fsdp and F over tensor.
  assert (by_row.shape, by_column.shape) == ((2, 256), (2, 384))
  assert by_row.sharding.shard_shape(by_row.shape) == (2, 64)
  assert by_column.sharding.shard_shape(by_column.shape) == (2, 192)
  made = state.create(
      parameters.init(model, jax.random.key(0)), model, optimizer, rules)
  jax.tree.map(
      lambda x, want: x.sharding.is_equivalent_to(want.sharding, x.ndim) or
      pytest.fail(f'{x.sharding} is not {want.sharding}'), made, abstract)

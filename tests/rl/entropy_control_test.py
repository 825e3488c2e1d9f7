import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from longjax import types
from longjax.rl import entropy_control
from longjax.rl.entropy_control import AepoConfig, Mode

ABSOLUTE = AepoConfig(entropy_low=0.14, entropy_high=0.25)


@functools.partial(jax.jit, static_argnames='config')
def step(state, entropy, config):
  return entropy_control.update(state, entropy, config=config)


def run(series, config, state=None):
  """Modes of a series of batch entropies, and the last state."""
  state = entropy_control.init() if state is None else state
  modes = []
  for entropy in series:
    state = step(state, jnp.float32(entropy), config)
    modes.append(int(state.mode))
  return modes, state


def reference(series, config):
  """AEPO (arXiv:2512.12967, Sec. 4.4) as a plain state machine."""
  mode, stay, modes, baseline = 'FULL', 0, [], []
  for entropy in np.float32(series):
    if config.is_relative:
      is_ready = len(baseline) == config.baseline_steps
      h_0 = np.mean(baseline) if is_ready else 0.0
      low, high = config.low_ratio * h_0, config.high_ratio * h_0
    else:
      is_ready = True
      low, high = config.entropy_low, config.entropy_high
    if len(baseline) < config.baseline_steps:
      baseline.append(entropy)
    if is_ready:
      # A tie is decided by float32 rounding of the baseline.
      hypothesis.assume(min(abs(entropy - low), abs(entropy - high)) > 1e-6)
      if mode == 'FULL':
        if entropy > high:
          mode, stay = 'POS', 0
      elif entropy < low or (
          config.max_pos_steps and stay >= config.max_pos_steps):
        mode = 'FULL'
    stay = stay + 1 if mode == 'POS' else 0
    modes.append(int(mode == 'POS'))
  return modes


ENTROPIES = st.integers(50, 500).map(lambda x: x / 1000)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    st.lists(ENTROPIES, min_size=1, max_size=25),
    st.sampled_from([
        ABSOLUTE, AepoConfig(), AepoConfig(max_pos_steps=3),
        AepoConfig(baseline_steps=1, high_ratio=1.5, low_ratio=0.9),
        AepoConfig(entropy_low=0.1, entropy_high=0.3, max_pos_steps=1),
    ]))
def test_the_controller_equals_a_plain_state_machine(series, config):
  assert run(series, config)[0] == reference(series, config)


# The digitised Fig. 11 of arXiv:2512.12967: per cycle the FULL steps with the
# entropy at their ends, and the POS steps with theirs.
FIG_11 = (
    ((0, 89), (0.123, 0.280), (90, 104), (0.274, 0.133)),
    ((105, 144), (0.133, 0.240), (145, 154), (0.250, 0.137)),
    ((155, 194), (0.123, 0.190), (195, 202), (0.180, 0.117)),
)


def test_the_entropy_of_figure_11_switches_on_its_steps():
  # In cycle 3 the entropy at the switch is below that of the step before, so
  # the figure's decision used the previous step's entropy ('lagged').
  series, configs, expected = [], [], []
  for full, full_path, pos, pos_path in FIG_11:
    up = np.linspace(*full_path, full[1] - full[0] + 1)
    down = np.linspace(*pos_path, pos[1] - pos[0] + 1)
    config = AepoConfig(
        # No single pair of thresholds fits: each cycle has its own.
        entropy_high=float(up[-2] + up[-1]) / 2,
        entropy_low=float(down[-2] + down[-1]) / 2)
    series += [*up, *down]
    configs += [config] * (len(up) + len(down))
    expected += [0] * len(up) + [1] * len(down)
  assert len(series) == 203

  state, modes = entropy_control.init(), []
  for t in range(len(series)):
    state = step(state, jnp.float32(series[max(t - 1, 0)]), configs[
        max(t - 1, 0)])
    modes.append(int(state.mode))
  assert modes == expected
  switches = [t for t in range(1, 203) if modes[t] != modes[t - 1]]
  assert switches == [90, 105, 145, 155, 195]
  assert int(state.num_switches) == 5
  assert int(state.steps_in_pos) == 8


def test_relative_thresholds_catch_the_first_cycle_of_figure_11():
  up = np.linspace(0.123, 0.280, 90)
  modes, state = run([*up, *np.linspace(0.274, 0.120, 15)], AepoConfig())
  low, high = entropy_control.thresholds(state, AepoConfig())
  h_0 = up[:3].mean()
  np.testing.assert_allclose([low, high], [1.1 * h_0, 2.0 * h_0], rtol=1e-6)
  first = int(np.argmax(up > 2.0 * h_0))
  assert modes[:90] == [0] * first + [1] * (90 - first)
  assert modes[-1] == Mode.FULL


def test_the_decision_applies_to_the_batch_it_was_measured_on():
  modes, _ = run([0.2, 0.26], ABSOLUTE)
  assert modes == [Mode.FULL, Mode.POS]


def test_between_the_thresholds_the_mode_stays_what_it_was():
  modes, _ = run([0.2, 0.3, 0.2, 0.13, 0.2, 0.3], ABSOLUTE)
  assert modes == [0, 1, 1, 0, 0, 1]


def test_thresholds_themselves_switch_nothing():
  config = AepoConfig(entropy_low=0.125, entropy_high=0.25)
  assert run([0.25, 0.375, 0.125], config)[0] == [0, 1, 1]


def test_the_baseline_steps_stay_full_however_high_the_entropy():
  modes, state = run([1.0, 9.0, 2.0, 8.5], AepoConfig())
  assert modes == [0, 0, 0, 1]
  assert float(state.baseline.mean()) == 4.0


def test_there_is_no_band_before_the_baseline_is_measured():
  _, state = run([1.0, 1.0], AepoConfig())
  low, high = entropy_control.thresholds(state, AepoConfig())
  assert float(low) == 0.0 and np.isinf(high)


def test_an_entropy_that_is_not_finite_changes_nothing():
  _, state = run([0.3], ABSOLUTE)
  modes, after = run([np.nan], ABSOLUTE, state)
  assert modes == [Mode.POS]
  np.testing.assert_allclose(after.baseline.count, state.baseline.count)
  assert run([np.nan, 1.0, 1.0, 1.0, 3.0], AepoConfig())[0] == [0, 0, 0, 0, 1]


def test_max_pos_steps_releases_although_entropy_stays_high():
  config = AepoConfig(entropy_low=0.1, entropy_high=0.2, max_pos_steps=2)
  assert run([0.3] * 7, config)[0] == [1, 1, 0, 1, 1, 0, 1]


def test_disabled_never_masks():
  config = AepoConfig(entropy_low=0.1, entropy_high=0.2, enabled=False)
  modes, state = run([0.9, 0.9], config)
  assert modes == [0, 0]
  assert int(state.num_switches) == 0


def kept(mode, advantages, rewards, **kwargs):
  state = entropy_control.init().replace(mode=jnp.int32(mode))
  return entropy_control.keep(
      state, jnp.float32(advantages), jnp.float32(rewards),
      config=AepoConfig(**kwargs)).tolist()


def test_full_keeps_everything():
  assert kept(Mode.FULL, [1, 0, -1], [1, 0, 0]) == [True, True, True]


def test_pos_keeps_positive_advantages_with_positive_rewards():
  advantages, rewards = [1.0, 0.0, -1.0, 0.5], [1.0, 1.0, 0.0, -0.2]
  assert kept(Mode.POS, advantages, rewards) == [True, False, False, False]
  assert kept(Mode.POS, advantages, rewards, require_pos_reward=False) == [
      True, False, False, True]


def test_sequence_and_token_means_weigh_responses_differently():
  entropy = jnp.float32([[1.0, 1.0, 1.0, 9.0], [4.0, 9.0, 9.0, 9.0],
                         [7.0, 7.0, 7.0, 7.0]])
  mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
  by_sequence = entropy_control.batch_entropy(entropy, mask, agg='seq_mean')
  by_token = entropy_control.batch_entropy(entropy, mask, agg='token_mean')
  assert float(by_sequence.mean()) == 2.5
  assert float(by_sequence.count) == 2.0
  assert float(by_token.mean()) == 1.75
  assert float(by_token.count) == 4.0
  np.testing.assert_array_equal(
      entropy_control.response_entropy(entropy, mask), [1.0, 4.0, 0.0])


def test_an_absolute_band_below_the_measured_entropy_is_refused():
  _, state = run([0.3, 0.3, 0.3], ABSOLUTE)
  with pytest.raises(types.UserError, match=r'entropy_high=0\.25.*0\.300'):
    entropy_control.check_baseline(state, ABSOLUTE)
  _, state = run([0.2, 0.2], ABSOLUTE)
  entropy_control.check_baseline(state, ABSOLUTE)
  _, state = run([0.2, 0.2, 0.2], ABSOLUTE)
  entropy_control.check_baseline(state, ABSOLUTE)
  entropy_control.check_baseline(state, AepoConfig())


@pytest.mark.parametrize('kwargs, word', [
    (dict(entropy_low=0.3, entropy_high=0.2), 'entropy_low=0.3'),
    (dict(entropy_low=0.2, entropy_high=0.2), 'entropy_low < entropy_high'),
    (dict(entropy_low=-0.1, entropy_high=0.2), 'entropy_low=-0.1'),
    (dict(entropy_high=0.2), 'set both'),
    (dict(entropy_low=0.2), 'set both'),
    (dict(low_ratio=2.0), 'low_ratio=2.0'),
    (dict(low_ratio=0.0), 'low_ratio=0.0'),
    (dict(low_ratio=0.5, high_ratio=0.9), 'below the starting entropy'),
    (dict(baseline_steps=0), 'baseline_steps=0'),
    (dict(max_pos_steps=-1), 'max_pos_steps=-1'),
    (dict(entropy_agg='mean'), "entropy_agg='mean'"),
    (dict(aepo_norm='some'), "aepo_norm='some'"),
])
def test_bad_configuration_is_one_line_naming_the_value(kwargs, word):
  with pytest.raises(types.UserError, match=word) as error:
    AepoConfig(**kwargs)
  assert '\n' not in str(error.value)

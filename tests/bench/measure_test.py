import time

import jax
import jax.numpy as jnp

from longjax.bench import measure


def test_the_clock_waits_for_the_result():
  product = jax.jit(lambda x: jnp.linalg.matrix_power(x, 64))
  x = jnp.zeros((400, 400))
  product(x)
  reading, result = measure.timed(lambda: product(x))
  start = time.perf_counter()
  jax.block_until_ready(result)
  assert time.perf_counter() - start < reading.seconds
  assert reading.cpu_seconds > 0.0


def test_sleeping_takes_time_but_no_cpu():
  reading, _ = measure.timed(lambda: time.sleep(0.2))
  assert reading.seconds >= 0.2
  assert reading.cpu_seconds < 0.1


def test_medians_are_of_each_number_by_itself():
  readings = [
      measure.Reading(seconds=s, cpu_seconds=c, values={'loss': s})
      for s, c in ((1.0, 9.0), (3.0, 2.0), (2.0, 5.0))]
  assert measure.median(readings) == measure.Reading(
      seconds=2.0, cpu_seconds=5.0, values={'loss': 2.0})


def test_only_what_is_compiled_inside_counts():
  function = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))
  x = jnp.ones((7, 7))
  with measure.CompileClock() as clock:
    function(x)
  seconds = clock.seconds
  assert seconds > 0.0
  with measure.CompileClock() as again:
    function(x)
  assert again.seconds == 0.0
  jax.jit(lambda x: jnp.tan(x))(x)
  assert clock.seconds == seconds

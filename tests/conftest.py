"""Sets eight CPU devices and strict broadcasting, once, before jax starts."""

import os
import sys

if 'jax' in sys.modules:
  raise RuntimeError('conftest must configure jax before anything imports it.')

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join([
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    # Most of the time would go into optimising programs that run once.
    '--xla_backend_optimization_level=0',
]).strip()

import jax

# Adding f32[T] to f32[B, T] without saying so is how masks go wrong.
jax.config.update('jax_numpy_rank_promotion', 'raise')

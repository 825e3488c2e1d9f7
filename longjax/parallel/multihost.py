"""Manners of a program that runs as several processes.

Every process runs the same collectives in the same order; only the primary
one writes files and logs.
"""

import jax


def is_primary() -> bool:
  """True in the one process that writes files and logs."""
  return jax.process_index() == 0

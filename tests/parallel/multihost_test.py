from unittest import mock

import jax

from longjax.parallel import multihost


def test_only_process_zero_is_primary():
  assert multihost.is_primary()
  with mock.patch.object(jax, 'process_index', return_value=1):
    assert not multihost.is_primary()

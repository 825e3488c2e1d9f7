"""A checkout whose scripts install and rent nothing."""

import pytest

from tests.launch import stand_ins


@pytest.fixture
def checkout(tmp_path):
  # A space in the path, as on many a laptop.
  path = tmp_path / 'my checkout'
  path.mkdir()
  made = stand_ins.Checkout(path)
  yield made
  made.kill()

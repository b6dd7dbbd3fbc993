import importlib

import pytest

from drift_jax import metrics


@pytest.mark.parametrize("name", sorted(metrics.HOMES))
def test_a_public_name_is_no_module(name):
  """As an imported module of that name would be."""
  home = importlib.import_module(metrics.HOMES[name])
  assert getattr(metrics, name) is getattr(home, name)

"""Devices that are not there: one line, whichever program looks for them."""

import jax
import pytest

from drift_jax.system import devices, sharding


@pytest.mark.parametrize(
  "error", [RuntimeError("Unable to\ninitialize"), AssertionError()]
)
def test_what_jax_raises_becomes_one_line(monkeypatch, error):
  def fail():
    raise error

  monkeypatch.setattr(jax, "devices", fail)
  with pytest.raises(devices.DeviceError, match="JAX_PLATFORMS=cpu") as caught:
    sharding.make_mesh()
  assert "\n" not in str(caught.value)

import numpy as np
import pytest

from drift_jax.metrics.frechet import FeatureStream, check_frechet_width
from drift_jax.system import devices
from drift_jax.system.errors import EvaluationError


def test_a_container_has_what_it_is_given(tmp_path, monkeypatch):
  machine = devices.machine_memory()
  assert machine > 2**28
  limits = [tmp_path / name for name in ("none", "max", "bytes")]
  limits[1].write_text("max\n")
  limits[2].write_text("123456789\n")
  monkeypatch.setattr(devices, "_LIMITS", limits[:2])
  assert devices.machine_memory() >= machine
  monkeypatch.setattr(devices, "_LIMITS", limits)
  assert devices.machine_memory() == 123456789


def test_a_distance_of_large_pictures_is_refused_anywhere():
  """A matrix of 256 px alone takes 309 GB."""
  check_frechet_width(2048, "fid")
  with pytest.raises(
    EvaluationError, match="fd_pixel.* 196608 x 196608 .*2.47e.03 GB"
  ):
    check_frechet_width(256 * 256 * 3, "fd_pixel")


def test_a_stream_says_so_before_it_allocates(monkeypatch):
  monkeypatch.setattr(devices, "machine_memory", lambda: 10**6)
  stream = FeatureStream()
  stream.update(np.zeros((3, 80)))
  with pytest.raises(EvaluationError, match="100 x 100 .*this machine"):
    FeatureStream().update(np.zeros((3, 100)))

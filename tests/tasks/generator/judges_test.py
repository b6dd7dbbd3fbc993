"""Figures that a machine can't compute are refused before anything is."""

import numpy as np
import pytest

from configs import digits
from drift_jax import config as config_lib
from drift_jax.system import devices, sharding
from drift_jax.tasks import parse
from drift_jax.tasks.generator.evaluators import run_evaluators
from drift_jax.training.inputs import open_readers


def test_a_distance_of_pixels_names_those_of_networks(monkeypatch):
  config = digits.get_config("smoke")
  config.eval.metrics = ("fd_pixel",)
  config = parse(config)
  readers = open_readers(config, None)
  mesh = sharding.make_mesh()

  def build():
    labels = np.arange(10, dtype=np.int32)
    return run_evaluators(config, {}, readers, labels, None, mesh)

  assert len(build()[0]) == 1
  monkeypatch.setattr(devices, "machine_memory", lambda: 64**2 * 64)
  with pytest.raises(
    config_lib.ConfigError,
    match="eval.metrics holds 'fd_pixel'.* 64 x 64 .*'fd_inception'",
  ):
    build()

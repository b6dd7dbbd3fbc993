"""Devices that are not there: one line, whichever program looks for them."""

import jax
import pytest

from drift_jax.system import devices, sharding
from tests.process import call
from tests.small_generator import save_generator

EACH = """if True:
  import runpy
  import sys
  import drift_jax
  from drift_jax.system.errors import ERRORS
  from drift_jax.tasks.generator import reports, train
  from drift_jax.tools.work import cache_latents, export
  from configs import digits

  source, out = sys.argv[1:]
  for program in (
    lambda: drift_jax.load(source),
    lambda: export.export(source, out),
    lambda: reports.report_on_images(source, reports.Request()),
    lambda: train.train_and_evaluate(digits.get_config("smoke"), out),
  ):
    try:
      program()
    except ERRORS as error:
      print(f"Error: {error}")
  sys.argv = ["main", "--config=configs/toy.py:smoke", f"--workdir={out}"]
  runpy.run_module("drift_jax.main", run_name="__main__")
"""


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


@pytest.mark.system
def test_programs_that_are_told_to_use_what_is_not_there(tmp_path):
  source = save_generator(tmp_path / "generator")
  out = tmp_path / "out"
  done = call("-c", EACH, source, out, JAX_PLATFORMS="nonsense")
  lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
  assert len(lines) == 5, lines
  for line in lines:
    assert line.startswith("Error: JAX finds no devices with JAX_PLATFORMS=non")
  assert not out.exists()

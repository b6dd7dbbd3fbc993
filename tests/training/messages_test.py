"""What a run says at its start, of its speed, and at its end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from drift_jax.system import sharding
from drift_jax.training import messages


@jax.jit
def step(state, batch, frozen):
  return state + 1, {"loss": (batch @ frozen).sum()}


@pytest.mark.parametrize("peak", [{}, {"cpu": 1e6}])
def test_a_step_names_its_speed(tmp_path, caplog, monkeypatch, peak):
  monkeypatch.setattr(messages, "PEAK_FLOPS", peak)
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  frozen, batch = jnp.ones((8, 4)), jnp.ones((2, 8))
  for seconds_known in (False, True):
    timed = messages.Step(step, frozen, epath.Path(tmp_path), mesh, images=2)
    with caplog.at_level("INFO", "drift_jax"):
      for count in range(3):
        state, metrics = timed(jnp.asarray(count), batch)
        assert (int(state), float(metrics["loss"])) == (count + 1, 64.0)
    lines = [r.message for r in caplog.records if "Compil" in r.message]
    assert len(lines) == 2  # at the first call alone
    assert ("last time" in lines[0]) == seconds_known
    caplog.clear()
  speeds = {"perf/steps_per_second": 3.0, "perf/images_per_second": 6.0}
  if peak:
    speeds["perf/mfu"] = 3.0 * (2 * 2 * 8 * 4) / 1e6
  assert timed.speeds(3.0) == pytest.approx(speeds)


def test_a_large_network_on_a_cpu_is_told_loudly(caplog):
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  for size, warned in ((1_000, 0), (100_000_000, 1)):
    caplog.clear()
    with caplog.at_level("INFO", "drift_jax"):
      params = {"x": jax.ShapeDtypeStruct((size,), np.float32)}
      messages.start("generator", "float32", params, mesh)
    assert len(caplog.records) == 1 + warned

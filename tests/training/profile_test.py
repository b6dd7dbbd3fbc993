"""Profiles of some of a run's steps."""

import jax.numpy as jnp
import pytest
from etils import epath

from drift_jax.training.profile import Profile


@pytest.mark.parametrize(
  "window, traced",
  [("2:3", [2, 3, 4]), ("5:9", [5, 6]), ("7:1", [])],
)
def test_a_window_of_steps_is_traced(tmp_path, window, traced, monkeypatch):
  """Also one that the run ends in."""
  inside, seen = False, []

  class Trace:
    def __init__(self, folder):
      self.folder = epath.Path(folder)

    def __enter__(self):
      nonlocal inside
      inside = True

    def __exit__(self, *_):
      nonlocal inside
      inside = False
      (self.folder / "plugins").mkdir()
      (self.folder / "plugins" / "trace").write_text("events")

  monkeypatch.setattr("jax.profiler.trace", Trace)
  profile = Profile(window, epath.Path(tmp_path), range(1, 7))
  for step in range(1, 7):
    profile(step, jnp.ones(1))
    seen += [step] * inside
  profile.close()
  assert (seen, inside) == (traced, False)
  files = [x for x in (tmp_path / "profile").rglob("*") if x.is_file()]
  assert [x.read_text() for x in files] == ["events"] * bool(traced)

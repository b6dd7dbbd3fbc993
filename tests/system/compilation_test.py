"""Compiled programs that stay on the disk, and how they are found."""

import json
import pathlib

import pytest

from tests.process import call

RUN = ("-m", "drift_jax.main", "--config=configs/toy.py:smoke")


def start(cache, workdir, *flags, **variables: str):
  """A run of the smallest config; returns what it has compiled, by file."""
  place: dict[str, str] = {
    "XDG_CACHE_HOME": str(cache),
    "JAX_COMPILATION_CACHE_DIR": "",
  }
  command = (*RUN, f"--workdir={workdir}", *flags)
  done = call(*command, devices=1, timeout=300, **(place | variables))
  assert done.returncode == 0, done.stderr[-3000:]
  return {
    file.relative_to(cache): file.stat().st_mtime_ns
    for file in pathlib.Path(cache).rglob("*-cache")
  }


@pytest.mark.system
def test_a_second_start_compiles_nothing_and_trains_the_same(tmp_path):
  profile = "--config.train.profile=3:2"
  compiled = start(tmp_path / "cache", tmp_path / "one", profile)
  assert any(file.name.startswith("jit_toy_step") for file in compiled)
  assert start(tmp_path / "cache", tmp_path / "two") == compiled
  assert [*(tmp_path / "one" / "profile").rglob("*.xplane.pb")]
  one, two = (
    json.loads((tmp_path / name / "figures.json").read_text())
    for name in ("one", "two")
  )
  assert one | {"seconds": 0} == two | {"seconds": 0}


@pytest.mark.system
@pytest.mark.parametrize(
  "flags, variables",
  [
    (["--config.train.keep_compiled=False"], {}),
    # Somewhere else.
    ([], {"JAX_COMPILATION_CACHE_DIR": "{elsewhere}"}),
    # A file is there: it can't be made, and the run goes on without it.
    ([], {"XDG_CACHE_HOME": "{file}"}),
  ],
)
def test_nothing_is_kept_there(tmp_path, flags, variables):
  (tmp_path / "file").write_text("")
  places = {name: tmp_path / name for name in ("elsewhere", "file")}
  variables = {k: v.format(**places) for k, v in variables.items()}
  assert not start(tmp_path / "cache", tmp_path / "run", *flags, **variables)
  kept = [*places["elsewhere"].glob("*-cache")]
  assert bool(kept) == ("JAX_COMPILATION_CACHE_DIR" in variables)

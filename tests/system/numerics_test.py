"""JAX's settings: the same images and runs whatever a user has chosen."""

import contextlib
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

import drift_jax
from configs import digits
from drift_jax.config import ConfigError
from drift_jax.system import numerics, paths
from drift_jax.tasks.generator import train
from tests.process import call
from tests.small_generator import save_generator

PACKAGE = pathlib.Path(drift_jax.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return save_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture
def other_settings():
  """All of them at once, of this thread."""
  with contextlib.ExitStack() as stack:
    for context in (
      jax.enable_x64(True),
      jax.default_prng_impl("rbg"),
      jax.threefry_partitionable(False),
      jax.numpy_rank_promotion("raise"),
      jax.disable_jit(True),
    ):
      stack.enter_context(context)
    yield


def drawn(folder):
  """Images at once, and in batches."""
  model = drift_jax.load(folder)
  asked = {"alpha": 1.5, "seed": 3}
  labels = np.array([0, 2, 1], np.int32)
  batches = [
    batch.rows(batch.pixels)
    for batch in model.batches(labels, **asked, batch_size=2)
  ]
  return model.sample(["0", "2"], **asked).images, *batches


@pytest.fixture(scope="module")
def expected(folder):
  return drawn(folder)


def test_python_api_draws_the_same(folder, expected, other_settings):
  for found, image in zip(drawn(folder), expected, strict=True):
    np.testing.assert_array_equal(found, image)
  # Between two calls the user's own hold.
  assert jax.numpy.zeros(1).dtype == np.float64


def test_training_refuses_other_settings(tmp_path, other_settings):
  with pytest.raises(ConfigError, match="'jax_enable_x64', False"):
    train.train_and_evaluate(digits.get_config("smoke"), str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_offset_of_seeds_is_refused(folder):
  """No thread can have its own."""
  jax.config.update("jax_random_seed_offset", 3)
  try:
    with pytest.raises(ConfigError, match="jax_random_seed_offset=3 would"):
      drift_jax.load(folder)
  finally:
    jax.config.update("jax_random_seed_offset", 0)


@pytest.mark.system
def test_variables_do_not_change_what_a_program_draws(
  folder, expected, tmp_path
):
  variables = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "3",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DISABLE_JIT": "1",
  }
  assert {name.lower() for name in variables} == set(numerics.PINNED)
  done = call(
    *("-m", "drift_jax.sample", f"--from={folder}", "--labels=0,2"),
    *("--count=1", "--alpha=1.5", "--seed=3", f"--out={tmp_path / 'grid.png'}"),
    **variables,
  )
  assert done.returncode == 0, done.stderr
  for name in variables:
    assert f"{name}=" in done.stderr
  with Image.open(tmp_path / "grid.png") as image:
    grid = np.asarray(image).astype(int)
  samples = drift_jax.sampling.Samples(expected[0], np.array([0, 2]), 1)
  assert np.abs(grid - samples.grid()).max() <= 1


def test_every_program_pins_them():
  # One starts the others; an export's functions are lowered already.
  others = {PACKAGE / "__main__.py", PACKAGE / "tools" / "run_export.py"}
  for path in {*PACKAGE.rglob("*.py")} - others:
    text = path.read_text()
    if '__name__ == "__main__"' in text:
      pins = ("programs.run(", "programs.setup()", "table.main")
      assert any(name in text for name in pins), path


@pytest.mark.parametrize(
  ("variables", "folder"),
  [
    ({"XDG_CACHE_HOME": "{tmp}/x"}, "{tmp}/x/drift_jax"),
    ({"HF_HOME": "{tmp}/hub/home"}, "{tmp}/hub/drift_jax"),
    ({"HF_HOME": "/"}, "/drift_jax"),
    ({"HF_HOME": "here"}, "{cwd}/drift_jax"),
  ],
)
def test_the_user_s_cache(tmp_path, monkeypatch, variables, folder):
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value.format(tmp=tmp_path))
  expected = folder.format(tmp=tmp_path, cwd=pathlib.Path.cwd())
  assert str(paths.user_cache()) == expected

"""Test set-up: eight CPU devices, strict dtypes, checked shapes."""

import functools
import gc
import os
import pathlib
import shutil
import tempfile
from typing import Any

from tests import compiler

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", compiler.flags(compiler.QUICK))

# Those which the hook below would compile anew: it has its own compiled files
# for all that is first imported under it.
import beartype  # noqa: F401
import flax.linen  # noqa: F401
import grain  # noqa: F401
import jax
import numpy as np
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401
import pytest
from absl import flags
from jaxtyping import install_import_hook

from tests.process import COMPILED

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Shapes of the pure maths are enforced, not commented.
install_import_hook(
  [
    "drift_jax.drift",
    "drift_jax.models",
    "drift_jax.metrics",
    "drift_jax.tasks.toy.model",
    "drift_jax.tasks.toy.figures",
    "drift_jax.tasks.policy.network",
    "drift_jax.tasks.policy.observations",
    "drift_jax.tasks.policy.unet1d",
  ],
  "beartype.beartype",
)
flags.FLAGS.mark_as_parsed()

# For tests of small numbers.
precise_jit = functools.partial(jax.jit, compiler_options=compiler.USUAL)

ROOT = pathlib.Path(__file__).parent.parent

# What a test process compiles is kept for the next run of the tests, among
# pytest's own caches.
_KEPT = ROOT / ".pytest_cache" / "compiled"
_KEPT_MOST = 2**30  # bytes
jax.config.update("jax_compilation_cache_dir", str(_KEPT))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_configure(config: pytest.Config) -> None:
  """Makes the folder of tests.process; the workers have its name from here."""
  if hasattr(config, "workerinput"):
    return
  folder = tempfile.TemporaryDirectory()
  os.environ[COMPILED] = folder.name
  config.add_cleanup(folder.cleanup)
  if sum(file.stat().st_size for file in _KEPT.glob("*")) > _KEPT_MOST:
    shutil.rmtree(_KEPT)


def pytest_xdist_auto_num_workers() -> int:
  """One more than cores, as tests wait for processes; at most four."""
  return min(4, 1 + (os.cpu_count() or 1))


# Files that take a minute, the longest first: a worker that begins one last
# would leave the others without work.
SLOW_FILES = (
  "multiprocess_test.py",
  "tasks/generator/train_test.py",
  "tasks/generator/step_test.py",
  "tasks/policy/train_test.py",
  "evaluate_test.py",
  "smoke_test.py",
  "benchmarks_test.py",
  "cloud_test.py",
  "tasks/generator/decoded_test.py",
  "tools/ablate_test.py",
  "tools/compile_check_test.py",
  "models/mae_test.py",
  "drift/family_test.py",
)

GOLDEN = ROOT / "tests" / "golden"


def relative_error(actual, expected) -> float:
  """|actual - expected| / |expected| in float64; 0 / 0 is 0."""
  actual = np.asarray(actual, np.float64)
  expected = np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, (actual.shape, expected.shape)
  difference = np.linalg.norm(actual - expected)
  norm = np.linalg.norm(expected)
  return float(
    difference if difference == 0 or norm == 0 else difference / norm
  )


def assert_close(actual, expected, rtol: float, name: str = "") -> None:
  """Fails when the relative error of the whole array exceeds rtol."""
  error = relative_error(actual, expected)
  assert error <= rtol, f"{name}: relative error {error:.3g} > {rtol:g}"


@pytest.fixture(scope="session")
def golden():
  """Loads tests/golden/NAME.npz as a dict of arrays, each file once."""
  cache: dict[str, dict[str, np.ndarray]] = {}

  def load(name: str) -> dict[str, np.ndarray]:
    if name not in cache:
      with np.load(GOLDEN / f"{name}.npz") as archive:
        cache[name] = {key: archive[key] for key in archive.files}
    return cache[name]

  return load


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Slow files first, the others in their order."""
  rank = {name: number for number, name in enumerate(SLOW_FILES)}
  items.sort(
    key=lambda item: rank.get(
      item.nodeid.partition("::")[0].removeprefix("tests/"), len(rank)
    )
  )


def pytest_collection_finish() -> None:
  """Leaves modules out of garbage collections: tracing makes many of them."""
  gc.collect()
  gc.freeze()


def kernel_costs(jaxpr: Any) -> list[Any]:
  """Declared costs of all Pallas kernels, in order."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      found.append(equation.params["cost_estimate"])
      continue
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        found += kernel_costs(inner)
  return found

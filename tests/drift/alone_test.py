"""The method without this package's other needs: docs/drift_loss.md."""

import json
import re

import pytest

from tests.process import ROOT, call

# What jax and jaxtyping bring, the plain loops' needs.
ALONE = "jax jaxlib jaxtyping numpy ml_dtypes opt_einsum scipy wadler_lindig"
# Runs programs one after the other, where only some packages are there, and
# prints what they leave: of the plain loops the mean distance from the circle.
RUN = """if True:
  import json, sys
  from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

  class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *where):
      top = name.partition(".")[0]
      if top in allowed or top.startswith("_"):
        return super().find_spec(name, *where)

  allowed = {"drift_jax", *sys.argv[1].split(), *sys.stdlib_module_names}
  if sys.argv[1]:
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Finder]
  space, told = {}, []
  for program in json.loads(sys.argv[2]):
    exec(compile(program, "docs/drift_loss.md", "exec"), space)
    if "samples" in space:
      radius = space["jnp"].linalg.norm(space.pop("samples"), axis=1)
      told.append(float(abs(radius - 2).mean()))
  if "by_jit" in space:
    loss = space["loss_of"](space["gen"], space["pos"])
    for split in (space["by_jit"], space["by_shard_map"]):
      told.append(float(abs(split - loss).max() / loss.max()))
  names = {name.partition(".")[0] for name in sys.modules}
  print(json.dumps([told, sorted(names)]))
"""
# Every function of the method, and the gradient of the loss.
ALL = """if True:
  import jax
  import jax.numpy as jnp
  import drift_jax
  from drift_jax import drift
  assert {"load", "released"} <= {*dir(drift_jax)}
  try:
    drift_jax.load
  except ImportError as error:
    assert type(error).__name__ == "MissingError", error
    assert error.__suppress_context__ and "--no-deps" in str(error)

  for names in drift._NAMES.values():
    [getattr(drift, name) for name in names]
    assert {*names} <= {*dir(drift)}
  import drift_jax.drift.fused

  def every(x, y, z):
    for field in drift.FIELDS:
      yield jax.grad(lambda x: drift.drift_loss(
        x, y, z, temperatures=0.3, variant=drift.Variant(field=field)
      )[0].sum())(x)
    pair = {"a": x[:, :, None]}, {"a": y[:, :, None]}, jnp.zeros(2)
    yield drift.drift_losses(*pair, num_positives=8, temperatures=0.3)[0]
    yield drift.paper_loss(x, y, z, jnp.ones((2, 8)), (0.3,))
    yield drift.root_mean_square(x.reshape(2, 8, 2, 2))
    points = x[0], y[0], z[0], 1.0
    yield drift.compute_v(*points, mask_self=False)
    yield drift.coefficients(*points, mask_self=False)[0]
    yield drift.compute_field(*points, field="mmd", kernel="laplace")

  arrays = jax.random.normal(jax.random.key(0), (3, 2, 8, 4))
  for found in jax.jit(lambda *arrays: list(every(*arrays)))(*arrays):
    assert jnp.isfinite(found).all() and jnp.any(found != 0)
"""


def blocks() -> dict[str, list[str]]:
  """{heading: its Python, with what is above it for all} of the page."""
  text = (ROOT / "docs" / "drift_loss.md").read_text()
  found: dict[str, list[str]] = {}
  for part in re.split(r"^##+ ", text, flags=re.MULTILINE):
    heading = part.partition("\n")[0]
    found[heading] = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
  return found


def run(allowed: str, programs: list[str]) -> tuple[list[float], set[str]]:
  """(what the programs leave, packages that are imported)."""
  done = call("-c", RUN, allowed, json.dumps(programs), devices=2)
  assert done.returncode == 0, done.stderr
  told, names = json.loads(done.stdout.splitlines()[-1])
  return told, set(names)


@pytest.mark.slow
def test_the_method_needs_jax_and_jaxtyping_alone():
  page = blocks()
  told, imported = run(
    ALONE,
    [
      ALL,
      *(page["Three loops"] + page["Plain JAX"] + page["Guidance"]),
      *(page["Several features"] + page["Over a mesh"]),
    ],
  )
  assert told[0] < 0.4 and max(told[1:]) < 1e-5, told
  assert not imported & {"absl", "etils", "flax", "ml_collections", "optax"}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("package", "heading"), [("flax", "Flax NNX"), ("equinox", "Equinox")]
)
def test_the_loop_of_another_library_learns_the_circle(package, heading):
  page = blocks()
  ((distance,), imported) = run("", page["Three loops"] + page[heading])
  assert distance < 0.4 and package in imported

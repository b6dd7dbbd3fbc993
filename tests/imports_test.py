"""The import rule: only from a lower rank; siblings only inside a folder."""

import ast
import pathlib

import pytest

from tests import process

PACKAGE = pathlib.Path(__file__).parent.parent / "drift_jax"
RANKS = {
  "system": 0,
  "drift": 1,
  "config": 2,
  "data": 2,
  "models": 2,
  "metrics": 3,
  "training": 4,
  "tasks": 5,
  "evaluate": 6,
  "sampling": 6,
  "tools": 7,
  "serve": 7,
  "sample": 8,
  "main": 8,
  "__main__": 8,
}
# What pure code must not touch: configs, meshes, files and clocks.
FORBIDDEN_IN_PURE = {
  "ml_collections",
  "drift_jax.config",
  "drift_jax.system",
  "orbax",
  "pathlib",
  "os",
  "io",
  "time",
  "datetime",
}


def unit_of(path: pathlib.Path) -> str:
  """The ranked name that a file belongs to."""
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST):
  """Dotted names of every import, those inside functions included."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "relative imports hide the rank"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files():
  return [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.name))
def test_imports_point_downwards(path):
  unit = unit_of(path)
  assert unit in RANKS, f"give {unit} a rank in tests/imports_test.py"
  for name in imported(ast.parse(path.read_text())):
    parts = name.split(".")
    assert parts[0] != "configs", f"{path}: imports a config"
    if parts[0] != "drift_jax" or len(parts) < 2 or parts[1] == unit:
      continue
    assert RANKS[parts[1]] < RANKS[unit], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.name))
def test_no_task_imports_another(path):
  parts = path.relative_to(PACKAGE).parts
  if parts[0] != "tasks" or len(parts) < 3:
    return
  for name in imported(ast.parse(path.read_text())):
    other = name.split(".")[2:3] if name.startswith("drift_jax.tasks.") else []
    is_task = other and (PACKAGE / "tasks" / other[0]).is_dir()
    assert not is_task or other[0] == parts[1], f"{path} imports {name}"


def test_configs_import_nothing_of_the_package():
  for path in (PACKAGE.parent / "configs").glob("*.py"):
    for name in imported(ast.parse(path.read_text())):
      assert not name.startswith("drift_jax"), f"{path} imports {name}"


@pytest.mark.parametrize("folder", ["drift", "models"])
def test_pure_code_stays_pure(folder):
  for path in (PACKAGE / folder).rglob("*.py"):
    if path.name == "__init__.py":
      continue  # names only
    for name in imported(ast.parse(path.read_text())):
      for forbidden in FORBIDDEN_IN_PURE:
        assert not (name + ".").startswith(forbidden + "."), (path, name)


def test_no_global_statements_and_no_unpickling():
  for path in files():
    for node in ast.walk(ast.parse(path.read_text())):
      assert not isinstance(node, ast.Global), path
    assert "pickle" not in path.read_text(), path


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
  """(folder that it starts in, what it said, modules that it imported)."""
  program = (
    "import atexit, runpy, sys\n"
    "atexit.register(lambda: print(*sys.modules))\n"
    "runpy.run_module('drift_jax.main', run_name='__main__')"
  )
  settings = {
    "train.num_steps": 1,
    "optim.warmup_steps": 1,
    "eval.every": 1,
    "checkpoint.best_metric": "",
  }
  folder = tmp_path_factory.mktemp("digits")
  done = process.call(
    *("-c", program, f"--config={process.ROOT}/configs/digits.py:smoke"),
    *(f"--config.{key}={value}" for key, value in settings.items()),
    cwd=folder,
  )
  assert done.returncode == 0, done.stderr
  return folder, done.stderr, done.stdout.split()


def test_a_run_of_the_digits_imports_at_most_80_modules(digits_run):
  names = [x for x in digits_run[2] if x.startswith("drift_jax")]
  assert {"drift_jax.drift.loss", "drift_jax.training.loop"} <= {*names}
  assert len(names) <= 80, names


def test_a_run_without_a_workdir_is_named_by_its_config(digits_run):
  folder, said, _ = digits_run
  (checkpoint,) = (folder / "runs/digits_smoke/checkpoints").glob("[0-9]*")
  assert checkpoint.name == "1"
  assert sum("runs/digits_smoke;" in line for line in said.splitlines()) == 1

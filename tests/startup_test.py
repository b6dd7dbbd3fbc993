"""Programs read their flags before they import anything heavy."""

import os
import pathlib
import subprocess
import sys

import pytest
from sklearn import datasets

from drift_jax.data import sources

ROOT = pathlib.Path(__file__).parent.parent
# What takes long to import.
HEAVY = {
  "flax",
  "grain",
  "jax",
  "matplotlib",
  "orbax",
  "scipy",
  "sklearn",
  "tensorflow_datasets",
}
# Runs a module as `python -m` does; at its end says what is imported.
START = """if True:
  import atexit, runpy, sys

  @atexit.register
  def tell():
    names = {name.partition(".")[0] for name in sys.modules}
    sys.stderr.write("\\nimported: " + " ".join(names))

  del sys.argv[0]
  runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
CONFIG = "--config=configs/digits.py:smoke"
# {program: (a mistake on its command line, what it says)}.
MISTAKES = {
  "drift_jax": ("trian --config=x", "command 'trian': valid options are ['tr"),
  "drift_jax.main": (CONFIG, "--workdir must have a value"),
  "drift_jax.sample": ("--from=x --out=x.bmp", "'.bmp' is none of ['.png', "),
  "drift_jax.evaluate": (
    *("--workdir=x --alphas=1,two", "--alphas: could not convert string"),
  ),
  "drift_jax.serve": ("--from=x --batch_sizes=0", "--batch_sizes=0: "),
  "drift_jax.tools.ablate": (
    f"table1 {CONFIG} --workdir=x --seeds=a",
    "--seeds=a: invalid literal for int() with base 10: 'a'",
  ),
  "drift_jax.tools.cache_latents": (
    *("--out=x --source=digits", "required: --vae"),
  ),
  "drift_jax.tools.compile_check": (
    *(f"{CONFIG} --topology=v6e", "--topology='v6e': want GENERATION:CHIPS"),
  ),
  "drift_jax.tools.convert_weights": ("vea", "invalid choice: 'vea'"),
  "drift_jax.tools.export": (
    *("--workdir=x --out=y --formats=onnx,pickle", "'pickle': valid options"),
  ),
  "drift_jax.tools.policy_table": ("--out=x", "--workdirs must have"),
  "drift_jax.tools.reference_stats": (
    "--source=x --network=y --out=z --batch_size=0",
    "--batch_size=0 must be at least 1",
  ),
  "drift_jax.tools.rollout": ("--workdir=x --episodes=0", "--episodes=0"),
  "drift_jax.tools.run_export": ("--count=two", "--count: invalid int"),
  "drift_jax.tools.table": ("--workdirs=x", "--out must have"),
  "drift_jax.tools.toy_table": (
    "--workdir=x --seeds=1,1",
    "--seeds=1,1: it must hold at least one value and none twice",
  ),
  "drift_jax.tools.verify_released": (
    *("--out=x --only=latent_XL", "--only: 'latent_XL' is none of ['latent_L"),
  ),
}

# One has no flags.
BENCHMARKS = sorted(
  f"benchmarks.{path.stem}"
  for path in (ROOT / "benchmarks").glob("*.py")
  if "add_argument" in path.read_text()
)


def start(program: str, *arguments: str) -> tuple[int, str, set[str]]:
  """(exit code, what it said, packages that it imported)."""
  done = subprocess.run(
    [sys.executable, "-c", START, program, *arguments],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  said, _, imported = done.stderr.rpartition("\nimported: ")
  return done.returncode, done.stdout + said, set(imported.split())


def test_all_programs_are_here():
  files = (ROOT / "drift_jax").rglob("*.py")
  programs = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in files
    if 'if __name__ == "__main__"' in path.read_text()
  }
  assert {name.removesuffix(".__main__") for name in programs} == set(MISTAKES)


@pytest.mark.parametrize("program", [*MISTAKES, *BENCHMARKS])
def test_help_imports_nothing_heavy(program):
  code, said, imported = start(program, "--help")
  assert "usage:" in said.lower() or "flags:" in said
  assert code in (0, 1)  # absl's is 1
  assert "runpy" in imported
  assert not imported & HEAVY


@pytest.mark.parametrize("program", MISTAKES)
def test_a_mistake_imports_nothing_heavy(program):
  arguments, message = MISTAKES[program]
  code, said, imported = start(program, *arguments.split())
  assert code in (1, 2) and "Traceback" not in said
  assert message in said
  assert imported and not imported & HEAVY


def test_the_package_alone_imports_nothing_heavy():
  code = "import drift_jax, sys; print(*sys.modules)"
  names = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)
  assert not set(names.decode().split()) & HEAVY


def test_digits_are_read_as_scikit_learn_reads_them():
  pixels, labels = datasets.load_digits(return_X_y=True)
  rows = {(*row, label) for row, label in zip(pixels, labels, strict=True)}
  count = 0
  for split in sources.SPLITS:
    source = sources.digits(split)
    count += len(source)
    found = (source.images.reshape(-1, 64) + 1) * 8
    assert rows.issuperset(
      (*row, label) for row, label in zip(found, source.labels, strict=True)
    )
  assert count == len(rows) == len(pixels)

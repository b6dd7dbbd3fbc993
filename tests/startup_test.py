"""Programs read their flags before they import anything heavy."""

import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

from sklearn import datasets

from drift_jax.data import sources
from tests.process import call

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
# Runs modules as `python -m` does, each in a fork of what has imported nothing
# heavy; a line for each: exit code, what it said, packages that are imported.
EACH = """if True:
  import json, os, runpy, sys, tempfile, traceback
  import drift_jax.tasks.generator.config

  def call(program, *arguments):
    sys.argv = [program, *arguments]
    try:
      runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
      if isinstance(end.code, int | None):
        return end.code or 0
      print(end.code)
    except BaseException:
      traceback.print_exc()
    return 1

  for command in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as said:
      if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        text, _, names = said.read().rpartition("\\nimported: ")
        print(json.dumps([code, text, names.split()]), flush=True)
        continue
      os.dup2(said.fileno(), 1)
      os.dup2(1, 2)
      code = call(*command)
      names = {name.partition(".")[0] for name in sys.modules}
      print("\\nimported:", *names, flush=True)
      os._exit(code)
"""
CONFIG = "--config=configs/digits.py:smoke"
# {program: (a mistake on its command line, what it says)}.
MISTAKES = {
  "drift_jax": ("trian --config=x", "command 'trian': valid options are ['tr"),
  "drift_jax.main": (f"{CONFIG} --config.sed=1", "sed='1': did you mean seed?"),
  "drift_jax.sample": ("--from=x --out=x.bmp", "'.bmp' is none of ['.png', "),
  "drift_jax.evaluate": (
    *("--from=tests --alphas=1,two", "--alphas: could not convert string"),
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
    *(f"{CONFIG} --topology=v6e", "--topology='v6e': want GENERATION:AxB"),
  ),
  "drift_jax.tools.convert_weights": ("vea", "invalid choice: 'vea'"),
  "drift_jax.tools.export": (
    *("--from=x --out=y --formats=onnx,pickle", "'pickle': valid options"),
  ),
  "drift_jax.tools.policy_table": ("--out=x", "--from is missing: "),
  "drift_jax.tools.reference_stats": (
    "--source=x --network=y --out=z --batch_size=0",
    "--batch_size=0 must be at least 1",
  ),
  "drift_jax.tools.rollout": ("--from=x --episodes=0", "--episodes=0"),
  "drift_jax.tools.run_export": ("--count=two", "--count: invalid int"),
  "drift_jax.tools.table": ("--from=x", "--out is missing: "),
  "drift_jax.tools.toy_table": (
    "--workdir=x --seeds=1,1",
    "--seeds=1,1: it must hold at least one value and none twice",
  ),
  "drift_jax.tools.verify_released": (
    *("--out=x --only=latent_XL", "--only: 'latent_XL' is none of ['latent_L"),
  ),
}
# Of the same programs: what each needs, an argument that none takes, the first
# of those that it needs, former names of --from.
NEEDS = {
  "drift_jax.main": (CONFIG, "--process_id=two", "--config"),
  "drift_jax.sample": ("--from=x", "--count=two", "--from", "workdir"),
  "drift_jax.evaluate": (
    *("--from=x", "--seed=two", "--from", "workdir", "weights"),
  ),
  "drift_jax.serve": ("--from=x", "--port=two", "--from", "workdir"),
  "drift_jax.tools.ablate": (
    *(f"table1 {CONFIG} --workdir=x", "--alpha=two", "--workdir"),
  ),
  "drift_jax.tools.cache_latents": (
    *("--source=digits --vae=x --out=x", "--batch_size=two", "--out"),
  ),
  "drift_jax.tools.compile_check": (CONFIG, "--config.seed=two", "--config"),
  "drift_jax.tools.convert_weights": (
    *("wflow --from=x --out=x", "--size=two", "MODEL", "source"),
  ),
  "drift_jax.tools.export": (
    *("--from=x --out=x", "--step=two", "--out", "workdir", "init_from"),
  ),
  "drift_jax.tools.policy_table": (
    *("--from=x --out=x", "--from=two", "--from", "workdirs"),
  ),
  "drift_jax.tools.reference_stats": (
    *("--source=x --network=x --out=x", "--seed=two", "--network"),
  ),
  "drift_jax.tools.rollout": ("--from=x", "--seed=two", "--from", "workdir"),
  "drift_jax.tools.table": (
    *("--from=x --out=x", "--from=two", "--from", "workdirs"),
  ),
  "drift_jax.tools.toy_table": ("--workdir=x", "--seeds=two", "--workdir"),
  "drift_jax.tools.verify_released": ("--out=x", "--seed=two", "--out"),
  "drift_jax.tools.run_export": ("--seed=1", "--count=two", ""),
}

# One has no flags.
BENCHMARKS = sorted(
  f"benchmarks.{path.stem}"
  for path in (ROOT / "benchmarks").glob("*.py")
  if "add_argument" in path.read_text()
)


def start_each(
  commands: Iterable[Sequence[str]],
) -> list[tuple[int, str, set[str]]]:
  """[(exit code, what it said, packages that it imported)] of programs."""
  done = call("-c", EACH, json.dumps(list(commands)))
  assert done.returncode == 0, done.stderr
  told = [json.loads(line) for line in done.stdout.splitlines()]
  return [(code, said, set(names)) for code, said, names in told]


def test_all_programs_are_here():
  files = (ROOT / "drift_jax").rglob("*.py")
  programs = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in files
    if 'if __name__ == "__main__"' in path.read_text()
  }
  assert {name.removesuffix(".__main__") for name in programs} == set(MISTAKES)


def test_help_has_what_is_needed_and_imports_nothing_heavy():
  needs = {name: "" for name in BENCHMARKS} | {
    k: v[0] for k, v in NEEDS.items()
  }
  told = start_each(
    [name, *re.findall(r"(?<!\S)\w+", line), "--help"]
    for name, line in needs.items()
  )
  for (program, line), (code, said, imported) in zip(
    needs.items(), told, strict=True
  ):
    assert "usage:" in said.lower() or "flags:" in said, (program, said)
    assert code in (0, 1)  # absl's is 1
    assert imported and not imported & HEAVY, program
    assert {*re.findall(r"--\w+", line)} <= {*re.findall(r"--\w+", said)}


def mistakes() -> Iterator[tuple[str, str, str]]:
  """(program, command line with a mistake, what is said of it)."""
  for program, (line, said) in MISTAKES.items():
    yield program, line, said
  for program, (line, mistyped, first, *former) in NEEDS.items():
    yield program, f"{line} --no_such_flag=1", "no_such_flag"
    yield program, f"{line} {mistyped}", "two"
    yield program, f"{line} stray", "stray"
    for name in former:
      yield program, f"{line} --{name}=y", "=y: "
    if first:
      yield program, "", first


def test_a_mistake_is_one_line_and_imports_nothing_heavy():
  assert set(MISTAKES) - set(NEEDS) == {"drift_jax"}  # it starts the others
  cases = list(mistakes())
  told = start_each([program, *line.split()] for program, line, _ in cases)
  for (*command, part), (code, said, imported) in zip(cases, told, strict=True):
    assert code and said.startswith("Error: "), (command, said)
    assert part in said and "\n" not in said.strip(), (command, said)
    assert imported and not imported & HEAVY, command


def test_a_package_that_a_program_lacks_is_one_line(tmp_path):
  block = "import sys; sys.modules['ml_collections'] = None"
  (tmp_path / "sitecustomize.py").write_text(block)
  for program in (("drift_jax", "sample"), ("drift_jax.main",)):
    done = call("-m", *program, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("Error: the package 'ml_collections' is miss")
    assert done.stderr.count("\n") == 1


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

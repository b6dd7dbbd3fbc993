"""A missing package of an extra is named with the line that installs it."""

import importlib.metadata
import sys

import pytest

from drift_jax.data import sources
from drift_jax.system import extras
from tests.process import ROOT, call


@pytest.fixture(params=[True, False], ids=["installed", "clone"])
def installed(request, monkeypatch):
  def version(name):
    assert name == "drift_jax"
    if not request.param:
      raise importlib.metadata.PackageNotFoundError
    return "0.2.0"

  monkeypatch.setattr(importlib.metadata, "version", version)
  return request.param


def test_line(installed):
  lines = [extras.install_line(extra) for extra in ("serve", "robots")]
  assert lines == (
    ['pip install "drift_jax[serve]"', 'pip install "drift_jax[robots]"']
    if installed
    else [f"pip install -r requirements{x}.txt" for x in ("", "-robots")]
  )


@pytest.mark.parametrize(
  ("source", "extra", "package"),
  [
    ("tfds:mnist", "tfds", "tensorflow_datasets"),
    ("hf://datasets/ylecun/mnist", "hub", "pyarrow"),
  ],
)
def test_data(source, extra, package, installed, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  line = f'drift_jax\\[{extra}\\]"$' if installed else "-r requirements.txt$"
  with pytest.raises(extras.ExtraError, match=f"'{source}' .*{line}"):
    sources.open_source(
      source,
      data_dir="",
      split="train",
      class_order="",
      max_corrupt=0,
      decoder="pillow",
    )


def test_the_page_before_anything_heavy():
  program = """if True:
    import sys
    from absl import app
    from drift_jax import config
    from drift_jax.serve import __main__ as serve

    sys.modules["uvicorn"] = None
    serve.define_flags()
    sys.argv[1:] = ["--from=x"]
    app.run(serve.main, flags_parser=config.parse_flags)
  """
  done = call("-c", program)
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert "'uvicorn': pip install" in done.stderr


@pytest.mark.parametrize("package", ["ml_collections", "PIL", "jax"])
def test_an_installation_without_its_needs(package, tmp_path):
  (tmp_path / "sitecustomize.py").write_text(
    f"import sys; sys.modules[{package!r}] = None"
  )
  path = f"{tmp_path}:{ROOT}"
  command = ("-m", "drift_jax", "sample", "--from=x")
  done = call(*command, cwd=tmp_path, PYTHONPATH=path)
  assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
  assert f"'{package}'" in done.stderr and "--no-deps" in done.stderr

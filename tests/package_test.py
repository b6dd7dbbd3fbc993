"""The wheel and the source distribution, and what runs from the wheel alone."""

import ast
import base64
import email
import fnmatch
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import nbclient
import nbformat
import pytest
from packaging.requirements import Requirement

from drift_jax.__main__ import COMMANDS
from tests.autoencoders import save_vae
from tests.conftest import GOLDEN, ROOT
from tests.locks_test import lines
from tests.process import process_environment

pytestmark = pytest.mark.system
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
# The smoke variant with the model of tests.tasks.generator.train_test, in a
# folder of its own.
CONFIG = """
from configs import digits


def get_config():
  config = digits.get_config("smoke")
  config.model.update(depth=1, hidden_size=16, cond_dim=16, num_heads=2)
  config.batch.update(generated=4, positives=8)
  config.optim.schedule = "constant"
  return config
"""


def cell(notebook, cell_id):
  (found,) = [each for each in notebook.cells if each.id == cell_id]
  return found


def source_of(cell_id):
  return cell(nbformat.read(NOTEBOOK, as_version=4), cell_id).source


def outputs(notebook, cell_id):
  """(all text, the bytes of all PNGs) that a cell printed and showed."""
  shown = cell(notebook, cell_id).outputs
  text = "".join(o.text for o in shown if o.output_type == "stream")
  images = [
    base64.b64decode(o.data["image/png"])
    for o in shown
    if o.output_type == "display_data" and "image/png" in o.data
  ]
  return text, images


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """(source distribution, wheel made from it), of a copy of the clone."""
  folder = tmp_path_factory.mktemp("package")
  left = [".git", *(line.strip("/") for line in lines(ROOT / ".gitignore"))]
  shutil.copytree(
    ROOT, folder / "clone", ignore=shutil.ignore_patterns(*left), symlinks=True
  )
  subprocess.run(
    [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder],
    cwd=folder / "clone",
    check=True,
    capture_output=True,
  )
  (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
  return source, wheel


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
  """Variables of processes that find the wheel, and nothing of the clone."""
  site = tmp_path_factory.mktemp("site")
  pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
  subprocess.run([*pip, f"--target={site}", built[1]], check=True)
  return process_environment() | {
    "PYTHONPATH": str(site),
    "PATH": f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}",
  }


def test_metadata(built):
  with zipfile.ZipFile(built[1]) as wheel:
    (name,) = [n for n in wheel.namelist() if n.endswith("/METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    names = set(wheel.namelist())
  assert "drift_jax/py.typed" in names
  requirements = map(Requirement, metadata.get_all("Requires-Dist", []))
  found = {"": set()}
  for requirement in requirements:
    extra = re.search(r'extra == "(\w+)"', str(requirement.marker or ""))
    name, _, _ = str(requirement).partition(";")
    found.setdefault(extra[1] if extra else "", set()).add(Requirement(name))

  def wanted(file):
    return {Requirement(x.partition(";")[0]) for x in lines(ROOT / file)}

  parts = [found[k] for k in ("", "hub", "serve", "tfds")]
  union = set.union(*parts)
  assert union == wanted("requirements.txt")
  assert len(union) == sum(map(len, parts))
  assert found["robots"] == wanted("requirements-robots.txt")
  assert found["dev"] == wanted("requirements-dev.txt")
  assert found["all"] == {Requirement("drift_jax[hub,robots,serve,tfds]")}
  # No link of the README leads to a neighbour that is not there.
  targets = re.findall(r"\]\(([^)]*)\)", metadata.get_payload())
  assert targets and all(x.startswith(("https://", "#")) for x in targets)


def test_source_distribution_has_what_the_clone_has(built):
  with tarfile.open(built[0]) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
  for folder in (
    "benchmarks",
    "configs",
    "docs",
    "drift_jax",
    "launch",
    "tests",
  ):
    for path in (ROOT / folder).rglob("*"):
      if "__pycache__" not in path.parts and path.is_file():
        assert str(path.relative_to(ROOT)) in names
  assert {"setup.py", "MANIFEST.in", "requirements.txt", ".ci/run"} <= names


def test_wheel_trains_and_samples_in_an_empty_folder(environment, tmp_path):
  def call(*command, code=0):
    done = subprocess.run(
      command,
      cwd=tmp_path,
      env=environment,
      capture_output=True,
      text=True,
      timeout=240,
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done
    return done.stdout + done.stderr

  said = call("drift-jax", "--help")
  assert all(f"\n  {name} " in said for name in COMMANDS)
  said = call("drift-jax", "trian", code=1)
  assert said.count("\n") == 1 and "'trian'" in said and "'train'" in said
  said = call("drift-jax", "check", "--config=digitz", code=1)
  assert said.count("\n") == 1 and "'imagenet_pixel'" in said
  call(
    *("drift-jax", "train", "--config", "digits:smoke", "--workdir=run"),
    *("--config.train.num_steps=2", "--config.optim.warmup_steps=1"),
    *("--config.eval.every=2", "--config.checkpoint.every=2"),
    *("--config.data.num_workers=1",),
  )
  call("drift-jax", "sample", "--from=run", "--count=1", "--out=grid.png")
  assert (tmp_path / "grid.png").is_file()
  code = "import drift_jax; print(drift_jax.__file__, drift_jax.__version__)"
  said = call(sys.executable, "-c", code)
  assert said.startswith(environment["PYTHONPATH"])
  # What follows is refused for its seed, once the config is read.
  seed = ("--config.seed=-1", "--workdir=never")
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "tiny.py").write_text(CONFIG)
  for name in (
    "imagenet_pixel:b16",
    "configs/imagenet_pixel.py",
    "mine/tiny.py",
    str(tmp_path / "mine" / "tiny.py"),
  ):
    said = call("drift-jax", "train", f"--config={name}", *seed, code=1)
    assert said == "Error: seed=-1 must be at least 0\n"


@pytest.mark.parametrize(
  ("says", "devices", "packages"),
  [
    ("CUDA Version: 12.9", (), ["jax[cuda12]"]),
    ("CUDA UMD Version: 13.1", ("/dev/vfio/0",), ["jax[cuda13]"]),
    ("", ("/dev/vfio/0",), ["jax[tpu]"]),
    ("", ("/dev/vfio/vfio",), []),
  ],
)
def test_notebook_installs_jax_for_the_runtime(
  tmp_path, monkeypatch, says, devices, packages
):
  if says:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '| {says} |'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
  monkeypatch.setattr(
    glob, "glob", lambda pattern: fnmatch.filter(devices, pattern)
  )
  assert names_of_install()["jax_package"]() == packages


def names_of_install():
  """What the notebook's install cell imports and defines."""
  tree = ast.parse(source_of("install"))
  kept = (ast.Import, ast.FunctionDef)
  tree.body = [node for node in tree.body if isinstance(node, kept)]
  names = {}
  exec(compile(tree, "install", "exec"), names)
  return names


def test_notebook_without_a_package_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit, match="^[^\n]*set PACKAGE[^\n]*$"):
    exec(source_of("install"), {"os": os, "PACKAGE": ""})


def test_notebook_in_a_clone_installs_nothing(monkeypatch, capsys):
  monkeypatch.chdir(ROOT / "launch")
  exec(source_of("install"), {"os": os})
  assert capsys.readouterr().out == f"In {ROOT}\n"


def test_notebook_knows_the_address_of_pyproject():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  address = project["urls"].get("Repository")
  default = f"git+{address}" if address else ""
  assert f'get("DRIFT_JAX_PACKAGE", "{default}")' in source_of("parameters")


def test_notebook_runs_from_a_wheel_beside_it(built, tmp_path, monkeypatch):
  # 1. A folder with the notebook's wheel, where pip installs no other package
  folder, site = tmp_path / "content", tmp_path / "site"
  workdir = folder / "runs" / "tiny.py"
  folder.mkdir()
  shutil.copy(built[1], folder)
  # What Colab calls a second upload; pip refuses the name.
  shutil.copy(built[1], folder / f"{built[1].stem} (1).whl")
  (tmp_path / "tiny.py").write_text(CONFIG)
  variables = process_environment() | {
    "DRIFT_JAX_CONFIG": str(tmp_path / "tiny.py"),
    "DRIFT_JAX_WEIGHTS": str(GOLDEN / "artifact_gen"),
    "DRIFT_JAX_VAE": str(save_vae(tmp_path / "vae", latent_channels=4)),
    "IPYTHONDIR": str(tmp_path / "ipython"),
    "PIP_NO_DEPS": "1",
    "PIP_NO_INDEX": "1",
    "PIP_TARGET": str(site),
    "PYTHONPATH": str(site),
  }
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  for name in ("PACKAGE", "WORKDIR"):
    monkeypatch.delenv(f"DRIFT_JAX_{name}", raising=False)
  # 2. From top to bottom
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbclient.NotebookClient(
    notebook,
    timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(folder)}},
  ).execute()
  assert (site / "drift_jax" / "configs" / "digits.py").is_file()

  # 3. What the cells printed and showed
  text, _ = outputs(notebook, "install")
  assert text == f"In {folder}\n"
  assert "eval step 20, alpha 1:" in outputs(notebook, "train")[0]
  assert len(outputs(notebook, "curves")[1]) == 2
  _, images = outputs(notebook, "samples")
  assert images == [(workdir / "samples" / "step_0000020.png").read_bytes()]
  text, images = outputs(notebook, "alphas")
  assert "alpha 1:" in text and "alpha 3:" in text
  assert images == [
    (workdir / f"alpha_{alpha}.png").read_bytes() for alpha in (1, 3)
  ]
  text, images = outputs(notebook, "load")
  assert "10 classes" in text and len(images) == 1
  text, images = outputs(notebook, "sweep")
  assert text.split() == "alpha 1: alpha 2: alpha 3: alpha 4:".split()
  assert len(images) == len(set(images)) == 4
  assert len(outputs(notebook, "walk")[1]) == 6

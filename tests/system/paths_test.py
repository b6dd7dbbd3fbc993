"""`~` in every path that a user gives, and walks through folders."""

import argparse
import ast
import os
import pathlib

import pytest

import drift_jax
from drift_jax.metrics.generation import read_labels
from drift_jax.metrics.images import save_image
from drift_jax.metrics.sample_files import open_images
from drift_jax.system import paths
from drift_jax.system.errors import DataError
from drift_jax.tasks.policy.replay import read_replay
from drift_jax.training.workdir import check_workdir
from tests.conftest import assert_close
from tests.small_generator import save_generator

PACKAGE = pathlib.Path(drift_jax.__file__).parent
# Options of the programs that hold strings but no paths, and sources, which
# are expanded where they are opened (a latent cache records them as given).
# `data_source` is expanded as the config's, `root_path` is of URLs.
NO_PATHS = set(
  "class_order compute_dtype coordinator crop data_source dtype figure host "
  "mesh only push root_path size source split topology variant".split()
)


@pytest.fixture
def home(tmp_path, monkeypatch):
  folder = tmp_path / "home"
  folder.mkdir()
  monkeypatch.setenv("HOME", str(folder))
  monkeypatch.chdir(tmp_path)
  return folder


def test_expand(home):
  for given, expanded in (
    ("~/x y", f"{home}/x y"),
    ("~", str(home)),
    ("~root/x", f"{os.path.expanduser('~root')}/x"),
    (pathlib.Path("~/x"), f"{home}/x"),
    ("a/~/b", "a/~/b"),
    ("./~x", "./~x"),
    ("$HOME/x", "$HOME/x"),
    ("gs://bucket/~/x", "gs://bucket/~/x"),
    ("hf://owner/name", "hf://owner/name"),
    ("", ""),
  ):
    assert paths.expand(given) == expanded
  for source, expanded in (
    ("folder:~/x", f"folder:{home}/x"),
    ("tfds:mnist:3.0.1", "tfds:mnist:3.0.1"),
    ("digits", "digits"),
  ):
    assert paths.expand_source(source) == expanded


def test_a_user_who_is_not_there():
  with pytest.raises(paths.PathError, match="'nobody-here'.* ./~nobody-here/x"):
    paths.expand("~nobody-here/x")
  with pytest.raises(argparse.ArgumentTypeError, match="nobody-here"):
    paths.argument("~nobody-here/x")
  with pytest.raises(ValueError, match="nobody-here"):
    paths.FlagParser().parse("~nobody-here/x")


def test_every_option_that_holds_a_path_is_expanded(home):
  """A new option is a path, or is listed above."""
  assert paths.FlagParser().parse("~/x") == paths.argument("~/x") == f"{home}/x"
  found = set()
  for file in PACKAGE.rglob("*.py"):
    if file.name == "run_export.py":  # without this package
      continue
    for node in ast.walk(ast.parse(file.read_text())):
      if not isinstance(node, ast.Call) or not node.args:
        continue
      called = ast.unparse(node.func).rpartition(".")[2]
      name = getattr(node.args[0], "value", "")
      types = {"type", "action"} & {word.arg for word in node.keywords}
      if called == "DEFINE_string" or (
        called in ("add", "add_argument")
        and str(name).startswith("--")
        and not types
      ):
        found.add(name.removeprefix("--"))
  assert found <= NO_PATHS


def test_in_python(home, tmp_path):
  """What is given to the API: written and found in the home folder."""
  save_generator("~/generator")
  assert (home / "generator").is_dir()
  model = drift_jax.load("~/generator")
  samples = model.sample([1])
  samples.save("~/pictures/grid.png")
  assert (home / "pictures/grid.png").is_file()
  (home / "images").mkdir()
  for name in "ab":
    save_image(samples.grid(), f"~/images/{name}.png")
  assert len(open_images("~/images")) == 2
  (home / "labels.txt").write_text("1\n2\n")
  labels = read_labels("~/labels.txt", num_classes=4, count=2)
  assert labels.tolist() == [1, 2]
  check_workdir("~/runs/x")
  with pytest.raises(DataError, match=str(home)):
    read_replay("~/demonstrations.zarr", ["state"])
  assert not (tmp_path / "~").exists()
  again = drift_jax.load(str(home / "generator"))
  assert_close(again.sample([1]).images, samples.images, 1e-6)


def test_walk(tmp_path):
  for name in ("b/x", "a/y", "a/deep/z", ".git/x", "@eaDir/x", "top"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
  (tmp_path / "a/deep/loop").symlink_to(tmp_path)
  (tmp_path / "c").symlink_to(tmp_path / "b")
  found = [
    (os.path.relpath(folder, tmp_path), names)
    for folder, names in paths.walk(tmp_path)
  ]
  assert found == [
    (".", ["top"]),
    ("a", ["y"]),
    ("a/deep", ["z"]),
    ("b", ["x"]),
  ]
  with pytest.raises(FileNotFoundError, match="nowhere"):
    list(paths.walk(tmp_path / "nowhere"))

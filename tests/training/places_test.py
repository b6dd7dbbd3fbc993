"""Runs that were moved or copied: what they need is found, or can be given."""

import os
import pathlib
import shutil

import numpy as np
import pytest

import drift_jax
from configs import digits
from drift_jax import config as config_lib
from drift_jax.tasks import parse
from drift_jax.tasks.generator import reports
from drift_jax.tasks.generator.reports import Request, report_on_run
from drift_jax.training import artifacts
from drift_jax.training.places import of_resumed
from drift_jax.training.workdir import open_workdir
from tests.autoencoders import save_vae
from tests.builders import save_model
from tests.small_generator import TINY, save_checkpoint

NAMES = [str(number) for number in range(10)]
FEATURES = {
  "eval.metrics": ("fd_encoder",),
  "eval.num_samples": 20,
  "eval.alphas": (1.0,),
  "checkpoint.best_metric": "",
}


def save_encoder(folder, seed=0):
  """Writes a small encoder of digits with random weights."""
  arguments = digits.get_config("encoder,smoke").model.to_dict()
  arguments |= {"base_channels": 4, "num_classes": 10}
  save_model(folder, "mae", arguments, seed=seed)


def run_config(variant, **changes):
  config = digits.get_config(variant)
  config.model.update(TINY, num_classes=10)
  config.update_from_flattened_dict(changes)
  return config


def save_run(workdir, config, sums):
  """A run of one step, as training in the current folder leaves it."""
  config = parse(config)
  open_workdir(workdir, config, sums, NAMES, {})
  save_checkpoint(pathlib.Path(workdir).resolve(), config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The layout of the quickstart, trained in a folder PROJECT."""
  project = tmp_path_factory.mktemp("project")
  before = pathlib.Path.cwd()
  os.chdir(project)
  try:
    save_encoder("runs/encoder/encoder")
    config = run_config(
      "features,smoke",
      **{
        **FEATURES,
        "encoders.mae.path": "runs/encoder/encoder",
      },
    )
    sha256 = artifacts.load("runs/encoder/encoder").sha256
    save_run("runs/features", config, {"encoders.mae": sha256})
    save_vae("weights/vae")
    config = run_config(
      "smoke",
      **{
        "data.source": "latents:cache",
        "data.wire": "float32",
        "vae.path": "weights/vae",
        "model.in_channels": 2,
        "model.out_channels": 2,
        "eval.metrics": (),
        "checkpoint.best_metric": "",
      },
    )
    sha256 = artifacts.load("weights/vae").sha256
    save_run("runs/latents", config, {"vae": sha256})
  finally:
    os.chdir(before)
  return project


@pytest.fixture
def moved(trained, tmp_path, monkeypatch):
  """runs/ elsewhere, seen from a folder that has nothing to do with it."""
  shutil.copytree(trained / "runs", tmp_path / "disk" / "runs")
  hidden = trained.with_name("hidden")
  trained.rename(hidden)
  (tmp_path / "desk").mkdir()
  monkeypatch.chdir(tmp_path / "desk")
  yield tmp_path / "disk" / "runs"
  hidden.rename(trained)


def report(workdir, **others):
  return report_on_run(str(workdir), Request(batch_size=20, **others))


@pytest.mark.slow
def test_what_moved_with_a_run_is_found(moved):
  """By its relation to the workdir, not by the folder that we are in."""
  save_encoder("runs/encoder/encoder", seed=1)  # another one of this name
  figures = report("../disk/runs/features")["results"][1.0]
  assert np.isfinite(figures["fd_encoder"])


def test_what_stayed_behind_is_named_and_can_be_given(
  moved, trained, monkeypatch
):
  elsewhere = moved.parent / "encoder"
  shutil.move(moved / "encoder", elsewhere)
  missing = str(moved / "encoder" / "encoder")
  with pytest.raises(config_lib.ConfigError) as caught:
    report(moved / "features")
  for part in (
    "encoders.mae.path: runs/encoder/encoder",
    missing,
    str(trained / "runs/encoder/encoder"),
    "--encoder=mae=DIR",
  ):
    assert part in str(caught.value)

  def load_encoders(encoders, mesh):
    raise RuntimeError(encoders["mae"].path)

  monkeypatch.setattr(reports, "load_encoders", load_encoders)
  given = str(elsewhere / "encoder")
  with pytest.raises(RuntimeError, match=f"^{given}$"):
    report(moved / "features", paths={"encoders.mae.path": given})


@pytest.mark.parametrize(
  ("paths", "message"),
  [
    ({"encoders.mea.path": "a"}, "unknown key encoders.mea='a'"),
    ({"encoders.mae.path": "a"}, "encoders.mae.path: a of the run"),
    ({"data.data_dir": "d", "data.source": "folder:e"}, "data.data_dir: d of"),
    ({"vae.path": "v"}, "vae.path='v': the run in .* has none"),
    (
      {"data.data_dir": "d", "encoders.mae.path": "a"},
      "2 inputs are missing:\n  data.data_dir: d of .*\n  encoders.mae.path: a",
    ),
  ],
)
def test_mistakes_in_what_is_given(moved, paths, message):
  wanted = ("fd_encoder", "fd_pixel")
  with pytest.raises(config_lib.ConfigError, match=message):
    report(moved / "features", paths=paths, metrics=wanted)


def test_an_autoencoder_that_stayed_behind(moved, trained, tmp_path):
  source = moved / "latents"
  with pytest.raises(config_lib.ConfigError, match=r"vae\.path: .*--vae=DIR"):
    drift_jax.load(source)
  other = str(save_vae(tmp_path / "other", seed=1))
  with pytest.raises(config_lib.ConfigError, match="began with other weights"):
    drift_jax.load(source, vae=other)
  vae = save_vae(tmp_path / "vae")  # the same weights
  assert drift_jax.load(source, vae=vae).image_shape == (16, 16, 3)


def test_training_goes_on_elsewhere(moved, tmp_path):
  """With the same command, or with what moved named as it is now."""
  workdir = str(moved / "features")

  def go_on(path, seed=0, **changes):
    place = {"encoders.mae.path": path}
    config = run_config("features,smoke", **FEATURES, **place, **changes)
    config = of_resumed(parse(config), workdir)
    sha256 = artifacts.load(config.encoders["mae"].path).sha256
    open_workdir(workdir, config, {"encoders.mae": sha256}, NAMES, {})
    return config.encoders["mae"].path

  there = str(moved / "encoder" / "encoder")
  assert go_on("runs/encoder/encoder") == there
  assert go_on("../disk/runs/encoder/encoder") == "../disk/runs/encoder/encoder"
  shutil.copytree(there, tmp_path / "copy")
  assert go_on(str(tmp_path / "copy")) == str(tmp_path / "copy")
  save_encoder(tmp_path / "another", seed=1)
  for path, changes in (
    (tmp_path / "another", {}),
    (there, {"init_from": str(tmp_path / "another")}),
  ):
    with pytest.raises(config_lib.ConfigError, match=r"path|init_from"):
      go_on(str(path), **changes)


def test_a_record_that_is_damaged(moved):
  (moved / "latents" / "started.json").write_text("{")
  with pytest.raises(config_lib.ConfigError, match="started.json can't be"):
    drift_jax.load(moved / "latents")
  (moved / "latents" / "config.json").write_text("[]")
  with pytest.raises(config_lib.ConfigError, match="config.json is damaged"):
    drift_jax.load(moved / "latents")

"""The smoke variants in real processes, from image files to pictures."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from drift_jax import artifacts, metrics, models
from drift_jax.models import release
from tests.autoencoders import save_vae
from tests.process import process_environment

ROOT = pathlib.Path(__file__).parent.parent
CLASSES = ("n01440764", "n01443537", "n02124075")


def call(module, *arguments):
  done = subprocess.run(
    [sys.executable, "-m", f"drift_jax.{module}", *arguments],
    cwd=ROOT,
    env=process_environment(2),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done


def train(config, workdir, *overrides):
  call(
    "main",
    f"--config=configs/{config}",
    f"--workdir={workdir}",
    *(f"--config.{override}" for override in overrides),
  )
  lines = metrics.read_jsonl(workdir / "metrics.jsonl")
  assert lines[-1]["step"] == 2
  return {key: value for line in lines for key, value in line.items()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """SPLIT/CLASS/FILE: JPEGs of smooth colours, none of 256 x 256."""
  folder = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for split, count in (("train", 3), ("validation", 2)):
    for label, name in enumerate(CLASSES):
      for number in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        coarse[..., label] = 255
        path = folder / split / name / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((300, 270)).save(path)
  return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
  # As deep as the SD-VAE: 256 px become 32 x 32 latents.
  return save_vae(
    tmp_path_factory.mktemp("vae"), widths=(4, 4, 4, 8), latent_channels=4
  )


def save_convnext(folder):
  """Writes a tiny ConvNeXt with random weights; returns its folder."""
  arguments = {"depths": (1, 1, 1, 1), "widths": (4, 4, 8, 8)}
  arguments["dtype"] = "float32"
  shapes = jax.eval_shape(
    models.build_convnext(**arguments).init,
    jax.random.key(0),
    np.zeros((1, 8, 8, 3), np.float32),
  )["params"]
  rng = np.random.default_rng(0)
  artifacts.save(
    folder,
    kind="convnext",
    model_config=release.published_config("convnext", arguments),
    params=jax.tree.map(
      lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), shapes
    ),
    step=None,
    ema_decay=None,
  )
  return folder


def test_latents(tmp_path, images, vae):
  """Images -> latent cache; encoder on images; generator on the cache."""
  cache = tmp_path / "latents"
  call(
    "tools.cache_latents",
    f"--source=folder:{images}",
    f"--vae={vae}",
    f"--out={cache}",
    "--batch_size=4",
  )
  encoder = tmp_path / "encoder"
  last = train(
    "mae_latent.py:smoke",
    encoder,
    f"data.source=folder:{images}",
    "data.class_order=imagenet",
    f"vae.path={vae}",
  )
  assert np.isfinite([last["recon_loss"], last["eval/recon_loss"]]).all()
  workdir = tmp_path / "generator"
  last = train(
    "imagenet_latent.py:smoke",
    workdir,
    f"data.source=latents:{cache}",
    f"vae.path={vae}",
    f"encoders.mae.path={encoder / 'encoder'}",
    # The generator of pixels has them: they take long to compile.
    "features.patch_mean_size=()",
    "features.patch_std_size=()",
  )
  assert np.isfinite(last["loss"]) and "scale/layer1" in last
  # Two classes of two images: decoded, not latents.
  with Image.open(workdir / "samples" / "step_0000002.png") as grid:
    assert grid.size == (2 * 258 + 2, 2 * 258 + 2)
  frozen = json.loads((workdir / "frozen_weights.json").read_text())
  # Another one, in the features of what the autoencoder makes of latents.
  through = tmp_path / "through"
  last = train(
    "imagenet_latent.py:convnext,smoke",
    through,
    f"data.source=latents:{cache}",
    f"vae.path={vae}",
    f"encoders.convnext.path={save_convnext(tmp_path / 'convnext')}",
    # Its images are 256 px and 224: a few are enough.
    *("batch.labels=2", "batch.generated=2", "batch.positives=1"),
    *("batch.unconditional=1", "eval.every=0"),
  )
  assert np.isfinite(last["loss"]) and "scale/convenxt" in last
  sums = json.loads((through / "frozen_weights.json").read_text())
  assert sums.keys() == {"encoders.convnext", "vae"}
  assert sums["vae"] == frozen["vae"]
  out = tmp_path / "grid.png"
  call(
    "sample",
    f"--workdir={workdir}",
    "--labels=2",
    "--alpha=1.5",
    "--seed=0",
    f"--out={out}",
    "--count=1",
  )
  with Image.open(out) as grid:
    assert grid.size == (260, 260)
    assert np.std(np.asarray(grid)[2:-2, 2:-2].astype(np.float64)) > 0


def test_pixels(tmp_path, images):
  encoder = tmp_path / "encoder"
  train("mae_pixel.py:smoke", encoder, f"data.source=folder:{images}")
  workdir = tmp_path / "generator"
  last = train(
    "imagenet_pixel.py:smoke",
    workdir,
    f"data.source=folder:{images}",
    f"encoders.mae.path={encoder / 'encoder'}",
    "data.num_workers=1",
  )
  assert np.isfinite(last["loss"]) and "scale/layer1" in last
  with Image.open(workdir / "samples" / "step_0000002.png") as grid:
    assert grid.size == (2 * 258 + 2, 2 * 258 + 2)

"""Latents that no autoencoder of ours made, token by token, to samples."""

import pathlib

import numpy as np
import pytest

import drift_jax
from configs import digits, imagenet_rae
from drift_jax.data import latents
from drift_jax.metrics.writers import read_jsonl
from drift_jax.system import sharding
from drift_jax.system.errors import DataError, UserError
from drift_jax.tasks import parse
from drift_jax.tasks.generator import judges, train
from drift_jax.tasks.generator.evaluators import run_evaluators
from drift_jax.tasks.generator.setup import generator_task
from drift_jax.tools import cache_latents
from drift_jax.tools.work import cache_latents as work
from drift_jax.tools.work import export
from drift_jax.tools.work import sample as drawing
from tests.small_generator import save_run

SIDE, CHANNELS, CLASSES, IMAGES = 4, 6, 2, 12


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
  """{split}/{class}/{n}.npy: with a mirror image's latent, and without."""
  folder = tmp_path_factory.mktemp("arrays")
  rng = np.random.default_rng(0)
  for split in ("train", "validation"):
    for label in range(CLASSES):
      (folder / split / str(label)).mkdir(parents=True)
      for i in range(IMAGES):
        shape = (2, SIDE, SIDE, CHANNELS)[i % 2 :]
        latent = (rng.normal(size=shape) + label).astype(np.float16)
        np.save(folder / split / str(label) / f"{i:02d}.npy", latent)
  return folder


def cache(source, out, split="train", *flags):
  argv = [f"--source=npy:{source}", f"--split={split}", f"--out={out}", *flags]
  return work.run(cache_latents.parse(argv))


@pytest.fixture(scope="module")
def cached(arrays, tmp_path_factory):
  out = tmp_path_factory.mktemp("cache")
  for split in ("train", "validation"):
    assert cache(arrays, out, split)
  return out


def small(cached, **changes):
  config = imagenet_rae.get_config("smoke")
  config.data.source = f"latents:{cached}"
  config.model.update(input_size=SIDE, in_channels=CHANNELS)
  config.model.out_channels = CHANNELS
  config.batch.labels = config.queue.push_per_step = 8
  config.update_from_flattened_dict(changes)
  return config


def test_the_cache_holds_the_arrays(arrays, cached):
  reader = latents.LatentReader(cached, "train", dtype="float32")
  assert reader.sample_shape == (SIDE, SIDE, CHANNELS)
  np.testing.assert_array_equal(reader.labels, np.repeat([0, 1], IMAGES))
  rngs = [np.random.default_rng(i) for i in range(64)]
  read = reader.read(np.repeat([2, 3], 32), rngs)
  pair, single = (np.load(arrays / f"train/0/0{i}.npy") for i in (2, 3))
  flipped = [np.random.default_rng(i).random() < 0.5 for i in range(32)]
  np.testing.assert_array_equal(read[:32], pair[np.int32(flipped)])
  np.testing.assert_array_equal(read[32:], np.stack([single] * 32))


def test_latents_of_three_channels_are_no_images(tmp_path):
  """They are not clipped, and not drawn."""
  changes = dict.fromkeys(("model.in_channels", "model.out_channels"), 3)
  changes["model.num_classes"] = CLASSES
  latents_of_3 = parse(small(tmp_path, **changes))
  assert not judges.are_images(latents_of_3, None)
  # What training samples and judges by; that of a loaded run likewise.
  mesh = sharding.make_mesh()
  assert not generator_task(latents_of_3, {}, mesh).pixels
  pixels = parse(digits.get_config("smoke"))
  assert judges.are_images(pixels, None)
  assert generator_task(pixels, {}, mesh).pixels
  assert drift_jax.load(save_run(tmp_path)).generator.task.pixels


@pytest.mark.slow
def test_a_run_of_arrays_from_cache_to_samples(cached, tmp_path):
  workdir = tmp_path / "run"
  changes = {
    "eval.every": 2,
    "eval.num_samples": 2 * IMAGES,
    "eval.metrics": ("fd_pixel", "coverage"),
  }
  train.train_and_evaluate(small(cached, **changes), str(workdir))
  last = read_jsonl(workdir / "metrics.jsonl")
  found = {key: value for record in last for key, value in record.items()}
  assert np.isfinite([found["loss"], found["eval/fd_pixel/alpha_1.0"]]).all()
  assert "scale/tokens" in found and "scale/global" not in found
  assert not (workdir / "samples").exists()
  model = drift_jax.load(str(workdir))
  assert not model.are_images
  drawn = model.sample(count=3)
  assert drawn.images.shape == (6, SIDE, SIDE, CHANNELS)
  with pytest.raises(UserError, match="a picture shows images"):
    drawn.grid()
  asked = {"labels": None, "count": 3, "alpha": 1.0, "seed": 0, "style": None}
  of = {"generator": {"source": workdir}, "batch_size": 8, "frames": None}
  with pytest.raises(UserError, match=r"shape \(4, 4, 6\).*give an .npz"):
    drawing.draw(asked, "a.png", ".png", **of)
  drawing.draw(asked, str(tmp_path / "a.npz"), ".npz", **of)
  written = np.load(tmp_path / "a.npz")
  np.testing.assert_array_equal(written["arr_0"], drawn.images)
  np.testing.assert_array_equal(written["arr_1"], [0, 0, 0, 1, 1, 1])
  # An export says so too.
  out = tmp_path / "export"
  export.export(str(workdir), str(out), formats=(), platforms=("cpu",))
  again = drift_jax.load(str(out)).sample(count=3)
  np.testing.assert_allclose(again.images, drawn.images, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_named(arrays, cached, tmp_path):
  """Before anything is trained or written."""
  wide = {"model.in_channels": 5, "model.out_channels": 5}
  with pytest.raises(UserError, match=r"\(4, 4, 6\).*\(4, 4, 5\)|in_channels"):
    train.train_and_evaluate(small(cached, **wide), str(tmp_path / "run"))
  judge = {"path": "x", "reference": "x"}
  changes = {"eval.metrics": ("fid", "coverage"), "eval.inception": judge}
  config = parse(small(cached, **changes))
  with pytest.raises(UserError, match=r"\['fid'\].* arrays of 6 channels"):
    run_evaluators(config, {}, None, np.zeros(2), None, sharding.make_mesh())
  with pytest.raises(latents.LatentCacheError, match="leave vae.path empty"):
    latents.LatentReader(cached, "train", expected_vae_sha256="ab")
  for content, message in (
    (np.zeros((3, 4, 6), np.float32), "want float32 or float16 .2, h, h, c"),
    (np.zeros((4, 4, 6), np.int32), "is int32 of shape"),
    (np.zeros((4, 4, 5), np.float32), r"have \(4, 4, 6\): all must have one"),
    (np.full((4, 4, 6), np.nan, np.float32), "not finite"),
    (None, "can't be read as an array"),
  ):
    source = tmp_path / message[:6] / "train" / "0"
    source.mkdir(parents=True)
    np.save(source / "0.npy", np.zeros((4, 4, 6), np.float32))
    path = source / "1.npy"
    pathlib.Path(path).write_bytes(b"no")
    if content is not None:
      np.save(path, content)
    with pytest.raises(DataError, match=message):
      cache(source.parent.parent, tmp_path / "out" / message[:6])

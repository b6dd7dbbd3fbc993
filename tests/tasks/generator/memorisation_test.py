"""Neighbours in the training set: of copies, of new images, in every space."""

import jax
import numpy as np
import pytest

from drift_jax import config as config_lib
from drift_jax.data.readers import ArrayReader
from drift_jax.data.sources import digits
from drift_jax.metrics.images import real_pixels, to_rgb
from drift_jax.models.mae import build_mae
from drift_jax.system import sharding
from drift_jax.tasks.generator.judges import (
  load_judge,
  make_decoder,
  make_pixels,
  network_fn,
)
from drift_jax.tasks.generator.memorisation import (
  check_memorisation,
  feature_space,
)
from drift_jax.training import artifacts
from drift_jax.training.frozen import load_vae
from drift_jax.training.inputs import Readers
from tests.autoencoders import save_vae
from tests.conftest import assert_close
from tests.judges import save_inception, save_vit

MAE = {
  "in_channels": 1,
  "base_channels": 4,
  "layers": (1, 1, 1, 1),
  "input_patch_size": 1,
  "mask_patch_size": 2,
  "num_classes": 10,
  "norm_groups": 4,
  "dtype": "float32",
  "remat": False,
}


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(1, 1, jax.devices()[:1])


@pytest.fixture(scope="module")
def inception(tmp_path_factory, mesh):
  """(folder, its network)."""
  folder = str(save_inception(tmp_path_factory.mktemp("inception")))
  return folder, network_fn(load_judge(folder, mesh), mesh)


@pytest.fixture(scope="module")
def readers():
  train, test = (
    ArrayReader(digits(split), wire="float32") for split in ("train", "test")
  )
  return Readers(train, lambda: test)


def sampler(images, mesh):
  """Draws images[index], whatever the label."""

  def sample_fn(labels, alpha, index):
    del labels, alpha
    return sharding.put_batch(images[index], mesh)

  return sample_fn


def search(images, readers, mesh, space, k=4):
  return check_memorisation(
    sampler(images, mesh),
    np.zeros(len(images), np.int32),
    1.0,
    readers,
    feature_space(
      space,
      encoders(mesh) if space == "encoder" else {},
      None,
      to_rgb,
      mesh,
    ),
    k=k,
    batch_size=64,
    decode=lambda samples: samples,
    mesh=mesh,
  )


def encoders(mesh):
  """A run's autoencoder, untrained."""
  module = build_mae(**MAE)
  keys = {"params": jax.random.key(0), "mask": jax.random.key(0)}
  images = np.zeros((1, 8, 8, 1), np.float32)
  params = jax.jit(module.init)(keys, images)["params"]
  params = jax.device_put(
    {"encoder": params["encoder"]}, sharding.replicated(mesh)
  )
  return {"mae": artifacts.Artifact("mae", module, params, {}, "0")}


def test_pixels_against_all_distances(readers):
  mesh = sharding.make_mesh()
  rng = np.random.default_rng(0)
  copies = [3, 700, 1256]
  train = readers.train.fixed(np.arange(len(readers.train)))
  images = rng.uniform(-1, 1, (70, 8, 8, 1)).astype(np.float32)
  images[[5, 40, 69]] = train[copies]
  found = search(images, readers, mesh, "pixel")
  test = readers.test().fixed(np.arange(540))
  queries = np.concatenate([images, test]).reshape(610, -1)
  distance = np.linalg.norm(
    queries[:, None].astype(np.float64) - train.reshape(1, 1257, -1), axis=-1
  )
  np.testing.assert_allclose(
    found.neighbours.distance, np.sort(distance, axis=1)[:, :4], rtol=1e-12
  )
  assert found.neighbours.index[[5, 40, 69], 0].tolist() == copies
  assert found.neighbours.count == 1257
  generated, held_out = found.nearest
  assert len(generated) == 70 and len(held_out) == 540
  assert found.summary["generated_identical"] == 3 / 70
  # The copies come first in the picture, then others, none twice.
  assert found.shown[:3].tolist() == [5, 40, 69]
  assert len(set(found.shown.tolist())) == 10
  side = 8 * 6
  row = found.picture[2 : 2 + side]
  first, nearest = row[:, 2 : 2 + side], row[:, 4 + side + 12 + 2 :][:, :side]
  np.testing.assert_array_equal(first, nearest)
  assert (
    found.picture.shape[1] > 5 * side and found.picture.shape[0] > 10 * side
  )


@pytest.mark.slow
def test_in_the_encoders_features(readers, mesh):
  images = readers.train.fixed(np.arange(0, 1200, 20))
  found = search(images, readers, mesh, "encoder", k=2)
  np.testing.assert_array_equal(
    found.neighbours.index[:60, 0], np.arange(0, 1200, 20)
  )
  # The same features from batches of other company: equal but for rounding.
  assert found.nearest[0].max() < 1e-3 * np.median(found.nearest[1])
  assert found.space == "encoder"


@pytest.mark.slow
def test_in_a_networks_features(inception, readers, mesh):
  """Reals are looked at as their files' pixels, generated ones truncated."""
  folder, network = inception
  space = feature_space(folder, {}, None, to_rgb, mesh)
  assert space.name == "inception-v3 pool3, other weights"
  images = readers.train.fixed(np.arange(8))
  assert_close(space.of_reals(images), network(real_pixels(images))[0], 1e-6)
  assert_close(
    space.of_samples(images),
    network(np.asarray(to_rgb(images)))[0],
    1e-6,
  )


@pytest.mark.slow
def test_latents_are_decoded_on_both_sides(tmp_path, inception, mesh):
  save_vae(tmp_path / "vae")
  section = config_lib.Vae(
    path=str(tmp_path / "vae"),
    dtype="float32",
    sharding="fsdp",
    remat=False,
    model={},
  )
  vae = load_vae(section, mesh)
  folder, network = inception
  to_pixels = make_pixels(make_decoder(vae, mesh))
  space = feature_space(folder, {}, vae, to_pixels, mesh)
  latents = np.random.default_rng(0).normal(size=(8, 4, 4, 2))
  latents = latents.astype(np.float32)
  pixels = to_pixels(sharding.put_batch(latents, mesh))
  assert pixels.shape == (8, 8, 8, 3)
  expected = network(np.asarray(pixels))[0]
  assert_close(space.of_samples(latents), expected, 1e-6)
  assert_close(space.of_reals(latents), expected, 1e-6)


@pytest.mark.slow
def test_cosine_similarity_in_clips_features(tmp_path, readers, mesh):
  folder = str(save_vit(tmp_path / "clip", family="clip"))
  space = feature_space(folder, {}, None, to_rgb, mesh)
  assert space.name == "clip, weights of tests/judges.py"
  images = readers.train.fixed(np.arange(8))
  network = network_fn(load_judge(folder, mesh), mesh)
  features = np.asarray(network(real_pixels(images))[0])
  lengths = np.linalg.norm(features, axis=1, keepdims=True)
  assert_close(space.of_reals(images), features / lengths, 1e-6)


def test_mistakes(tmp_path, readers, mesh):
  with pytest.raises(config_lib.ConfigError, match="'encoder' need an encoder"):
    feature_space("encoder", {}, None, to_rgb, mesh)
  with pytest.raises(artifacts.ArtifactError, match="no exported model in now"):
    feature_space("nowhere", {}, None, to_rgb, mesh)
  images = readers.train.fixed(np.arange(8))
  with pytest.raises(ValueError, match="k = 1258 neighbours among 1257"):
    search(images, readers, mesh, "pixel", k=1258)

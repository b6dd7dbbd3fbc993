"""Small evaluation networks with random weights, as artifacts."""

import os

import jax
import numpy as np

from drift_jax.data.readers import ArrayReader
from drift_jax.data.sources import digits
from drift_jax.metrics.frechet import FeatureStats
from drift_jax.metrics.images import real_pixels
from drift_jax.metrics.reference import (
  Provenance,
  ReferenceStats,
  save_reference,
)
from drift_jax.models import release
from drift_jax.models.inception import build_inception
from drift_jax.models.vit import build_vit
from drift_jax.system import sharding
from drift_jax.tasks.generator.judges import load_judge, network_fn
from drift_jax.training import artifacts

VIT = {
  "image_size": 8,
  "patch_size": 4,
  "hidden_size": 8,
  "depth": 1,
  "num_heads": 2,
  "mlp_size": 16,
  "activation": "gelu",
  "pre_norm": False,
  "layer_scale": True,
  "patch_bias": True,
  "projection_dim": 0,
  "epsilon": 1e-6,
  "image_mean": (0.5, 0.5, 0.5),
  "image_std": (0.25, 0.25, 0.25),
}


def save_inception(
  folder: str | os.PathLike[str],
  *,
  width: int = 1,
  num_classes: int = 5,
  published: bool = False,
  seed: int = 0,
) -> str | os.PathLike[str]:
  """Writes an Inception-v3 of 128 width features; returns its folder.

  Args:
    folder: of the artifact.
    width, num_classes: see models.build_inception.
    published: whether it claims to hold the published weights.
    seed: of the weights.
  """
  arguments = {"width": width, "num_classes": num_classes}
  inception = build_inception(**arguments)
  shapes = jax.eval_shape(
    inception.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.uint8)
  )["params"]
  rng = np.random.default_rng(seed)

  def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    # The signal keeps its size from layer to layer; larger offsets drown it,
    # and then the features of all images are nearly the same.
    fan_in = np.prod(leaf.shape[:-1])
    scale = np.sqrt(2 / fan_in) if leaf.ndim > 1 else 0.1
    return (scale * rng.normal(size=leaf.shape)).astype(np.float32)

  artifacts.save(
    folder,
    kind="inception",
    model_config=arguments,
    params=jax.tree.map(draw, shapes),
    step=None,
    ema_decay=None,
    source={"location": "tests/judges.py", "published": published},
  )
  return folder


def save_vit(
  folder: str | os.PathLike[str], *, family: str = "dinov2", **changes
) -> str | os.PathLike[str]:
  """Writes a tiny Vision Transformer of a family; returns its folder."""
  arguments = VIT | changes
  vit = build_vit(**arguments)
  init = jax.jit(vit.init)  # at once, not one operation after the other
  params = init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.uint8))
  artifacts.save(
    folder,
    kind="vit",
    model_config=release.published_config("vit", arguments),
    params=params["params"],
    step=None,
    ema_decay=None,
    source={"location": "tests/judges.py", "family": family},
  )
  return folder


def save_statistics(
  path: str | os.PathLike[str],
  folder: str | os.PathLike[str],
  pixels: np.ndarray,
  *,
  crop: str,
) -> str | os.PathLike[str]:
  """Writes reference statistics of images [N, H, H, 3] in a network's features.

  Args:
    path: .npz to write, which is returned.
    folder: of the network.
    pixels: uint8.
    crop: what they claim to be cut by.
  """
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  artifact = load_judge(str(folder), mesh)
  features = np.asarray(network_fn(artifact, mesh)(pixels)[0])
  return _save_features(
    path, artifact, features, resolution=pixels.shape[1], crop=crop
  )


def save_random_statistics(
  path: str | os.PathLike[str],
  folder: str | os.PathLike[str],
  *,
  resolution: int,
  crop: str,
) -> str | os.PathLike[str]:
  """Statistics of random features that fit `save_inception`'s network.

  For tests that need a file but not what is in it: nothing is compiled.
  """
  features = np.random.default_rng(0).normal(size=(200, 128))
  return _save_features(
    path,
    artifacts.load(folder),
    features.astype(np.float32),
    resolution=resolution,
    crop=crop,
  )


def _save_features(
  path: str | os.PathLike[str],
  artifact: artifacts.Artifact,
  features: np.ndarray,
  *,
  resolution: int,
  crop: str,
) -> str | os.PathLike[str]:
  provenance = Provenance(
    source="digits",
    split="train",
    crop=crop,
    resolution=resolution,
    network="test",
    network_sha256=artifact.sha256,
  )
  stats = FeatureStats.from_features(features)
  save_reference(path, ReferenceStats.from_stats(stats, provenance, features))
  return path


def digit_pixels(count: int) -> np.ndarray:
  """The first of the training digits, uint8 [count, 8, 8, 3]."""
  reader = ArrayReader(digits("train"), wire="float32")
  return real_pixels(reader.fixed(np.arange(count)))

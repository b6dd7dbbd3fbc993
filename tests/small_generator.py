"""A small generator of pixels with random weights, for tests of samples."""

import os

import jax
import numpy as np

from configs import digits
from drift_jax import artifacts, models
from drift_jax.models import release

NAMES = ("tench, Tinca tinca", "goldfish", "white shark, shark", "hammer shark")


def arguments(**changes):
  """Of models.build_generator."""
  config = digits.get_config("smoke").model
  sizes = {"depth": 1, "hidden_size": 16, "cond_dim": 16, "num_heads": 2}
  config.update({**sizes, "num_classes": len(NAMES), **changes})
  return config.to_dict()


def random_params(arguments, seed: int = 0):
  """None of them zero, as initial ones would be."""
  module = models.build_generator(**arguments)
  shapes = jax.eval_shape(
    lambda: module.init(
      {"params": jax.random.key(0), "noise": jax.random.key(0)},
      np.zeros(1, np.int32),
      np.ones(1, np.float32),
    )["params"]
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), shapes
  )


def save_generator(
  folder: str | os.PathLike[str], *, seed: int = 0, facts=None, **changes
) -> str:
  """Writes it as an artifact; returns its folder."""
  chosen = arguments(**changes)
  artifacts.save(
    folder,
    kind="gen",
    model_config=release.published_config("gen", chosen),
    params=random_params(chosen, seed),
    step=3,
    ema_decay=0.9,
    facts={"class_names": NAMES, "alpha_range": (1.0, 3.0)}
    if facts is None
    else facts,
  )
  return str(folder)

"""Small autoencoders with random weights, for tests of latents."""

import os

import jax
import numpy as np

from drift_jax.models import release
from drift_jax.models.vae import build_vae
from drift_jax.training import artifacts

ARGUMENTS = {
  "in_channels": 3,
  "latent_channels": 2,
  "widths": (4, 4),
  "blocks_per_level": 1,
  "norm_groups": 2,
  "scaling_factor": 0.18215,
  "dtype": "float32",
  "remat": False,
}


def save_vae(
  folder: str | os.PathLike[str], seed: int = 0, **changes
) -> str | os.PathLike[str]:
  """Writes an autoencoder as an artifact; returns its folder."""
  arguments = ARGUMENTS | changes
  vae = build_vae(**arguments)
  side = vae.downsampling
  shapes = jax.eval_shape(
    vae.init, jax.random.key(0), np.zeros((1, side, side, 3), np.float32)
  )["params"]
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), shapes
  )
  artifacts.save(
    folder,
    kind="vae",
    model_config=release.published_config("vae", arguments),
    params=params,
    step=None,
    ema_decay=None,
  )
  return folder

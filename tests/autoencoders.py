"""Small autoencoders with random weights, for tests of latents."""

import os

from tests.builders import save_model

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
  return save_model(folder, "vae", ARGUMENTS | changes, seed=seed)

"""The authors' released weights: what there is, and what they published of it.

Their repository is on the Hugging Face hub; `hf://NAME` names an artifact of
it. Imports nothing heavy.
"""

from typing import NamedTuple

REPOSITORY = "Goodeat/drifting"
FOLDERS = {"gen": "models/gen/jax", "mae": "models/mae/jax"}
# Of their generators of latents: the repository of Stable Diffusion's
# fine-tuned autoencoder that has the safest form of its weights.
AUTOENCODER = "hf://stabilityai/sd-vae-ft-mse"


class Released(NamedTuple):
  """A released artifact.

  Attributes:
    name: hf://NAME loads it.
    kind: 'gen', a generator, or 'mae', a feature encoder.
    model: its size, and what it works on.
    gigabytes: of the download.
    alpha: guidance scale of the published FID, where it is known.
    fid: published FID-50K.
  """

  name: str
  kind: str
  model: str
  gigabytes: float
  alpha: float | None = None
  fid: float | None = None


_RELEASED = (
  Released("latent_L_sota", "gen", "L/2, latents", 1.85, 1.0, 1.53),
  Released("latent_B_sota", "gen", "B/2, latents", 0.53, 1.1, 1.74),
  Released("ablation", "gen", "B/2, latents, 30k steps", 0.53, 2.0, 8.49),
  Released("pixel_L_sota", "gen", "L/16, pixels", 1.86, 1.0, 1.62),
  Released("pixel_B_sota", "gen", "B/16, pixels", 0.54, None, 1.73),
  Released("mae_latent_640", "mae", "width 640, latents", 10.75),
  Released("mae_latent_256", "mae", "width 256, latents", 1.73),
  Released("mae_pixel_640", "mae", "width 640, pixels", 10.8),
)


def released() -> tuple[Released, ...]:
  """The authors' artifacts that `hf://NAME` names, with published figures."""
  return _RELEASED


def listed() -> str:
  """All of them in one line, for messages."""
  return "; ".join(
    f"{entry.name} ({entry.model}, {entry.gigabytes:g} GB"
    + f", FID {entry.fid}" * (entry.fid is not None)
    + f" at alpha {entry.alpha}" * (entry.alpha is not None)
    + ")"
    for entry in _RELEASED
  )

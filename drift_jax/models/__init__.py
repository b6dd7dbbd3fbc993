"""Models as functions of arrays and keyword arguments."""

from drift_jax.models.convnext import build_convnext
from drift_jax.models.generator import build_generator
from drift_jax.models.inception import InceptionOutput, build_inception
from drift_jax.models.mae import MAEOutput, build_mae, mae_loss
from drift_jax.models.precision import rounded, used_dtypes
from drift_jax.models.resnet import build_resnet
from drift_jax.models.vae import build_vae, latent_mean, sample_latents
from drift_jax.models.vit import build_vit
from drift_jax.tasks.policy.network import Policy
from drift_jax.tasks.policy.observations import ObservationEncoder, crop_offsets
from drift_jax.tasks.policy.unet1d import ConditionalUnet1d
from drift_jax.tasks.toy.model import TOY_KINDS, build_toy

__all__ = [
  "TOY_KINDS",
  "ConditionalUnet1d",
  "InceptionOutput",
  "MAEOutput",
  "ObservationEncoder",
  "Policy",
  "build_convnext",
  "build_generator",
  "build_inception",
  "build_mae",
  "build_resnet",
  "build_toy",
  "build_vae",
  "build_vit",
  "crop_offsets",
  "latent_mean",
  "mae_loss",
  "rounded",
  "sample_latents",
  "used_dtypes",
]

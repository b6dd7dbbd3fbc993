"""Models as functions of arrays and keyword arguments."""

from drift_jax.models.convnext import build_convnext
from drift_jax.models.generator import build_generator
from drift_jax.models.mae import MAEOutput, build_mae, mae_loss

__all__ = [
  "MAEOutput",
  "build_convnext",
  "build_generator",
  "build_mae",
  "mae_loss",
]

"""Models as functions of arrays and keyword arguments.

Public names, see docs/api.md; code inside the package asks their modules.
"""

from drift_jax.system import lazy

_NAMES = {
  "models.precision": ("precision",),
  "models.release": ("release",),
  "models.generator": ("build_generator",),
  "models.mae": ("build_mae", "mae_loss"),
  "models.convnext": ("build_convnext",),
  "models.resnet": ("build_resnet",),
  "models.vae": ("build_vae", "latent_mean", "sample_latents"),
  "models.inception": ("build_inception",),
  "models.vit": ("build_vit",),
  "tasks.policy.network": ("Policy",),
  "tasks.policy.observations": ("ObservationEncoder",),
  "tasks.policy.unet1d": ("ConditionalUnet1d",),
}
__getattr__, __dir__ = lazy.names(__name__, lazy.homes("drift_jax", _NAMES))

"""Models as functions of arrays and keyword arguments.

Public names, see docs/api.md; code inside the package asks their modules.
"""

from drift_jax.system import lazy

_HOMES = {
  **dict.fromkeys(["build_generator"], "drift_jax.models.generator"),
  **dict.fromkeys(["build_mae", "mae_loss"], "drift_jax.models.mae"),
  **dict.fromkeys(["build_convnext"], "drift_jax.models.convnext"),
  **dict.fromkeys(["build_resnet"], "drift_jax.models.resnet"),
  **dict.fromkeys(
    ["build_vae", "latent_mean", "sample_latents"], "drift_jax.models.vae"
  ),
  **dict.fromkeys(["build_inception"], "drift_jax.models.inception"),
  **dict.fromkeys(["build_vit"], "drift_jax.models.vit"),
  **dict.fromkeys(["Policy"], "drift_jax.tasks.policy.network"),
  **dict.fromkeys(
    ["ObservationEncoder"], "drift_jax.tasks.policy.observations"
  ),
  **dict.fromkeys(["ConditionalUnet1d"], "drift_jax.tasks.policy.unet1d"),
}
__getattr__ = lazy.names(__name__, _HOMES)

"""Data: sources, readers, the Grain loader, the sample queue and the feeds.

Public names, see docs/api.md; code inside the package asks their modules.
"""

from drift_jax.system import lazy

_HOMES = {
  **dict.fromkeys(
    ["open_source", "held_out", "ArraySource", "Source"],
    "drift_jax.data.sources",
  ),
  **dict.fromkeys(
    ["ArrayReader", "ImageReader", "Reader"], "drift_jax.data.readers"
  ),
  **dict.fromkeys(["LatentReader"], "drift_jax.data.latents"),
  **dict.fromkeys(["Loader"], "drift_jax.data.loader"),
  **dict.fromkeys(["DataError"], "drift_jax.data.errors"),
  **dict.fromkeys(
    ["read_replay", "write_replay"], "drift_jax.tasks.policy.replay"
  ),
  **dict.fromkeys(["read_robomimic"], "drift_jax.tasks.policy.robomimic"),
}
__getattr__ = lazy.names(__name__, _HOMES)

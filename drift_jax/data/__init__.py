"""Data: sources, readers, the Grain loader, the sample queue and the feeds.

Public names, see docs/api.md; code inside the package asks their modules.
"""

from drift_jax.system import lazy

_HOMES = {
  name: f"drift_jax.{module}"
  for module, names in {
    "data.sources": ("open_source", "held_out", "ArraySource", "Source"),
    "data.readers": ("ArrayReader", "ImageReader", "Reader"),
    "data.latents": ("LatentReader",),
    "data.loader": ("Loader",),
    "data.errors": ("DataError",),
    "tasks.policy.replay": ("read_replay", "write_replay"),
    "tasks.policy.robomimic": ("read_robomimic",),
  }.items()
  for name in names
}
__getattr__ = lazy.names(__name__, _HOMES)

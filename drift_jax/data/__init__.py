"""Data: sources, readers, the Grain loader, the sample queue and the feeds.

Public names, see docs/api.md; code inside the package asks their modules.
"""

from drift_jax.system import lazy

_NAMES = {
  "data.sources": ("open_source", "held_out", "ArraySource", "Source"),
  "data.readers": ("ArrayReader", "Reader"),
  "data.images": ("ImageReader",),
  "data.latents": ("LatentReader",),
  "data.loader": ("Loader",),
  "system.errors": ("DataError",),
  "tasks.policy.replay": ("read_replay", "write_replay"),
  "tasks.policy.robomimic": ("read_robomimic",),
}
__getattr__, __dir__ = lazy.names(__name__, lazy.homes("drift_jax", _NAMES))

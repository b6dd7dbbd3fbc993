"""Drifting Models in JAX: one-step generators trained by a drifting field.

model = drift_jax.load("runs/digits")   # an export, hf://latent_L_sota
samples = model.sample([3, 7], count=8)
samples.show()
"""

import sys
from typing import TYPE_CHECKING

from drift_jax.system import lazy

if TYPE_CHECKING:
  from drift_jax.sampling import load
  from drift_jax.training.released import released

__version__ = "0.2.0"
__all__ = ["load", "released"]

# `load` brings JAX and all the models. The others are modules under the names
# that docs/api.md once gave them.
_HOMES = {
  "load": "drift_jax.sampling",
  "released": "drift_jax.training.released",
  "artifacts": "drift_jax.training.artifacts",
  "checkpoint": "drift_jax.training.checkpoint",
  "experiment": "drift_jax.tasks.policy.evaluation",
  "loop": "drift_jax.training.loop",
  "robots": "drift_jax.tasks.policy.robots",
  "train": "drift_jax.tasks.generator.train",
  "train_mae": "drift_jax.tasks.mae.train",
}
if sys.argv[:1] == ["-m"]:  # which looks for a program
  lazy.end_in_one_line()
__getattr__, __dir__ = lazy.names(__name__, _HOMES)

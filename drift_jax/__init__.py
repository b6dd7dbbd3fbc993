"""Drifting Models in JAX: one-step generators trained by a drifting field.

model = drift_jax.load("runs/digits")   # or an export, or hf://NAME
samples = model.sample([3, 7], count=8)
samples.show()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from drift_jax.sampling import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
  """`load` only when it is asked for: it brings JAX and all the models."""
  if name != "load":
    raise AttributeError(f"module 'drift_jax' has no attribute {name!r}")
  from drift_jax import sampling

  return sampling.load

"""The Inception-v3 of FID, as pytorch-fid and torch-fidelity publish it."""

from drift_jax.models.naming import Entry, Shapes
from drift_jax.training.conversions.layouts import (
  LEAVES,
  Config,
  Converted,
  Weights,
  convert,
)

MODEL_CONFIG = {"width": 16, "num_classes": 1008}
BATCH_NORM_EPSILON = 1e-3


def convert_inception(weights: Weights, config: Config | None) -> Converted:
  """pytorch-fid's state dict -> kind 'inception'.

  Args:
    weights: torch's layouts (OIHW convolutions); any floating dtype.
    config: not looked at.

  Raises:
    WeightsError: names, shapes or values that do not fit.
  """
  del config
  return convert(
    "FID's Inception-v3",
    "inception",
    dict(MODEL_CONFIG),
    entries,
    weights,
    batch_norm_epsilon=BATCH_NORM_EPSILON,
  )


def entries(shapes: Shapes) -> dict[str, Entry]:
  """Names in pytorch-fid's state dict: ours, but for the BatchNorms."""
  named = {}
  for path in shapes:
    module, _, leaf = path.rpartition("/")
    part = {"kernel": ".conv", "bias": ".bn"}[leaf] if module != "fc" else ""
    name = f"{module.replace('/', '.')}{part}.{LEAVES.get(leaf, leaf)}"
    named[path] = Entry((name,))
  return named

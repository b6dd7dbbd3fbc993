"""Evaluators, writers, image files and curves. Nothing here reads a config.

Public names, see docs/api.md; code inside the package asks their modules.
"""

from drift_jax.system import lazy

_NAMES = {
  "frechet": ("FeatureStats", "FeatureStream", "frechet_distance"),
  "reference": ("load_reference", "save_reference"),
  "inception_score": ("InceptionScore", "inception_score"),
  "precision_recall": ("precision_recall",),
  "coverage": ("density_coverage",),
  "kid": ("kernel_distance",),
  "neighbours": ("nearest_neighbours",),
  "errors": ("EvaluationError",),
}
__getattr__ = lazy.names(
  __name__,
  {name: f"{__name__}.{home}" for home in _NAMES for name in _NAMES[home]},
)

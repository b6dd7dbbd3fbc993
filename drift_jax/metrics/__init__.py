"""Evaluators, writers, image files and curves. Nothing here reads a config.

Public names, see docs/api.md; code inside the package asks their modules.
"""

from drift_jax.system import lazy

_NAMES = {
  "metrics.frechet": ("FeatureStats", "FeatureStream", "frechet_distance"),
  "metrics.reference": ("load_reference", "save_reference"),
  "metrics.inception": ("InceptionScore", "inception_score"),
  "metrics.coverage": ("density_coverage", "precision_recall"),
  "metrics.kid": ("kernel_distance",),
  "metrics.neighbours": ("nearest_neighbours",),
  "system.errors": ("EvaluationError",),
}
HOMES = lazy.homes("drift_jax", _NAMES)
__getattr__, __dir__ = lazy.names(__name__, HOMES)

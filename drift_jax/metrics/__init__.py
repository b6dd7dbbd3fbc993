"""Evaluators, writers, image files and curves. Nothing here reads a config.

Public names, see docs/api.md; code inside the package asks their modules.
"""

from drift_jax.system import lazy

_NAMES = {
  "frechet": ("FeatureStats", "FeatureStream", "frechet_distance"),
  "reference": ("load_reference", "save_reference"),
  "inception": ("InceptionScore", "inception_score"),
  "coverage": ("density_coverage", "precision_recall"),
  "kid": ("kernel_distance",),
  "neighbours": ("nearest_neighbours",),
  "errors": ("EvaluationError",),
}
HOMES = {name: f"{__name__}.{home}" for home in _NAMES for name in _NAMES[home]}
__getattr__ = lazy.names(__name__, HOMES)

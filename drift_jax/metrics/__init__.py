"""Evaluators, writers, image files and curves. Nothing here reads a config.

Public names, see docs/api.md; code inside the package asks their modules.
"""

from drift_jax.system import lazy

_HOMES = {
  **dict.fromkeys(
    ["FeatureStats", "FeatureStream", "frechet_distance"],
    "drift_jax.metrics.frechet",
  ),
  **dict.fromkeys(
    ["load_reference", "save_reference"], "drift_jax.metrics.reference"
  ),
  **dict.fromkeys(
    ["InceptionScore", "inception_score"], "drift_jax.metrics.inception_score"
  ),
  **dict.fromkeys(["precision_recall"], "drift_jax.metrics.precision_recall"),
  **dict.fromkeys(["density_coverage"], "drift_jax.metrics.coverage"),
  **dict.fromkeys(["kernel_distance"], "drift_jax.metrics.kid"),
  **dict.fromkeys(["nearest_neighbours"], "drift_jax.metrics.neighbours"),
  **dict.fromkeys(["EvaluationError"], "drift_jax.metrics.errors"),
}
__getattr__ = lazy.names(__name__, _HOMES)

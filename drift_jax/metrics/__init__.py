"""Evaluators, writers, image files and curves. Nothing here reads a config."""

from drift_jax.metrics.coverage import (
  density_coverage,
  duplicates,
  nearest_distances,
)
from drift_jax.metrics.evaluators import (
  Evaluator,
  FrechetEvaluator,
  Reals,
  baselines,
  class_subset,
)
from drift_jax.metrics.files import replacing
from drift_jax.metrics.frechet import FeatureStats, frechet_distance
from drift_jax.metrics.generation import (
  SampleFn,
  balanced_labels,
  evaluate,
  evaluation_scalars,
  generate,
)
from drift_jax.metrics.images import (
  image_grid,
  save_png,
  to_uint8,
  unit_to_uint8,
)
from drift_jax.metrics.plots import plot_drift, plot_frechet, plot_mae
from drift_jax.metrics.small_sets import (
  MAX_IMAGES,
  CoverageEvaluator,
  DuplicatesEvaluator,
  LabelAccuracyEvaluator,
)
from drift_jax.metrics.writers import (
  JsonlWriter,
  MetricWriter,
  create_writer,
  read_jsonl,
)

__all__ = [
  "MAX_IMAGES",
  "Reals",
  "CoverageEvaluator",
  "DuplicatesEvaluator",
  "Evaluator",
  "FeatureStats",
  "FrechetEvaluator",
  "JsonlWriter",
  "LabelAccuracyEvaluator",
  "MetricWriter",
  "SampleFn",
  "balanced_labels",
  "baselines",
  "class_subset",
  "create_writer",
  "density_coverage",
  "duplicates",
  "evaluate",
  "evaluation_scalars",
  "frechet_distance",
  "generate",
  "image_grid",
  "nearest_distances",
  "plot_drift",
  "plot_frechet",
  "plot_mae",
  "read_jsonl",
  "replacing",
  "save_png",
  "to_uint8",
  "unit_to_uint8",
]

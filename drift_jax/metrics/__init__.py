"""Evaluators, writers, image files and curves. Nothing here reads a config."""

from drift_jax.metrics.batches import Batch, PixelsFn, local_batches
from drift_jax.metrics.coverage import (
  density_coverage,
  duplicates,
  nearest_distances,
)
from drift_jax.metrics.errors import EvaluationError
from drift_jax.metrics.evaluators import (
  Evaluator,
  FeatureFn,
  FrechetEvaluator,
  Reals,
  baselines,
  class_subset,
  features_of,
)
from drift_jax.metrics.files import (
  PathLike,
  replacing,
  report_text,
  write_report,
)
from drift_jax.metrics.frechet import (
  FeatureStats,
  FeatureStream,
  Moments,
  check_frechet_width,
  frechet_distance,
)
from drift_jax.metrics.generation import (
  SampleFn,
  balanced_labels,
  evaluate,
  evaluation_scalars,
  generate,
  read_labels,
)
from drift_jax.metrics.images import (
  image_grid,
  real_pixels,
  require_finite,
  save_image,
  to_rgb,
  to_uint8,
  unit_to_uint8,
)
from drift_jax.metrics.inception_score import InceptionScore, inception_score
from drift_jax.metrics.kid import kernel_distance, kernel_distance_subsets
from drift_jax.metrics.memory import check_fits
from drift_jax.metrics.neighbours import (
  Neighbours,
  distance_summary,
  nearest_neighbours,
  neighbour_grid,
  plot_nearest_distances,
)
from drift_jax.metrics.network import NetworkEvaluator
from drift_jax.metrics.plots import (
  PlottedRow,
  plot_alphas,
  plot_diagnostics,
  plot_drift,
  plot_frechet,
  plot_mae,
  plot_policies,
  plot_policy,
  plot_rows,
  plot_toy,
)
from drift_jax.metrics.precision_recall import precision_recall
from drift_jax.metrics.reference import (
  Provenance,
  ReferenceStats,
  load_reference,
  save_reference,
)
from drift_jax.metrics.sample_files import ImageSet, SampleWriter, open_images
from drift_jax.metrics.sample_folder import SampleFolder
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
from drift_jax.tasks.toy.figures import (
  Coverage,
  baseline,
  energy_distance,
  mean_distance,
  mode_coverage,
  sliced_wasserstein,
)
from drift_jax.tasks.toy.plots import (
  plane_limit,
  plot_field,
  plot_toy_table,
  save_evolution,
)

__all__ = [
  "MAX_IMAGES",
  "Batch",
  "Coverage",
  "CoverageEvaluator",
  "DuplicatesEvaluator",
  "EvaluationError",
  "Evaluator",
  "FeatureFn",
  "FeatureStats",
  "FeatureStream",
  "FrechetEvaluator",
  "ImageSet",
  "InceptionScore",
  "JsonlWriter",
  "LabelAccuracyEvaluator",
  "MetricWriter",
  "Moments",
  "Neighbours",
  "NetworkEvaluator",
  "PixelsFn",
  "PlottedRow",
  "PathLike",
  "Provenance",
  "Reals",
  "ReferenceStats",
  "SampleFn",
  "SampleFolder",
  "SampleWriter",
  "balanced_labels",
  "baseline",
  "baselines",
  "check_fits",
  "check_frechet_width",
  "class_subset",
  "create_writer",
  "density_coverage",
  "distance_summary",
  "duplicates",
  "energy_distance",
  "evaluate",
  "evaluation_scalars",
  "features_of",
  "frechet_distance",
  "generate",
  "image_grid",
  "inception_score",
  "kernel_distance",
  "kernel_distance_subsets",
  "load_reference",
  "local_batches",
  "mean_distance",
  "mode_coverage",
  "nearest_distances",
  "nearest_neighbours",
  "neighbour_grid",
  "open_images",
  "plane_limit",
  "plot_alphas",
  "plot_diagnostics",
  "plot_drift",
  "plot_field",
  "plot_frechet",
  "plot_mae",
  "plot_nearest_distances",
  "plot_policies",
  "plot_policy",
  "plot_rows",
  "plot_toy",
  "plot_toy_table",
  "precision_recall",
  "read_jsonl",
  "read_labels",
  "real_pixels",
  "replacing",
  "report_text",
  "require_finite",
  "save_evolution",
  "save_image",
  "save_reference",
  "sliced_wasserstein",
  "to_rgb",
  "to_uint8",
  "unit_to_uint8",
  "write_report",
]

"""Drifting: the field, the loss, features, guidance (arXiv:2602.04770).

Pure functions of arrays and keyword arguments.

  compute_v      the drifting field on raw distances (Alg. 2)
  coefficients   its coefficients and affinities
  drift_loss     the normalised, weighted, multi-temperature loss (A.6)
  drift_losses   that of each of many features, together
  DriftInfo      what drift_loss reports beside the loss
  Variant        another field, other negatives, guidance, normalisation
  FIELDS         the family of fields, by name, see drift.family; each maps a
                 Problem to Coefficients or Velocities
  compute_field  any field of the family at given points
  Scalars        what couples a batch's problems, for parts of it
  squared_distances, affinities, product_coefficients, mean_shift
                 the steps of the field, shared by compute_v and drift_loss
  pooled_features, root_mean_square
                 the feature vectors of a map or of the input (A.5)
  sample_alpha, alpha_from_uniform, drop_guidance, unconditional_weight
                 classifier-free guidance at training time (A.7)
"""

from drift_jax.drift.family import (
  FIELDS,
  Coefficients,
  Problem,
  Targets,
  Velocities,
  check_field,
)
from drift_jax.drift.features import pooled_features, root_mean_square
from drift_jax.drift.field import (
  Normalization,
  affinities,
  coefficients,
  compute_v,
  mean_shift,
  product_coefficients,
  squared_distances,
)
from drift_jax.drift.guidance import (
  alpha_from_uniform,
  drop_guidance,
  sample_alpha,
  unconditional_weight,
)
from drift_jax.drift.loss import (
  PAPER,
  DriftInfo,
  Scalars,
  Variant,
  compute_field,
  drift_loss,
)
from drift_jax.drift.many import DriftReport, Kernel, drift_losses

__all__ = [
  "FIELDS",
  "PAPER",
  "Coefficients",
  "Problem",
  "Targets",
  "Variant",
  "Velocities",
  "compute_field",
  "DriftInfo",
  "DriftReport",
  "Kernel",
  "Normalization",
  "Scalars",
  "affinities",
  "alpha_from_uniform",
  "check_field",
  "coefficients",
  "compute_v",
  "drift_loss",
  "drift_losses",
  "drop_guidance",
  "mean_shift",
  "pooled_features",
  "product_coefficients",
  "root_mean_square",
  "sample_alpha",
  "squared_distances",
  "unconditional_weight",
]

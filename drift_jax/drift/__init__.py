"""Drifting: the field, the loss, features, guidance (arXiv:2602.04770).

Pure functions of arrays and keyword arguments. To read: `reference.paper_loss`,
the paper in 40 lines; then `loss.drift_loss`, which is used.

  compute_v      the drifting field on raw distances (Alg. 2)
  coefficients   its coefficients and affinities
  compute_field  any field of the family at given points
  paper_loss     the loss in its simplest form
  drift_loss     the normalised, weighted, multi-temperature loss (A.6)
  drift_losses   that of each of many features, together
  DriftInfo      what drift_loss reports beside the loss
  DriftReport    what drift_losses reports: DriftInfo of each feature
  Scalars        scalars shared by all problems of a feature, for parts of it
  Kernel         backends that compute drift_losses
  has_kernel     whether they compute a variant
  Variant        another field, other negatives, guidance, normalisation
  PAPER          the variant that departs from the paper nowhere
  FIELDS         the family of fields, by name, see drift.family; each maps a
                 Problem to Coefficients or Velocities, one set of Targets at a
                 time or all together
  check_field    raises an error for an unknown field or option
  squared_distances, affinities, product_coefficients, mean_shift
                 the steps of the field; Normalization names the affinities'
  pooled_features, root_mean_square
                 the feature vectors of a map or of the input (A.5)
  sample_alpha, alpha_from_uniform, drop_guidance, unconditional_weight
                 classifier-free guidance at training time (A.7)
"""

from drift_jax.drift.diagnostics import DriftInfo, Scalars
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
  mean_shift,
  product_coefficients,
  squared_distances,
)
from drift_jax.drift.fused import has_kernel
from drift_jax.drift.guidance import (
  alpha_from_uniform,
  drop_guidance,
  sample_alpha,
  unconditional_weight,
)
from drift_jax.drift.loss import drift_loss
from drift_jax.drift.many import Backend as Kernel
from drift_jax.drift.many import DriftReport, drift_losses
from drift_jax.drift.points import coefficients, compute_field, compute_v
from drift_jax.drift.reference import paper_loss
from drift_jax.drift.variant import PAPER, Variant

__all__ = [
  "FIELDS",
  "PAPER",
  "Coefficients",
  "DriftInfo",
  "DriftReport",
  "Kernel",
  "Normalization",
  "Problem",
  "Scalars",
  "Targets",
  "Variant",
  "Velocities",
  "affinities",
  "alpha_from_uniform",
  "check_field",
  "coefficients",
  "compute_field",
  "compute_v",
  "drift_loss",
  "drift_losses",
  "drop_guidance",
  "has_kernel",
  "mean_shift",
  "paper_loss",
  "pooled_features",
  "product_coefficients",
  "root_mean_square",
  "sample_alpha",
  "squared_distances",
  "unconditional_weight",
]

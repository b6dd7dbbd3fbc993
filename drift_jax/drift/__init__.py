"""Drifting: the field, the loss, features, guidance (arXiv:2602.04770).

Pure functions of arrays and keyword arguments.

  compute_v      the drifting field on raw distances (Alg. 2)
  coefficients   its coefficients and affinities
  drift_loss     the normalised, weighted, multi-temperature loss (A.6)
  drift_losses   that of each of many features, together
  DriftInfo      what drift_loss reports beside the loss
  Scalars        what couples a batch's problems, for parts of it
  squared_distances, affinities, product_coefficients, mean_shift
                 the steps of the field, shared by compute_v and drift_loss
  pooled_features, root_mean_square
                 the feature vectors of a map or of the input (A.5)
  sample_alpha, alpha_from_uniform, drop_guidance, unconditional_weight
                 classifier-free guidance at training time (A.7)
"""

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
from drift_jax.drift.loss import DriftInfo, Scalars, drift_loss
from drift_jax.drift.many import DriftReport, Kernel, drift_losses

__all__ = [
  "DriftInfo",
  "DriftReport",
  "Kernel",
  "Normalization",
  "Scalars",
  "affinities",
  "alpha_from_uniform",
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

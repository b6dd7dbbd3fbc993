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

Code inside the package asks the modules.
"""

from drift_jax.system import lazy

_NAMES = {
  "diagnostics": ("DriftInfo", "Scalars"),
  "family": (
    *("FIELDS", "Coefficients", "Problem", "Targets", "Velocities"),
    "check_field",
  ),
  "features": ("pooled_features", "root_mean_square"),
  "field": (
    *("Normalization", "affinities", "mean_shift", "product_coefficients"),
    "squared_distances",
  ),
  "guidance": (
    *("alpha_from_uniform", "drop_guidance", "sample_alpha"),
    "unconditional_weight",
  ),
  "loss": ("drift_loss",),
  "many": ("DriftReport", "Kernel", "drift_losses"),
  "points": ("coefficients", "compute_field", "compute_v"),
  "reference": ("paper_loss",),
  "variant": ("PAPER", "Variant"),
}
__getattr__, __dir__ = lazy.names(__name__, lazy.homes(__name__, _NAMES))

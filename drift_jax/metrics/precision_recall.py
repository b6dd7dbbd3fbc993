"""Improved precision and recall (Kynkaanniemi et al. 2019)."""

import numpy as np
from numpy.typing import ArrayLike

from drift_jax.metrics import distances


def precision_recall(
  real: ArrayLike, fake: ArrayLike, k: int
) -> tuple[float, float]:
  """Precision and recall (arXiv:1904.06991, eq. 1 and 2).

  With B(x; X) the closed ball around x in X that reaches to its k-th nearest
  other point of X, N reals and M fakes:

      precision = 1 / M sum_j 1[fake_j in some B(real_i; real)]
      recall    = 1 / N sum_i 1[real_i in some B(fake_j; fake)]

  arXiv:2602.04770 reports them with k = 3 for Inception-v3 features. Distances
  are Euclidean and exact in float64, see `distances`.

  Memory: features are not copied when they are float32; beyond them about 7
  blocks of 2^22 float64 numbers, 0.24 GB.

  Args:
    real: [N, D] features of real samples.
    fake: [M, D] features of generated samples.
    k: neighbours, 1 <= k < min(N, M).

  Returns:
    (precision, recall), both in [0, 1].

  Raises:
    ValueError: for empty, non-finite or ill-matched features, or k out of
      range.
  """
  real, fake = distances.as_points(real=real, fake=fake)
  distances.check_neighbours(k, len(real), "real")
  distances.check_neighbours(k, len(fake), "fake")
  return _fraction_inside(real, fake, k), _fraction_inside(fake, real, k)


def _fraction_inside(centres: np.ndarray, points: np.ndarray, k: int) -> float:
  """Fraction of points in the balls around centres."""
  radii = distances.neighbour_radii(centres, k)
  _, around_point = distances.ball_counts(centres, radii, points, closed=True)
  return float(np.mean(around_point > 0))

"""Precision, recall, density, coverage and duplicates from neighbours.

All distances are Euclidean and exact in float64, in blocks: see `distances`.
Time grows with the product of the counts: for small data sets.
"""

import numpy as np
from numpy.typing import ArrayLike

from drift_jax.metrics import distances

# A generated sample nearer to the training set than this quantile of the
# held-out reals is a near duplicate.
NEAR_QUANTILE = 0.01


def density_coverage(
  real: ArrayLike, fake: ArrayLike, k: int
) -> tuple[float, float]:
  """Density and coverage (Naeem et al. 2020, arXiv:2002.09797, eq. 4 and 5).

  With B_i the open ball around real i that reaches to its k-th nearest other
  real, N reals and M fakes:

      density  = 1 / (k M) sum_j sum_i 1[fake_j in B_i]
      coverage = 1 / N sum_i 1[some fake_j in B_i]

  Balls are open as in the authors' package, so the reals themselves have
  density and coverage 1 exactly (if no two distances tie).

  Args:
    real: [N, D] features of real samples.
    fake: [M, D] features of generated samples.
    k: neighbours, 1 <= k < N.

  Returns:
    (density, coverage); density is >= 0 and about 1 for a perfect generator
    (more when samples crowd the modes), coverage lies in [0, 1].

  Raises:
    ValueError: for empty, non-finite or ill-matched features, or k out of
      range.
  """
  real, fake = distances.as_points(real=real, fake=fake)
  distances.check_neighbours(k, len(real), "real")
  radii = distances.neighbour_radii(real, k)
  in_ball = distances.ball_counts(real, radii, fake)
  density = int(in_ball.sum()) / (k * len(fake))
  return density, int(np.count_nonzero(in_ball)) / len(real)


def precision_recall(
  real: ArrayLike, fake: ArrayLike, k: int
) -> tuple[float, float]:
  """Improved precision and recall (arXiv:1904.06991, eq. 1 and 2).

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
  of_real, of_fake = distances.covered(
    *(real, distances.neighbour_radii(real, k)),
    *(fake, distances.neighbour_radii(fake, k)),
  )
  return float(of_fake.mean()), float(of_real.mean())


def _grid_codes(values: np.ndarray, grid: np.ndarray) -> list[bytes]:
  """Each row as the indices of the nearest grid values, ends included."""
  middles = (grid[1:] + grid[:-1]) / 2.0
  # In as few bytes as will do: there are as many as values.
  dtype = np.min_scalar_type(len(middles))
  return [
    np.searchsorted(middles, row).astype(dtype).tobytes() for row in values
  ]


def duplicates(
  fake: ArrayLike, train: ArrayLike, heldout: ArrayLike, *, grid: ArrayLike
) -> dict[str, float]:
  """Counts copies of training samples, with held-out reals as the yardstick.

  An exact duplicate equals some training sample after both are rounded to the
  data's grid (and clipped to its ends). A near duplicate is closer to a
  training sample than the threshold, the 1 % quantile of the distances from
  held-out samples to their nearest training sample, before any rounding. About
  1 % of held-out samples are thus near duplicates by construction.

  Args:
    fake: [M, D] generated samples, in the units of the data.
    train: [N, D] training samples.
    heldout: [H, D] real samples that were not trained on.
    grid: [G] ascending values that a coordinate of the data can take, e.g.
      numpy.linspace(-1, 1, 256) for images that were 8-bit.

  Returns:
    exact_duplicates, near_duplicates: how many of the fakes are;
    near_duplicate_rate: share of near duplicates;
    near_threshold: their largest distance, exclusive, in units of the data.

  Raises:
    ValueError: for empty, non-finite or ill-matched inputs, or a grid that does
      not ascend.
  """
  fake, train, heldout = distances.as_points(
    fake=fake, train=train, heldout=heldout
  )
  grid = np.asarray(grid, np.float64)
  if grid.ndim != 1 or len(grid) < 2 or not (np.diff(grid) > 0).all():
    raise ValueError(
      f"a grid must hold at least 2 ascending values, got {grid}"
    )
  train_codes = set(_grid_codes(train, grid))
  exact = sum(code in train_codes for code in _grid_codes(fake, grid))
  of_fakes, of_heldout = (
    np.sqrt(distances.nearest(points, [train], 1)[0])
    for points in (fake, heldout)
  )
  threshold = float(np.quantile(of_heldout, NEAR_QUANTILE))
  near = int((of_fakes < threshold).sum())
  return {
    "exact_duplicates": float(exact),
    "near_duplicates": float(near),
    "near_duplicate_rate": near / len(fake),
    "near_threshold": threshold,
  }

"""Density, coverage and duplicates from nearest neighbours.

All distances are Euclidean, in float64, from differences of coordinates: equal
points are at distance exactly 0 and ties stay ties. Memory is bounded by blocks
of rows, time grows with the product of the counts: for small data sets.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike
from scipy.spatial import distance

from drift_jax.metrics import frechet

# Distances held at a time: 32 MiB of float64.
_BLOCK_ENTRIES = 2**22
_NEAR_QUANTILE = 0.01


def _distance_blocks(
  rows: Float64[np.ndarray, "N D"], columns: Float64[np.ndarray, "M D"]
) -> Iterator[tuple[slice, Float64[np.ndarray, "B M"]]]:
  """Yields (which rows, their distances to all columns), in order."""
  step = max(1, _BLOCK_ENTRIES // len(columns))
  for start in range(0, len(rows), step):
    block = slice(start, min(start + step, len(rows)))
    yield block, distance.cdist(rows[block], columns)


def _check_same_width(
  a: np.ndarray, name_a: str, b: np.ndarray, name_b: str
) -> None:
  if a.shape[1] != b.shape[1]:
    raise ValueError(
      f"{name_a} and {name_b} differ in dimension: {a.shape} and {b.shape}"
    )


def _neighbour_radii(
  points: Float64[np.ndarray, "N D"], k: int
) -> Float64[np.ndarray, " N"]:
  """Distance of each point to its k-th nearest other point."""
  radii = np.empty(len(points))
  for block, distances in _distance_blocks(points, points):
    # A point is not its own neighbour, but its duplicates are.
    distances[np.arange(len(distances)), np.arange(len(points))[block]] = np.inf
    radii[block] = np.partition(distances, k - 1, axis=1)[:, k - 1]
  return radii


def check_neighbours(k: int, count: int) -> None:
  """Raises ValueError unless each of count points has k others."""
  if not 1 <= k < count:
    raise ValueError(
      f"k = {k} neighbours among {count} real samples: valid are 1 to"
      f" {count - 1}"
    )


def check_grid(grid: ArrayLike) -> np.ndarray:
  """Returns the grid as float64; ValueError unless [G >= 2] and ascending."""
  grid = np.asarray(grid, np.float64)
  if grid.ndim != 1 or len(grid) < 2 or not (np.diff(grid) > 0).all():
    raise ValueError(
      f"a grid must hold at least 2 ascending values, got {grid}"
    )
  return grid


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
  real = frechet.as_feature_matrix(real, "real")
  fake = frechet.as_feature_matrix(fake, "fake")
  _check_same_width(real, "real", fake, "fake")
  check_neighbours(k, len(real))
  radii = _neighbour_radii(real, k)
  inside_count = covered_count = 0
  for block, distances in _distance_blocks(real, fake):
    inside = distances < radii[block, None]
    inside_count += int(inside.sum())
    covered_count += int(inside.any(axis=1).sum())
  return inside_count / (k * len(fake)), covered_count / len(real)


def nearest_distances(
  query: ArrayLike, reference: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
  """Nearest reference of each query.

  Args:
    query: [N, D].
    reference: [M, D].

  Returns:
    (distance [N] float64, index [N] int64 into reference; the lowest index
    among equally near ones).

  Raises:
    ValueError: for empty, non-finite or ill-matched inputs.
  """
  query = frechet.as_feature_matrix(query, "query")
  reference = frechet.as_feature_matrix(reference, "reference")
  _check_same_width(query, "query", reference, "reference")
  nearest = np.empty(len(query))
  index = np.empty(len(query), np.int64)
  for block, distances in _distance_blocks(query, reference):
    index[block] = distances.argmin(axis=1)
    nearest[block] = distances.min(axis=1)
  return nearest, index


def _grid_codes(values: np.ndarray, grid: np.ndarray) -> list[bytes]:
  """Each row as the indices of the nearest grid values, ends included."""
  indices = np.searchsorted((grid[1:] + grid[:-1]) / 2.0, values)
  return [row.tobytes() for row in indices]


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
    exact, near, count: exact and near duplicates among the `count` fakes;
    heldout_exact, heldout_near, heldout_count: the same for the held-out reals;
    threshold: that of near duplicates, in units of the data.

  Raises:
    ValueError: for empty, non-finite or ill-matched inputs, or a grid that does
      not ascend.
  """
  fake = frechet.as_feature_matrix(fake, "fake")
  train = frechet.as_feature_matrix(train, "train")
  heldout = frechet.as_feature_matrix(heldout, "heldout")
  _check_same_width(fake, "fake", train, "train")
  _check_same_width(heldout, "heldout", train, "train")
  grid = check_grid(grid)
  train_codes = set(_grid_codes(train, grid))

  def exact(samples: np.ndarray) -> int:
    return sum(code in train_codes for code in _grid_codes(samples, grid))

  fake_distance, _ = nearest_distances(fake, train)
  heldout_distance, _ = nearest_distances(heldout, train)
  threshold = float(np.quantile(heldout_distance, _NEAR_QUANTILE))
  return {
    "exact": float(exact(fake)),
    "near": float((fake_distance < threshold).sum()),
    "count": float(len(fake)),
    "heldout_exact": float(exact(heldout)),
    "heldout_near": float((heldout_distance < threshold).sum()),
    "heldout_count": float(len(heldout)),
    "threshold": threshold,
  }

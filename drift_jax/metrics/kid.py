"""Kernel Inception distance (Binkowski et al. 2018, arXiv:1801.01401).

The squared maximum mean discrepancy with the kernel k(x, y) = (x.y / D + 1)^3,
estimated without bias:

    1 / (N (N - 1)) sum_{i != j} k(x_i, x_j)
      + 1 / (M (M - 1)) sum_{i != j} k(y_i, y_j)
      - 2 / (N M) sum_{i, j} k(x_i, y_j)

Its expectation does not depend on the counts, unlike the Frechet distance's, so
it can be trusted for small sets; it may be slightly negative. As with the FID,
the name is for Inception-v3 features (2048 of pool3). All sums are float64.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from drift_jax.metrics import distances


def _kernels(x: np.ndarray, y: np.ndarray | None = None) -> float:
  """Sum of k over all pairs of a point of x and one of y, or of x twice."""
  # Imported at use: it takes a second. By default of degree 3, divided by D,
  # plus 1; of equal points it computes half.
  from sklearn.metrics.pairwise import polynomial_kernel

  rows = x.astype(np.float64)
  columns = None if y is None else y.astype(np.float64)
  return float(polynomial_kernel(rows, columns).sum())


def _sum_across(x: np.ndarray, y: np.ndarray) -> float:
  """Sum of k over all pairs of a point of x and one of y, in blocks."""
  side = distances.block_side(x.shape[1])
  return math.fsum(
    _kernels(x[rows], y[columns])
    for rows in distances.slices(len(x), side)
    for columns in distances.slices(len(y), side)
  )


def _sum_within(x: np.ndarray) -> float:
  """Sum of k over all pairs of different points of x."""
  norms = np.einsum("nd,nd->n", x, x, dtype=np.float64)
  total = -float(((norms / x.shape[1] + 1.0) ** 3).sum())
  for rows in distances.slices(len(x), distances.block_side(x.shape[1])):
    total += _kernels(x[rows])
    total += 2.0 * _sum_across(x[rows], x[rows.stop :])
  return total


def _estimate(real: np.ndarray, fake: np.ndarray) -> float:
  n, m = len(real), len(fake)
  return (
    _sum_within(real) / (n * (n - 1))
    + _sum_within(fake) / (m * (m - 1))
    - 2.0 * _sum_across(real, fake) / (n * m)
  )


def kernel_distance(real: ArrayLike, fake: ArrayLike) -> float:
  """Unbiased estimate from all pairs (equation of the module).

  Args:
    real: [N, D] features of real samples, N >= 2.
    fake: [M, D] features of generated samples, M >= 2.

  Returns:
    The estimate, usually >= 0.

  Raises:
    ValueError: for empty, non-finite or ill-matched features, or fewer than two
      samples of a kind.
  """
  real, fake = distances.as_points(real=real, fake=fake)
  if min(len(real), len(fake)) < 2:
    raise ValueError(
      "an unbiased kernel distance needs at least 2 samples of each kind, got"
      f" {len(real)} real and {len(fake)} fake ones"
    )
  return _estimate(real, fake)


def kernel_distance_subsets(
  real: ArrayLike, fake: ArrayLike, *, subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
  """Mean and spread of the unbiased estimate over random subsets.

  Papers report it with 100 subsets of 1000. Each subset is drawn from each
  set without replacement, independently of the others.

  Args:
    real: [N, D] features of real samples.
    fake: [M, D] features of generated samples.
    subsets: number of subsets, >= 1.
    subset_size: samples of each kind in a subset, 2 to min(N, M).
    seed: of numpy.random.default_rng; fixes the subsets.

  Returns:
    (mean, standard deviation with ddof 0) over the subsets.

  Raises:
    ValueError: for empty, non-finite or ill-matched features, or numbers out of
      range.
  """
  real, fake = distances.as_points(real=real, fake=fake)
  largest = min(len(real), len(fake))
  if subsets < 1 or not 2 <= subset_size <= largest:
    raise ValueError(
      f"subsets={subsets} of subset_size={subset_size} from {len(real)} real"
      f" and {len(fake)} fake samples: valid are subsets >= 1 and a size of 2"
      f" to {largest}"
    )
  random = np.random.default_rng(seed)
  estimates = [
    _estimate(
      real[random.choice(len(real), subset_size, replace=False)],
      fake[random.choice(len(fake), subset_size, replace=False)],
    )
    for _ in range(subsets)
  ]
  return float(np.mean(estimates)), float(np.std(estimates))

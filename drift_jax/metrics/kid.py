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

import numpy as np
from numpy.typing import ArrayLike

from drift_jax.metrics import distances


def _kernel(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """k of all pairs, in float64."""
  kernel = rows.astype(np.float64) @ columns.T.astype(np.float64)
  kernel /= rows.shape[1]
  kernel += 1.0
  kernel **= 3
  return kernel


def _sum_across(x: np.ndarray, y: np.ndarray, side: int) -> float:
  """Sum of k over all pairs of a point of x and one of y."""
  total = 0.0
  for first in range(0, len(x), side):
    for second in range(0, len(y), side):
      kernel = _kernel(x[first : first + side], y[second : second + side])
      total += float(kernel.sum())
  return total


def _sum_within(x: np.ndarray, side: int) -> float:
  """Sum of k over all pairs of different points of x."""
  total = 0.0
  for first in range(0, len(x), side):
    rows = x[first : first + side]
    kernel = _kernel(rows, rows)
    np.fill_diagonal(kernel, 0.0)
    total += float(kernel.sum())
    # k is symmetric: half of the blocks will do, counted twice.
    total += 2.0 * _sum_across(rows, x[first + side :], side)
  return total


def _estimate(real: np.ndarray, fake: np.ndarray, block_entries: int) -> float:
  n, m = len(real), len(fake)
  side = distances.block_side(real.shape[1], block_entries)
  return (
    _sum_within(real, side) / (n * (n - 1))
    + _sum_within(fake, side) / (m * (m - 1))
    - 2.0 * _sum_across(real, fake, side) / (n * m)
  )


def _as_samples(
  real: ArrayLike, fake: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
  real = distances.as_points(real, "real")
  fake = distances.as_points(fake, "fake")
  distances.check_same_width(real, "real", fake, "fake")
  return real, fake


def kernel_distance(
  real: ArrayLike,
  fake: ArrayLike,
  *,
  block_entries: int = distances.BLOCK_ENTRIES,
) -> float:
  """The unbiased estimate from all pairs (equation of the module).

  Args:
    real: [N, D] features of real samples, N >= 2.
    fake: [M, D] features of generated samples, M >= 2.
    block_entries: numbers in a block of kernel values; about 4 blocks live at a
      time.

  Returns:
    The estimate, usually >= 0.

  Raises:
    ValueError: for empty, non-finite or ill-matched features, or fewer than two
      samples of a kind.
  """
  real, fake = _as_samples(real, fake)
  distances.check_block(block_entries)
  if min(len(real), len(fake)) < 2:
    raise ValueError(
      "an unbiased kernel distance needs at least 2 samples of each kind, got"
      f" {len(real)} real and {len(fake)} fake ones"
    )
  return _estimate(real, fake, block_entries)


def kernel_distance_subsets(
  real: ArrayLike,
  fake: ArrayLike,
  *,
  subsets: int,
  subset_size: int,
  seed: int,
) -> tuple[float, float]:
  """Mean and spread of the unbiased estimate over random subsets.

  What papers report, with 100 subsets of 1000. Each subset is drawn from each
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
  real, fake = _as_samples(real, fake)
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
      distances.BLOCK_ENTRIES,
    )
    for _ in range(subsets)
  ]
  return float(np.mean(estimates)), float(np.std(estimates))

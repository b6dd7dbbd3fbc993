import itertools
import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import pairwise

from drift_jax.metrics.kid import kernel_distance, kernel_distance_subsets


def features(seed: int, count: int, dimensions: int = 12, shift: float = 0.0):
  random = np.random.default_rng(seed)
  values = np.maximum(random.normal(size=(count, dimensions)) + shift, 0.0)
  return values.astype(np.float32)


def oracle(real, fake):
  """The estimate from whole kernel matrices of scikit-learn."""
  real, fake = real.astype(np.float64), fake.astype(np.float64)

  def kernel(x, y):
    return pairwise.polynomial_kernel(x, y, degree=3, gamma=None, coef0=1)

  n, m = len(real), len(fake)
  within_real = (kernel(real, real).sum() - np.trace(kernel(real, real))) / n
  within_fake = (kernel(fake, fake).sum() - np.trace(kernel(fake, fake))) / m
  across = kernel(real, fake).mean()
  return within_real / (n - 1) + within_fake / (m - 1) - 2.0 * across


@pytest.mark.parametrize("block", [1, 30, 1000, 2**22], indirect=True)
def test_oracle_for_any_block(block):
  real, fake = features(0, 61), features(1, 40, shift=0.3)
  expected = oracle(real, fake)
  assert expected > 0.05
  assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-12)
  assert kernel_distance(fake, real) == pytest.approx(expected, rel=1e-12)
  itself = kernel_distance(real, real)
  assert itself == pytest.approx(oracle(real, real.copy()), rel=1e-10)
  assert itself < 0.0


def test_unbiased_over_all_draws():
  # All pairs of subsets of a small population: the mean of estimates is the
  # distance of the populations with their own pairs counted as distinct.
  real, fake = features(2, 6, 3), features(3, 5, 3, shift=0.5)
  estimates = [
    kernel_distance(real[list(rows)], fake[list(columns)])
    for rows in itertools.combinations(range(6), 3)
    for columns in itertools.combinations(range(5), 2)
  ]
  assert np.mean(estimates) == pytest.approx(oracle(real, fake), rel=1e-12)
  assert min(estimates) < 0.0


def test_subsets_are_those_of_the_seed():
  real, fake = features(6, 50), features(7, 40)
  random = np.random.default_rng(3)
  expected = [
    oracle(
      real[random.choice(50, 20, replace=False)],
      fake[random.choice(40, 20, replace=False)],
    )
    for _ in range(5)
  ]
  result = kernel_distance_subsets(
    real, fake, subsets=5, subset_size=20, seed=3
  )
  assert result == pytest.approx((np.mean(expected), np.std(expected)), 1e-10)


@pytest.mark.parametrize("block", [2**14], indirect=True)
def test_memory_is_bounded_by_blocks(block):
  real, fake = features(10, 2000), features(11, 2000)
  tracemalloc.start()
  kernel_distance(real, fake)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # A whole kernel matrix is 244 blocks.
  assert peak < 5 * 2**14 * 8


def test_bad_counts():
  good = features(12, 9)
  with pytest.raises(ValueError, match="at least 2.*9 real and 1 fake"):
    kernel_distance(good, good[:1])
  for number, size in ((0, 3), (1, 1), (1, 9)):
    with pytest.raises(ValueError, match=f"size={size} from.*2 to 8"):
      kernel_distance_subsets(
        good, good[:8], subsets=number, subset_size=size, seed=0
      )

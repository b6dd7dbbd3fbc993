import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from drift_jax.metrics.coverage import (
  density_coverage,
  duplicates,
  nearest_distances,
)
from tests.metrics.conftest import GRID


def points(seed: int, count: int, dimensions: int = 5) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(count, dimensions))


def oracle(real, fake, k):
  """Density and coverage from scikit-learn's tree search."""
  search = NearestNeighbors(algorithm="kd_tree").fit(real)
  # With no query, a point is not its own neighbour.
  radii = search.kneighbors(n_neighbors=k)[0][:, -1]
  inside = np.linalg.norm(real[:, None] - fake[None], axis=-1) < radii[:, None]
  return inside.sum() / (k * len(fake)), inside.any(axis=1).mean()


@pytest.mark.parametrize("k", [1, 3, 5, 39])
@pytest.mark.parametrize("shift", [0.0, 1.0, 1e4])
def test_density_coverage_oracle(k, shift):
  real, fake = points(0, 40) + shift, 0.8 * points(1, 55) + shift
  assert density_coverage(real, fake, k) == oracle(real, fake, k)


@pytest.mark.parametrize("block", [1, 7, 100, 2**22])
def test_blocks_do_not_change_the_result(block):
  real, fake = points(2, 31), points(3, 23)
  expected = oracle(real, fake, 3)
  nearest = np.linalg.norm(fake[:, None] - real[None], axis=-1)
  assert density_coverage(real, fake, 3, block_entries=block) == expected
  distance, index = nearest_distances(fake, real, block_entries=block)
  np.testing.assert_allclose(distance, nearest.min(axis=1), rtol=1e-15)
  assert np.array_equal(index, nearest.argmin(axis=1))


@pytest.mark.parametrize("k", [1, 4])
def test_reals_themselves_score_one(k):
  real = points(6, 60)
  order = np.random.default_rng(6).permutation(60)
  assert density_coverage(real, real[order], k) == (1.0, 1.0)


def test_ties_lie_outside_the_open_balls(digits):
  real = digits.test_images.reshape(540, 64).astype(np.float64)
  # Distances of digits are roots of integers: exact, and full of ties.
  density, covered = density_coverage(real, real, 4)
  assert (density, covered) == oracle(real, real, 4)
  assert 0.99 < density < 1.0 and covered == 1.0


def test_repeated_reals_are_each_others_neighbours():
  real = np.repeat(points(7, 5), 3, axis=0)
  assert density_coverage(real, real, 2) == (0.0, 0.0)
  density, covered = density_coverage(real, real, 3)
  assert (density, covered) == oracle(real, real, 3)
  assert covered == 1.0


def test_far_and_collapsed_samples():
  real = points(8, 50)
  assert density_coverage(real, real + 1e3, 5) == (0.0, 0.0)
  collapsed = np.repeat(real.mean(axis=0, keepdims=True), 50, axis=0)
  density, covered = density_coverage(real, collapsed, 5)
  assert density > 1.5 and covered < 0.6


def test_nearest_distances_oracle(digits):
  train = digits.train_images.reshape(-1, 64)
  test = digits.test_images.reshape(-1, 64)
  distance, index = nearest_distances(test, train)
  expected = NearestNeighbors(n_neighbors=1, algorithm="kd_tree").fit(train)
  expected_distance = expected.kneighbors(test)[0][:, 0]
  np.testing.assert_allclose(distance, expected_distance, rtol=1e-14)
  direct = np.linalg.norm(test.astype(np.float64) - train[index], axis=1)
  np.testing.assert_allclose(distance, direct, rtol=1e-14)


@pytest.mark.parametrize("step", [0.0, 1e-4])
def test_near_points_far_from_the_origin_keep_their_distances(step):
  # Sums of squares are 5e12 here: their rounding is 1e-3, the step's square 0
  # or 5e-8.
  reference = points(9, 20) + 1e6
  query = reference[::-1] + step
  distance, index = nearest_distances(query, reference)
  expected = np.linalg.norm(query - reference[::-1], axis=1)
  np.testing.assert_allclose(distance, expected, rtol=1e-14, atol=0.0)
  assert np.array_equal(index, np.arange(20)[::-1])


def test_duplicates_counts_planted_copies(digits):
  train = digits.train_images.reshape(-1, 64)
  heldout = digits.test_images.reshape(-1, 64)
  random = np.random.default_rng(10)
  # 3 copies, 2 within half a grid step and beyond the range, 4 with one pixel
  # three steps off, 5 far away.
  jitter = np.sign(train[3:5]) * 0.02 + random.uniform(-0.04, 0.04, (2, 64))
  nudged = train[5:9].copy()
  nudged[:, 30] -= 3 / 8 * np.sign(nudged[:, 30])
  noise = random.uniform(-1, 1, (5, 64))
  fake = np.concatenate([train[:3], train[3:5] + jitter, nudged, noise])
  counts = duplicates(fake, train, heldout, grid=GRID)
  distance, _ = nearest_distances(heldout, train)
  assert counts == {
    "exact": 5,
    "near": 9,
    "count": 14,
    "heldout_exact": 0,
    "heldout_near": 6,
    "heldout_count": 540,
    "threshold": float(np.quantile(distance, 0.01)),
  }
  swapped = duplicates(heldout, train, train[:7], grid=GRID)
  assert (swapped["exact"], swapped["heldout_exact"]) == (0, 7)


def test_threshold_is_strict():
  train = np.zeros((1, 1))
  counts = duplicates([[0.5], [0.51]], train, [[0.5]], grid=[0.0, 1.0])
  assert counts["threshold"] == 0.5
  assert (counts["near"], counts["heldout_near"]) == (0, 0)
  assert counts["exact"] == 1


@pytest.mark.parametrize("k", [0, -1, 40, 41])
def test_bad_k(k):
  with pytest.raises(ValueError, match=f"k = {k} .*40 real.*1 to 39"):
    density_coverage(points(0, 40), points(1, 50), k)


def test_bad_points():
  good, other, empty = points(0, 9), points(0, 9, 4), np.zeros((0, 5))
  broken = good.copy()
  broken[4, 2] = np.nan
  for call in (
    lambda x: density_coverage(x, good, 3),
    lambda x: density_coverage(good, x, 3),
    lambda x: nearest_distances(x, good),
    lambda x: nearest_distances(good, x),
    lambda x: duplicates(x, good, good, grid=GRID),
    lambda x: duplicates(good, x, good, grid=GRID),
    lambda x: duplicates(good, good, x, grid=GRID),
  ):
    with pytest.raises(ValueError, match=r"differ in dimension.*\(9, "):
      call(other)
    with pytest.raises(ValueError, match="non-empty"):
      call(empty)
    with pytest.raises(ValueError, match="the first is row 4"):
      call(broken)
  for grid in ([], [0.0], [0.0, 0.0], [1.0, 0.0], [[0.0, 1.0]]):
    with pytest.raises(ValueError, match="ascending"):
      duplicates(good, good, good, grid=grid)

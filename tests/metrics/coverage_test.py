import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from drift_jax.metrics.coverage import density_coverage, duplicates
from drift_jax.metrics.neighbours import nearest_neighbours
from tests.metrics.conftest import GRID, points, radii_of


def nearest_distances(query, reference):
  nearest = nearest_neighbours(query, [reference], 1)
  return nearest.distance[:, 0], nearest.index[:, 0]


def oracle(real, fake, k):
  radii = radii_of(real, k)[:, None]
  inside = np.linalg.norm(real[:, None] - fake[None], axis=-1) < radii
  return inside.sum() / (k * len(fake)), inside.any(axis=1).mean()


@pytest.mark.parametrize("k", [1, 3, 39])
@pytest.mark.parametrize("shift", [0.0, 1.0, 1e4])
def test_density_coverage_oracle(k, shift):
  real, fake = points(0, 40) + shift, 0.8 * points(1, 55) + shift
  assert density_coverage(real, fake, k) == oracle(real, fake, k)


@pytest.mark.parametrize("block", [1, 7, 100], indirect=True)
def test_blocks_do_not_change_the_result(block):
  real, fake = points(2, 31), points(3, 23)
  assert density_coverage(real, fake, 3) == oracle(real, fake, 3)
  nearest = np.linalg.norm(fake[:, None] - real[None], axis=-1)
  distance, index = nearest_distances(fake, real)
  np.testing.assert_allclose(distance, nearest.min(axis=1), rtol=1e-15)
  assert np.array_equal(index, nearest.argmin(axis=1))


def test_ties_lie_outside_the_open_balls(digits):
  real = points(6, 60)
  order = np.random.default_rng(6).permutation(60)
  assert density_coverage(real, real[order], 4) == (1.0, 1.0)
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
  search = NearestNeighbors(n_neighbors=1, algorithm="kd_tree").fit(train)
  expected = search.kneighbors(test)[0][:, 0]
  np.testing.assert_allclose(distance, expected, rtol=1e-14)
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
  threshold = float(np.quantile(distance, 0.01))
  assert counts == {
    "exact_duplicates": 5,
    "near_duplicates": 9,
    "near_duplicate_rate": 9 / 14,
    "near_threshold": threshold,
  }
  assert duplicates(heldout, train, heldout, grid=GRID) == {
    "exact_duplicates": 0,
    "near_duplicates": 6,
    "near_duplicate_rate": 6 / 540,
    "near_threshold": threshold,
  }


def test_threshold_is_strict():
  train = np.zeros((1, 1))
  counts = duplicates([[0.5], [0.51]], train, [[0.5]], grid=[0.0, 1.0])
  assert counts["near_threshold"] == 0.5
  assert (counts["near_duplicates"], counts["exact_duplicates"]) == (0, 1)


@pytest.mark.parametrize("grid", [[0.0], [0.0, 0.0], [1.0, 0.0], [[0.0, 1.0]]])
def test_bad_grid(grid):
  with pytest.raises(ValueError, match="ascending"):
    duplicates(points(0, 9), points(0, 9), points(0, 9), grid=grid)

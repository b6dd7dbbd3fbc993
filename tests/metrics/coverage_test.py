import numpy as np
import pytest

from drift_jax.metrics import distances
from drift_jax.metrics.coverage import (
  density_coverage,
  duplicates,
  precision_recall,
)
from drift_jax.metrics.neighbours import nearest_neighbours
from tests.conftest import assert_close
from tests.metrics.conftest import GRID, points, radii_of


def open_balls(real, fake, k):
  """Density and coverage by whole matrices of distances."""
  radii = radii_of(real, k)[:, None]
  inside = np.linalg.norm(real[:, None] - fake[None], axis=-1) < radii
  return inside.sum() / (k * len(fake)), inside.any(axis=1).mean()


def closed_balls(real, fake, k):
  """Precision and recall likewise."""

  def inside(centres, others):
    gaps = np.linalg.norm(centres[:, None] - others[None], axis=-1)
    return float((gaps <= radii_of(centres, k)[:, None]).any(axis=0).mean())

  return inside(real, fake), inside(fake, real)


@pytest.mark.parametrize("case", ["k3", "k5", "k3_collapsed_fake", "k3_dup"])
def test_golden_precision_recall(golden, case):
  arrays = golden("metrics")
  k = int(arrays[f"pr/{case}/k"])
  sets = {x: arrays[f"pr/{case}/features_{x}"] for x in ("real", "fake")}
  for side, features in sets.items():
    radii = distances.neighbour_radii(features, k)
    assert_close(radii, arrays[f"pr/{case}/x64/radii_sq_{side}"], 1e-15)
  precision, recall = precision_recall(**sets, k=k)
  assert precision == arrays[f"pr/{case}/precision"]
  assert recall == arrays[f"pr/{case}/recall"]


@pytest.mark.parametrize("k", [1, 3, 39])
@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("block", [1, 20, 200, 2**22], indirect=True)
def test_oracle_for_any_block(k, shift, block):
  real, fake = points(0, 40) + shift, 0.8 * points(1, 55) + 0.5 + shift
  expected = closed_balls(real, fake, k)
  assert precision_recall(real, fake, k) == expected
  assert precision_recall(fake, real, k) == expected[::-1]
  assert density_coverage(real, fake, k) == open_balls(real, fake, k)


def test_precision_recall_is_invariant_to_translation():
  real, fake = points(2, 60), points(3, 60) + 1.0
  # Multiples of 2^-20, so that the shift is exact.
  real, fake = np.round(real * 2**20), np.round(fake * 2**20)
  expected = precision_recall(real, fake, 3)
  assert 0.0 < min(expected) < 1.0
  assert precision_recall(real + 2.0**40, fake + 2.0**40, 3) == expected


def test_a_set_covers_itself_and_nothing_far():
  real = points(4, 50)
  for function in (precision_recall, density_coverage):
    assert function(real, real[::-1], 3) == (1.0, 1.0)
    assert function(real, real + 1e3, 3) == (0.0, 0.0)
  memorised = np.repeat(real[:5], 10, axis=0)
  assert precision_recall(real, memorised, 3) == (1.0, 5 / 50)
  collapsed = np.repeat(real.mean(axis=0, keepdims=True), 50, axis=0)
  density, covered = density_coverage(real, collapsed, 5)
  assert density > 1.5 and covered < 0.6


def test_closed_balls_hold_their_surface_and_exclude_the_point():
  real, fake = np.array([[0.0], [4.0]]), np.array([[8.0], [15.0]])
  # Radius 4 around reals: 8 is on a surface; 7 around fakes: 0 is outside.
  assert precision_recall(real, fake, 1) == (0.5, 0.5)


def test_open_balls_do_not_hold_their_surface(digits):
  real = digits.test_images.reshape(540, 64).astype(np.float64)
  # Distances of digits are roots of integers: exact, and full of ties.
  density, covered = density_coverage(real, real, 4)
  assert (density, covered) == open_balls(real, real, 4)
  assert 0.99 < density < 1.0 and covered == 1.0
  # Copies are each other's neighbours.
  real = np.repeat(points(7, 5), 3, axis=0)
  assert density_coverage(real, real, 2) == (0.0, 0.0)
  density, covered = density_coverage(real, real, 3)
  assert (density, covered) == open_balls(real, real, 3)
  assert covered == 1.0


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
  distance = nearest_neighbours(heldout, [train], 1).distance
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

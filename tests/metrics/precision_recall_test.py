import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from drift_jax.metrics import distances
from drift_jax.metrics.precision_recall import precision_recall
from tests.conftest import assert_close

CASES = ["k3", "k5", "k3_collapsed_fake", "k3_dup"]


def points(seed: int, count: int, dimensions: int = 5) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(count, dimensions))


def oracle(real, fake, k):
  """Precision and recall from scikit-learn's tree search."""

  def inside(centres, others):
    search = NearestNeighbors(algorithm="kd_tree").fit(centres)
    # With no query, a point is not its own neighbour.
    radii = search.kneighbors(n_neighbors=k)[0][:, -1:]
    gaps = np.linalg.norm(centres[:, None] - others[None], axis=-1)
    return float((gaps <= radii).any(axis=0).mean())

  return inside(real, fake), inside(fake, real)


@pytest.mark.parametrize("case", CASES)
def test_golden(golden, case):
  arrays = golden("metrics")
  sets = {
    side: arrays[f"pr/{case}/features_{side}"] for side in ("real", "fake")
  }
  k = int(arrays[f"pr/{case}/k"])
  for side, features in sets.items():
    radii = distances.neighbour_radii(features, k, distances.BLOCK_ENTRIES)
    assert_close(radii, arrays[f"pr/{case}/x64/radii_sq_{side}"], 1e-15)
  precision, recall = precision_recall(sets["real"], sets["fake"], k)
  assert precision == arrays[f"pr/{case}/precision"]
  assert recall == arrays[f"pr/{case}/recall"]


@pytest.mark.parametrize("k", [1, 3, 39])
@pytest.mark.parametrize("block", [20, 200, 2**22])
def test_oracle_for_any_block(k, block):
  real, fake = points(0, 40), 0.8 * points(1, 55) + 0.5
  expected = oracle(real, fake, k)
  assert precision_recall(real, fake, k, block_entries=block) == expected
  swapped = precision_recall(fake, real, k, block_entries=block)
  assert swapped == expected[::-1]


def test_invariant_to_translation():
  real, fake = points(2, 60), points(3, 60) + 1.0
  # Multiples of 2^-20, so that the shift is exact.
  real, fake = np.round(real * 2**20), np.round(fake * 2**20)
  expected = precision_recall(real, fake, 3)
  assert 0.0 < min(expected) < 1.0
  assert precision_recall(real + 2.0**40, fake + 2.0**40, 3) == expected


def test_a_set_covers_itself_and_nothing_far():
  real = points(4, 50)
  assert precision_recall(real, real[::-1], 3) == (1.0, 1.0)
  assert precision_recall(real, real + 1e3, 3) == (0.0, 0.0)


def test_balls_are_closed_and_neighbours_exclude_the_point():
  real, fake = np.array([[0.0], [4.0]]), np.array([[8.0], [15.0]])
  # Radius 4 around reals: 8 is on a surface; 7 around fakes: 0 is outside.
  assert precision_recall(real, fake, 1) == (0.5, 0.5)


def test_memorising_part_of_the_data_costs_recall():
  real = points(5, 200)
  precision, recall = precision_recall(real, np.repeat(real[:10], 20, 0), 3)
  assert precision == 1.0 and recall == 10 / 200


def test_bad_input():
  good, other, empty = points(0, 9), points(0, 9, 4), np.zeros((0, 5))
  broken = good.copy()
  broken[4, 2] = np.nan
  for call in (
    lambda x: precision_recall(x, good, 3),
    lambda x: precision_recall(good, x, 3),
  ):
    with pytest.raises(ValueError, match=r"differ in dimension.*\(9, "):
      call(other)
    with pytest.raises(ValueError, match="non-empty"):
      call(empty)
    with pytest.raises(ValueError, match="the first is row 4"):
      call(broken)
  with pytest.raises(ValueError, match="k = 9 .*among 9 real.*1 to 8"):
    precision_recall(good, points(1, 20), 9)
  with pytest.raises(ValueError, match="k = 9 .*among 8 fake.*1 to 7"):
    precision_recall(points(1, 20), good[:8], 9)
  with pytest.raises(ValueError, match="k = 0 "):
    precision_recall(good, good, 0)
  with pytest.raises(ValueError, match="block_entries"):
    precision_recall(good, good, 3, block_entries=0)

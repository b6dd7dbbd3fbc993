import numpy as np
import pytest

from drift_jax.metrics import distances
from drift_jax.metrics.coverage import precision_recall
from tests.conftest import assert_close
from tests.metrics.conftest import points, radii_of

CASES = ["k3", "k5", "k3_collapsed_fake", "k3_dup"]
SIDES = "real", "fake"


def oracle(real, fake, k):
  def inside(centres, others):
    gaps = np.linalg.norm(centres[:, None] - others[None], axis=-1)
    return float((gaps <= radii_of(centres, k)[:, None]).any(axis=0).mean())

  return inside(real, fake), inside(fake, real)


@pytest.mark.parametrize("case", CASES)
def test_golden(golden, case):
  arrays = golden("metrics")
  real, fake = (arrays[f"pr/{case}/features_{side}"] for side in SIDES)
  k = int(arrays[f"pr/{case}/k"])
  for side, features in zip(SIDES, (real, fake), strict=True):
    radii = distances.neighbour_radii(features, k)
    assert_close(radii, arrays[f"pr/{case}/x64/radii_sq_{side}"], 1e-15)
  precision, recall = precision_recall(real, fake, k)
  assert precision == arrays[f"pr/{case}/precision"]
  assert recall == arrays[f"pr/{case}/recall"]


@pytest.mark.parametrize("k", [1, 3, 39])
@pytest.mark.parametrize("block", [20, 200, 2**22], indirect=True)
def test_oracle_for_any_block(k, block):
  real, fake = points(0, 40), 0.8 * points(1, 55) + 0.5
  expected = oracle(real, fake, k)
  assert precision_recall(real, fake, k) == expected
  assert precision_recall(fake, real, k) == expected[::-1]


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
  memorised = np.repeat(real[:5], 10, axis=0)
  assert precision_recall(real, memorised, 3) == (1.0, 5 / 50)


def test_balls_are_closed_and_neighbours_exclude_the_point():
  real, fake = np.array([[0.0], [4.0]]), np.array([[8.0], [15.0]])
  # Radius 4 around reals: 8 is on a surface; 7 around fakes: 0 is outside.
  assert precision_recall(real, fake, 1) == (0.5, 0.5)

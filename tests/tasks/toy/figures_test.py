"""Distances of point sets, against brute force and SciPy, in float64."""

import numpy as np
import pytest
from scipy import stats

from drift_jax.system.errors import EvaluationError
from drift_jax.tasks.toy.figures import (
  baseline,
  energy_distance,
  mean_distance,
  mode_coverage,
  sliced_wasserstein,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 2))
Y = RNG.normal(0.3, 1.2, size=(290, 2))


def brute_force(x, y):
  return np.sqrt(((x[:, None] - y) ** 2).sum(-1)).mean()


def test_distances_are_exact():
  """300 rows are more than one chunk."""
  np.testing.assert_allclose(mean_distance(X, Y), brute_force(X, Y), rtol=1e-13)
  expected = 2 * brute_force(X, Y) - brute_force(X, X) - brute_force(Y, Y)
  np.testing.assert_allclose(energy_distance(X, Y), expected, rtol=1e-11)
  # On a line it is the square of SciPy's.
  np.testing.assert_allclose(
    energy_distance(X[:, :1], Y[:, :1]),
    stats.energy_distance(X[:, 0], Y[:, 0]) ** 2,
    rtol=1e-10,
  )


def test_energy_distance_properties():
  assert energy_distance(X, X[::-1]) == pytest.approx(0, abs=1e-14)
  value = energy_distance(X, Y)
  assert value > 0
  moved = energy_distance(3 * X + 1, 3 * Y + 1)
  assert moved == pytest.approx(3 * value, rel=1e-11)
  # Nothing is lost where distances are large and the difference is small.
  far = energy_distance(X + 1e6, Y + 1e6)
  assert far == pytest.approx(value, rel=1e-6)


def test_the_baseline_of_energy_distance_is_what_the_docstring_says():
  sets = [RNG.normal(size=(400, 2)) for _ in range(12)]
  expected = 2 / 400 * mean_distance(sets[0], sets[1])
  got = baseline(energy_distance, sets)
  assert got == pytest.approx(expected, rel=0.3)
  pairs = [energy_distance(*sets[i : i + 2]) for i in range(2)]
  assert baseline(energy_distance, sets[:3]) == pytest.approx(np.mean(pairs))


def test_sliced_wasserstein_is_exact():
  y = Y[:280]
  x = X[:280]
  directions = np.random.default_rng(5).normal(size=(7, 2))
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  expected = [stats.wasserstein_distance(x @ u, y @ u) for u in directions]
  got = sliced_wasserstein(x, y, projections=7, seed=5)
  np.testing.assert_allclose(got, np.mean(expected), rtol=1e-12)
  assert got == sliced_wasserstein(x, y, projections=7, seed=5)
  assert got != sliced_wasserstein(x, y, projections=7, seed=6)
  assert sliced_wasserstein(X, X[::-1]) == 0


def test_mode_coverage():
  centres = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 9.0]])
  points = np.array([[0.5, 0], [-0.9, 0], [3.5, 0], [1.9, 0], [4, 0.1]])
  found = mode_coverage(
    points, centres, np.array([0.5, 0.25, 0.25]), radius=1.0
  )
  np.testing.assert_allclose(found.masses, [0.4, 0.4, 0.0])
  assert found.outside == pytest.approx(0.2)  # (1.9, 0) is near none
  assert found.reached == 2
  assert found.worst_error == pytest.approx(1.0)  # the third has nothing
  found = mode_coverage(points[:2], centres[:1], np.array([0.8]), radius=1.0)
  assert found.worst_error == pytest.approx(0.25)


def test_points_that_are_no_numbers_have_no_figure():
  broken = X.copy()
  broken[7, 1] = np.nan
  for figure in (energy_distance, sliced_wasserstein):
    for pair in ((broken, X), (X, broken)):
      with pytest.raises(EvaluationError, match="1 of 300 .*number 7:"):
        figure(*pair)

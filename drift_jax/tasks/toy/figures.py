"""How far two sets of points are apart, in the plane or any small space.

Everything is computed in float64.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from drift_jax.system.errors import EvaluationError

Points = Float[np.ndarray, "N D"]

# Rows of a distance matrix that are held at once.
_CHUNK = 256
# Share of a mode's true mass from which on it counts as reached.
_REACHED = 0.1


class Coverage(NamedTuple):
  """Result of mode_coverage.

  Attributes:
    masses: [K], shares of the points in each mode.
    outside: share of the points in none.
    reached: modes that hold at least a tenth of their true mass.
    worst_error: max over modes of |mass / true mass - 1|.
  """

  masses: np.ndarray
  outside: float
  reached: int
  worst_error: float


def mean_distance(x: Points, y: Float[np.ndarray, "M D"]) -> float:
  """E ||X - Y||: the mean over all N M pairs, a few rows of them at a time.

  Raises:
    EvaluationError: points that are not finite; so do all figures here.
  """
  from scipy.spatial import distance

  x, y = _finite(x), _finite(y)
  rows = (x[i : i + _CHUNK] for i in range(0, len(x), _CHUNK))
  total = sum(float(distance.cdist(part, y).sum()) for part in rows)
  return total / (len(x) * len(y))


def energy_distance(x: Points, y: Float[np.ndarray, "M D"]) -> float:
  """2 E ||X - Y|| - E ||X - X'|| - E ||Y - Y'||, in the points' unit.

  The V-statistic: a point's distance to itself counts, so that it is never
  negative, and of two sets of one distribution it is (1/N + 1/M) E ||X - X'||
  on average: judge it beside such a pair. (Its square root is also called
  energy distance.)
  """
  across = 2 * mean_distance(x, y)
  return max(across - mean_distance(x, x) - mean_distance(y, y), 0.0)


def sliced_wasserstein(
  x: Points, y: Points, *, projections: int = 64, seed: int = 0
) -> float:
  """E over directions u of W1(u x, u y), in the points' unit.

    W1 = mean over i of |sort(u x)_i - sort(u y)_i|
  of as many points in both sets, over the same random directions each time.

  Args:
    x, y: [N, D].
    projections: number of directions, uniform on the sphere.
    seed: seed of the directions.
  """
  directions = np.random.default_rng(seed).normal(
    size=(projections, x.shape[1])
  )
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  along_x, along_y = (
    np.sort(_finite(points) @ directions.T, axis=0) for points in (x, y)
  )
  return float(np.mean(np.abs(along_x - along_y)))


def mode_coverage(
  points: Points,
  centres: Float[np.ndarray, "K D"],
  masses: Float[np.ndarray, " K"],
  radius: float,
) -> Coverage:
  """Shares of the points in each mode, against the true ones.

  A point belongs to the nearest centre, or to none beyond `radius`.

  Args:
    points: [N, D].
    centres: [K, D] of the modes.
    masses: [K], true shares.
    radius: in the points' unit.
  """
  from scipy.spatial import distance

  distances = distance.cdist(_finite(points), centres)
  inside = distances.min(axis=1) <= radius
  nearest = distances.argmin(axis=1)[inside]
  found = np.bincount(nearest, minlength=len(centres)) / len(points)
  return Coverage(
    masses=found,
    outside=float(np.mean(~inside)),
    reached=int(np.sum(found >= _REACHED * masses)),
    worst_error=float(np.max(np.abs(found / masses - 1))),
  )


def baseline(
  figure: Callable[[np.ndarray, np.ndarray], float],
  sets: Sequence[np.ndarray],
) -> float:
  """A figure of data against data: its mean over successive pairs of sets."""
  return float(np.mean([figure(x, y) for x, y in itertools.pairwise(sets)]))


def _finite(points: np.ndarray) -> np.ndarray:
  """Points in float64; an EvaluationError for those that are no numbers."""
  points = np.asarray(points, np.float64)
  finite = np.isfinite(points).all(axis=1)
  if not finite.all():
    first = int(np.argmin(finite))
    raise EvaluationError(
      f"{np.count_nonzero(~finite)} of {len(points)} points are not finite, "
      f"the first is number {first}: {points[first].tolist()}"
    )
  return points

"""Distributions of the plane, for the toy experiments (5.1), and their feed.

Draws are stateless: the points of a step follow from (seed, step) alone.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from drift_jax.data.loader import Batch, NumberedFeed, share
from drift_jax.data.order import generator
from drift_jax.tasks.toy.config import ToyConfig

# Half of a checkerboard's cell: 4 x 4 of them cover [-1, 1]^2.
_HALF_CELL = 0.25


class Modes(NamedTuple):
  """Modes of a distribution.

  Attributes:
    centres: [K, 2].
    masses: [K], sum to 1.
    radius: a point farther from its nearest centre belongs to no mode.
  """

  centres: np.ndarray
  masses: np.ndarray
  radius: float


@dataclasses.dataclass(frozen=True)
class _Distribution:
  """Points on a set of the plane, to which Gaussian noise is added.

  Attributes:
    draw: (random generator, n) -> [n, 2], about within [-1, 1]^2.
    centres: [K, 2] of modes of equal mass; None if there are none.
    extent: how far a mode reaches from its centre without the noise.
  """

  draw: Callable[[np.random.Generator, int], np.ndarray]
  centres: np.ndarray | None = None
  extent: float = 0.0


def _around(centres: np.ndarray, half: float = 0.0) -> _Distribution:
  """Points uniform in a square of half side `half` about a random centre."""

  def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    chosen = centres[rng.integers(len(centres), size=count)]
    return chosen + rng.uniform(-half, half, (count, 2))

  return _Distribution(draw, centres, half * 2**0.5)


def _circle(count: int, radius: float) -> np.ndarray:
  angle = 2 * np.pi * np.arange(count) / count
  return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _cells() -> np.ndarray:
  """Centres of the 8 cells (i, j) of a 4 x 4 board with i + j even."""
  i, j = np.nonzero(np.add.outer(np.arange(4), np.arange(4)) % 2 == 0)
  return np.stack([i, j], axis=1) * 2 * _HALF_CELL - 0.75


def _roll(angle: np.ndarray, radius: np.ndarray) -> np.ndarray:
  return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _swiss_roll(rng: np.random.Generator, count: int) -> np.ndarray:
  """(t cos t, t sin t) / 4.5 pi with t = pi / 2 + 4 pi u."""
  t = np.pi / 2 + 4 * np.pi * rng.uniform(size=count)
  return _roll(t, t / (4.5 * np.pi))


def _moons(rng: np.random.Generator, count: int) -> np.ndarray:
  """Two half circles that reach into each other."""
  angle = np.pi * rng.uniform(size=count)
  side = rng.integers(2, size=count) * 2 - 1
  x = np.cos(angle) - 0.5
  y = np.sin(angle) - 0.25
  return np.stack([side * x, side * y], axis=1) * (2 / 3)


def _spiral(rng: np.random.Generator, count: int) -> np.ndarray:
  """Two arms of one and a half turns, evenly dense along their length."""
  t = np.sqrt(rng.uniform(0.02, 1.0, count))
  side = rng.integers(2, size=count) * np.pi
  return _roll(3 * np.pi * t + side, 0.95 * t)


# Those of config.DISTRIBUTIONS.
DISTRIBUTIONS = {
  "bimodal": _around(np.array([[-0.5, 0.0], [0.5, 0.0]])),
  "checkerboard": _around(_cells(), _HALF_CELL),
  "swiss_roll": _Distribution(_swiss_roll),
  "eight_gaussians": _around(_circle(8, 0.8)),
  "moons": _Distribution(_moons),
  "spiral": _Distribution(_spiral),
}


def draw_points(
  name: str, count: int, noise: float, rng: np.random.Generator
) -> np.ndarray:
  """Points [count, 2] float32 of a distribution.

  Args:
    name: one of DISTRIBUTIONS. 'bimodal': modes at (-0.5, 0) and (0.5, 0);
      'checkerboard': the 8 even cells of a 4 x 4 board on [-1, 1]^2;
      'swiss_roll': t = pi / 2 + 4 pi u, scaled into [-1, 1]^2;
      'eight_gaussians': on a circle of radius 0.8; 'moons': two half circles;
      'spiral': two arms.
    count: number of points.
    noise: standard deviation of the Gaussian noise that is added.
    rng: source of the draws.
  """
  points = DISTRIBUTIONS[name].draw(rng, count)
  return (points + noise * rng.normal(size=(count, 2))).astype(np.float32)


def fixed_points(config: ToyConfig, count: int, number: int) -> np.ndarray:
  """Set `number` of points [count, 2] to judge by, apart from the feed's."""
  rng = generator(config.seed, "toy evaluation", number)
  return draw_points(config.data.distribution, count, config.data.noise, rng)


def modes_of(name: str, noise: float) -> Modes | None:
  """Modes of a distribution; None if it has none.

  Their radius takes in all but 3e-4 of a Gaussian of the noise.
  """
  distribution = DISTRIBUTIONS[name]
  centres = distribution.centres
  if centres is None:
    return None
  masses = np.full(len(centres), 1 / len(centres))
  return Modes(centres, masses, distribution.extent + 4 * noise)


class ToyFeed(NumberedFeed):
  """Batches of points, {'positives': [l, N_pos, 2] float32}.

  The points of step s and problem k follow from (seed, s, k) alone, whatever
  the number of processes. Process p of P holds the contiguous part
  [p N_c / P, (p + 1) N_c / P) of the N_c problems.
  """

  def __init__(
    self, config: ToyConfig, process_index: int = 0, process_count: int = 1
  ):
    """Draws nothing yet.

    Args:
      config: the run's config.
      process_index, process_count: the process whose part is drawn.

    Raises:
      ValueError: labels that the processes can't share.
    """
    self._config = config
    self._rows = share(
      "batch.labels", config.batch.labels, process_index, process_count
    )

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    config, step = self._config, self.position
    self.position += 1
    points = [
      draw_points(
        config.data.distribution,
        config.batch.positives,
        config.data.noise,
        generator(config.seed, "toy", step, label),
      )
      for label in self._rows
    ]
    return {"positives": np.stack(points)}

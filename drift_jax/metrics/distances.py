"""Exact Euclidean neighbours of feature vectors, in blocks.

What counts is always the squared distance summed from differences of
coordinates in float64: equal points are at distance exactly 0 and ties stay
ties. Most pairs need only a bound, though, and |x|^2 + |y|^2 - 2 x.y with its
rounding error gives one at the speed of a matrix product; only the pairs that
the bound leaves open are summed.

Features stay in float32 or float64 as they came. Beyond them a bounded number
of arrays of `block_entries` float64 numbers live at a time, whatever the
counts: about 7, and twice as many where nearly all pairs of a block have to be
summed, as between points that are equal but for rounding.
"""

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from numpy.typing import ArrayLike

from drift_jax.metrics import frechet

# Numbers in a block: 32 MiB of float64.
BLOCK_ENTRIES = 2**22
# Squares and sums of float64 numbers up to here do not overflow.
_LARGEST = 1e140
_FIRST_COLUMNS = 32

Points = Float[np.ndarray, "N D"]


def as_points(points: ArrayLike, name: str) -> np.ndarray:
  """Returns points [N, D]: float32 as they are, other dtypes as float64.

  Raises:
    ValueError: when they are not two-dimensional, are empty or hold a number
      that is not finite or beyond 1e140; the message names `name`.
  """
  matrix = np.asarray(points)
  if matrix.dtype == np.float32:
    frechet.check_feature_matrix(matrix, name)
    return matrix
  matrix = frechet.as_feature_matrix(matrix, name)
  largest = max(-matrix.min(), matrix.max())
  if largest > _LARGEST:
    raise ValueError(
      f"{name}: squares of numbers up to {largest:.3g} overflow; the largest"
      f" that distances can be computed of is {_LARGEST:g}"
    )
  return matrix


def check_same_width(
  a: np.ndarray, name_a: str, b: np.ndarray, name_b: str
) -> None:
  """Raises ValueError unless both are of the same dimension."""
  if a.shape[1] != b.shape[1]:
    raise ValueError(
      f"{name_a} and {name_b} differ in dimension: {a.shape} and {b.shape}"
    )


def check_neighbours(k: int, count: int, name: str) -> None:
  """Raises ValueError unless each of count points has k others."""
  if not 1 <= k < count:
    raise ValueError(
      f"k = {k} neighbours among {count} {name} samples: valid are 1 to"
      f" {count - 1}"
    )


def check_block(block_entries: int) -> None:
  """Raises ValueError for a block of no entries."""
  if block_entries < 1:
    raise ValueError(f"block_entries must be >= 1, got {block_entries}")


def block_side(dimension: int, block_entries: int) -> int:
  """Points on each side of a block.

  Neither a block of their distances nor the points themselves in float64 exceed
  block_entries, as far as at least one point allows.
  """
  check_block(block_entries)
  return max(1, min(math.isqrt(block_entries), block_entries // dimension))


def _bounds(
  rows: Float[np.ndarray, "R D"],
  columns: Float[np.ndarray, "C D"],
  centre: Float64[np.ndarray, " D"],
) -> tuple[Float64[np.ndarray, "R C"], Float64[np.ndarray, "R C"]]:
  """(lower, upper) bounds of what `_squared_distances` returns."""
  rows = rows - centre
  columns = columns - centre
  row_norms = np.einsum("nd,nd->n", rows, rows)
  column_norms = np.einsum("nd,nd->n", columns, columns)
  # A sum of D rounded products is off by D eps / 2 of the sum of magnitudes at
  # most, here |x|^2 + |y|^2 + 2 |x.y| <= 2 (|x|^2 + |y|^2). The sum of squared
  # differences and the shift by the centre are rounded too: twice that, and a
  # few terms more; what underflows is less than the smallest normal number.
  info = np.finfo(np.float64)
  relative = 2.0 * (rows.shape[1] + 8) * info.eps
  slack = row_norms[:, None] + column_norms
  slack *= relative
  slack += info.tiny
  upper = rows @ columns.T
  upper *= -2.0
  upper += row_norms[:, None]
  upper += column_norms
  lower = upper - slack
  upper += slack
  return lower, upper


def _pairs(
  chosen: Bool[np.ndarray, "R C"],
) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]]:
  """(rows, columns) of the entries that are true."""
  rows, columns = np.nonzero(chosen)
  return rows, columns


def _squared_distances(
  rows: Float[np.ndarray, "R D"],
  columns: Float[np.ndarray, "C D"],
  pairs: tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]],
  block_entries: int,
) -> Float64[np.ndarray, " P"]:
  """Sum of squared differences of each pair (row, column)."""
  squared = np.empty(len(pairs[0]))
  step = max(1, block_entries // rows.shape[1])
  for start in range(0, len(squared), step):
    part = slice(start, start + step)
    difference = rows[pairs[0][part]].astype(np.float64)
    difference -= columns[pairs[1][part]]
    squared[part] = np.square(difference, out=difference).sum(axis=1)
  return squared


def _slices(count: int, step: int) -> Iterator[slice]:
  for start in range(0, count, step):
    yield slice(start, min(start + step, count))


def _growing_slices(count: int, first: int, largest: int) -> Iterator[slice]:
  """Slices of doubling length: neighbours so far rule out most later pairs."""
  start = 0
  while start < count:
    length = min(largest, max(first, start))
    yield slice(start, min(start + length, count))
    start += length


class NearestSearch:
  """The k nearest of all columns given so far, for each row; exact.

  Columns are numbered from 0 in the order they are given; among equally near
  ones the lowest numbers win. Nothing depends on how they are cut into blocks.

  Attributes:
    squared: [N, k] float64 squared distances, ascending; inf where fewer than k
      columns were given.
    index: [N, k] int64 numbers of the columns; -1 where there is none.
    seen: columns given so far.
  """

  def __init__(
    self,
    rows: Points,
    k: int,
    *,
    exclude_self: bool,
    block_entries: int,
  ):
    """Keeps a reference to the rows.

    Args:
      rows: [N, D], as `as_points` returns them.
      k: neighbours to keep.
      exclude_self: the columns are the rows again, in order, and none is its
        own neighbour (its duplicates are).
      block_entries: bounds memory, see the module.
    """
    self._rows = rows
    self._k = k
    self._exclude_self = exclude_self
    self._block_entries = block_entries
    self._side = block_side(rows.shape[1], block_entries)
    self._centre = rows.mean(axis=0, dtype=np.float64)
    self.squared = np.full((len(rows), k), np.inf)
    self.index = np.full((len(rows), k), -1, np.int64)
    self.seen = 0

  def add(self, columns: Points) -> None:
    """Takes the next columns [M, D]."""
    first = self._side if self.seen else max(self._k, _FIRST_COLUMNS)
    for block in _growing_slices(len(columns), first, self._side):
      for rows in _slices(len(self._rows), self._side):
        self._add_block(rows, columns[block])
      self.seen += block.stop - block.start

  def _add_block(self, rows: slice, columns: Float[np.ndarray, "C D"]) -> None:
    points = self._rows[rows]
    pairs = _pairs(self._candidates(rows, columns))
    if not len(pairs[0]):
      return
    found = _squared_distances(points, columns, pairs, self._block_entries)
    old = self.squared[rows], self.index[rows]
    row = np.concatenate([np.arange(len(points)).repeat(self._k), pairs[0]])
    squared = np.concatenate([old[0].ravel(), found])
    index = np.concatenate([old[1].ravel(), pairs[1] + self.seen])
    order = np.lexsort((index, squared, row))
    # Every row has its k old entries, so at least k in all.
    starts = np.searchsorted(row[order], np.arange(len(points)))
    kept = order[starts[:, None] + np.arange(self._k)]
    self.squared[rows] = squared[kept]
    self.index[rows] = index[kept]

  def _candidates(
    self, rows: slice, columns: Float[np.ndarray, "C D"]
  ) -> Bool[np.ndarray, "R C"]:
    """Which pairs may be among the k nearest."""
    lower, upper = _bounds(self._rows[rows], columns, self._centre)
    own = None
    if self._exclude_self:
      numbers = np.arange(rows.start, rows.stop)[:, None]
      own = numbers == np.arange(self.seen, self.seen + len(columns))
      upper[own] = np.inf
    limit = self.squared[rows, -1].copy()
    unknown = np.isinf(limit)
    if unknown.any() and len(columns) >= self._k:
      limit[unknown] = np.partition(upper[unknown], self._k - 1, axis=1)[
        :, self._k - 1
      ]
    # Nothing is nearer than 0, and of equally near columns the first ones win.
    limit[self.squared[rows, -1] == 0.0] = -np.inf
    candidates = lower <= limit[:, None]
    if own is not None:
      candidates &= ~own
    return candidates


def neighbour_radii(
  points: Points, k: int, block_entries: int
) -> Float64[np.ndarray, " N"]:
  """Squared distance of each point to its k-th nearest other point."""
  search = NearestSearch(
    points, k, exclude_self=True, block_entries=block_entries
  )
  search.add(points)
  return search.squared[:, -1]


def ball_counts(
  centres: Float[np.ndarray, "N D"],
  radii: Float64[np.ndarray, " N"],
  points: Float[np.ndarray, "M D"],
  *,
  closed: bool,
  block_entries: int,
) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " M"]]:
  """Which points lie in which balls.

  Args:
    centres: [N, D] of the balls.
    radii: [N] squared radii of the balls.
    points: [M, D].
    closed: whether points on a ball's surface are inside.
    block_entries: bounds memory, see the module.

  Returns:
    (for each ball, how many points it holds; for each point, how many balls
    hold it).
  """
  side = block_side(centres.shape[1], block_entries)
  middle = centres.mean(axis=0, dtype=np.float64)
  in_ball = np.zeros(len(centres), np.int64)
  around_point = np.zeros(len(points), np.int64)
  for columns in _slices(len(points), side):
    for rows in _slices(len(centres), side):
      lower, upper = _bounds(centres[rows], points[columns], middle)
      limit = radii[rows, None]
      inside = upper < limit
      pairs = _pairs((lower <= limit) & ~inside)
      squared = _squared_distances(
        centres[rows], points[columns], pairs, block_entries
      )
      limits = radii[rows][pairs[0]]
      inside[pairs] = squared <= limits if closed else squared < limits
      in_ball[rows] += inside.sum(axis=1)
      around_point[columns] += inside.sum(axis=0)
  return in_ball, around_point

"""Exact Euclidean neighbours of feature vectors, in blocks.

Decisive is the squared distance summed from differences of coordinates in
float64: equal points are at distance exactly 0 and ties stay ties. Most pairs
need only a bound, though, and |x|^2 + |y|^2 - 2 x.y with its rounding error
gives one at the speed of a matrix product; only the pairs that the bound leaves
open are summed.

Features stay in float32 or float64 as they came. Beyond them a bounded number
of arrays of BLOCK_ENTRIES float64 numbers live at a time, whatever the counts:
about 7, and twice as many if nearly all pairs of a block have to be summed, as
between points that are equal but for rounding.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Float64, Int64
from numpy.typing import ArrayLike

from drift_jax.metrics import frechet

# Numbers in a block: 32 MiB of float64.
BLOCK_ENTRIES = 2**22
# Squares and sums of float64 numbers up to here do not overflow.
_LARGEST = 1e140
_FIRST_COLUMNS = 32

Points = Float[np.ndarray, "N D"]


def as_points(**sets: ArrayLike) -> list[np.ndarray]:
  """Points [N, D] of each set: float32 as they are, other dtypes as float64.

  Raises:
    ValueError: when they are not two-dimensional, are empty, hold a number that
      is not finite or beyond 1e140, or differ in dimension from the first set;
      the message names the set.
  """
  first = next(iter(sets))
  checked: list[np.ndarray] = []
  for name, points in sets.items():
    matrix = np.asarray(points)
    if matrix.dtype != np.float32:
      matrix = matrix.astype(np.float64, copy=False)
    frechet.check_feature_matrix(matrix, name)
    largest = float(max(-matrix.min(), matrix.max()))
    if largest > _LARGEST:
      raise ValueError(
        f"{name}: squares of numbers up to {largest:.3g} overflow; at most"
        f" {_LARGEST:g} is possible"
      )
    checked.append(matrix)
    if matrix.shape[1] != checked[0].shape[1]:
      raise ValueError(
        f"{first} and {name} differ in dimension: {checked[0].shape} and"
        f" {matrix.shape}"
      )
  return checked


def check_neighbours(k: int, count: int, name: str) -> None:
  """Raises ValueError unless each of count points has k others."""
  if not 1 <= k < count:
    raise ValueError(
      f"k = {k} neighbours among {count} {name} samples: valid are 1 to"
      f" {count - 1}"
    )


def block_side(dimension: int) -> int:
  """Points on each side of a block.

  Neither a block of their distances nor the points themselves in float64 exceed
  BLOCK_ENTRIES, as far as at least one point allows.
  """
  return max(1, min(math.isqrt(BLOCK_ENTRIES), BLOCK_ENTRIES // dimension))


def slices(count: int, side: int, first: int | None = None) -> Iterator[slice]:
  """Consecutive slices of `side`; from `first` on they double up to it."""
  start = 0
  while start < count:
    length = side if first is None else min(side, max(first, start))
    yield slice(start, min(start + length, count))
    start += length


def _bounds(
  rows: np.ndarray, columns: np.ndarray, centre: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(lower, upper) bounds [R, C] of what `_squared_distances` returns."""
  rows = rows - centre
  columns = columns - centre
  row_norms = np.einsum("nd,nd->n", rows, rows)
  column_norms = np.einsum("nd,nd->n", columns, columns)
  # A sum of D rounded products is off by D eps / 2 of the sum of magnitudes at
  # most, here |x|^2 + |y|^2 + 2 |x.y| <= 2 (|x|^2 + |y|^2). The sum of squared
  # differences and the shift by the centre are rounded too: twice that, and a
  # few terms more; what underflows is less than the smallest normal number.
  info = np.finfo(np.float64)
  slack = row_norms[:, None] + column_norms
  slack *= 2.0 * (rows.shape[1] + 8) * info.eps
  slack += info.tiny
  upper = rows @ columns.T
  upper *= -2.0
  upper += row_norms[:, None]
  upper += column_norms
  lower = upper - slack
  upper += slack
  return lower, upper


def _squared_distances(
  rows: np.ndarray, columns: np.ndarray, pairs: tuple[np.ndarray, ...]
) -> Float64[np.ndarray, " P"]:
  """Sum of squared differences of each pair (row, column)."""
  squared = np.empty(len(pairs[0]))
  for part in slices(len(squared), max(1, BLOCK_ENTRIES // rows.shape[1])):
    difference = rows[pairs[0][part]].astype(np.float64)
    difference -= columns[pairs[1][part]]
    squared[part] = np.square(difference, out=difference).sum(axis=1)
  return squared


def nearest(
  rows: Points,
  blocks: Iterable[Float[np.ndarray, "_ D"]],
  k: int,
  *,
  exclude_self: bool = False,
) -> tuple[Float64[np.ndarray, "N k"], Int64[np.ndarray, "N k"], int]:
  """The k nearest of all columns for each row; exact.

  Columns are numbered from 0 in the order they come; among equally near ones
  the lowest numbers win. Nothing depends on how they are cut into blocks.

  Args:
    rows: [N, D], as `as_points` returns them.
    blocks: columns [M_i, D], read once, in order.
    k: neighbours to keep.
    exclude_self: the columns are the rows again, in order, and none is its own
      neighbour (its duplicates are).

  Returns:
    squared: [N, k] squared distances, ascending; inf without a column;
    index: [N, k] numbers of the columns; -1 without a column;
    count: columns that came.
  """
  side = block_side(rows.shape[1])
  centre = rows.mean(axis=0, dtype=np.float64)
  squared = np.full((len(rows), k), np.inf)
  index = np.full((len(rows), k), -1, np.int64)
  count = 0
  for block in blocks:
    # Small blocks first: their neighbours rule out most later pairs.
    first = None if count else max(k, _FIRST_COLUMNS)
    for part in slices(len(block), side, first):
      columns = block[part]
      for of_rows in slices(len(rows), side):
        points, known = rows[of_rows], squared[of_rows]
        own = of_rows.start - count if exclude_self else None
        pairs = _candidates(points, columns, centre, known, own)
        distances = _squared_distances(points, columns, pairs)
        row = np.concatenate([np.arange(len(points)).repeat(k), pairs[0]])
        merged = np.concatenate([known.ravel(), distances])
        number = np.concatenate([index[of_rows].ravel(), pairs[1] + count])
        order = np.lexsort((number, merged, row))
        # Every row has its k old entries, so at least k in all.
        starts = np.searchsorted(row[order], np.arange(len(points)))
        kept = order[starts[:, None] + np.arange(k)]
        squared[of_rows] = merged[kept]
        index[of_rows] = number[kept]
      count += len(columns)
  return squared, index, count


def _candidates(
  rows: np.ndarray,
  columns: np.ndarray,
  centre: np.ndarray,
  known: np.ndarray,
  own: int | None,
) -> tuple[np.ndarray, ...]:
  """(rows, columns) of the pairs that may be among the k nearest.

  Args:
    known: [R, k] squared distances so far, ascending.
    own: the diagonal whose pairs are a point and itself, if any are.
  """
  k = known.shape[1]
  lower, upper = _bounds(rows, columns, centre)
  if own is not None:
    itself = np.eye(len(rows), len(columns), own, dtype=bool)
    lower[itself] = np.nan  # is never below a limit
    upper[itself] = np.inf
  limit = known[:, -1].copy()
  unknown = np.isinf(limit)
  if unknown.any() and len(columns) >= k:
    limit[unknown] = np.partition(upper[unknown], k - 1, axis=1)[:, k - 1]
  # Nothing is nearer than 0, and of equally near columns the first ones win.
  limit[known[:, -1] == 0.0] = -np.inf
  return np.nonzero(lower <= limit[:, None])


def neighbour_radii(points: Points, k: int) -> Float64[np.ndarray, " N"]:
  """Squared distance of each point to its k-th nearest other point."""
  return nearest(points, [points], k, exclude_self=True)[0][:, -1]


def ball_counts(
  centres: Float[np.ndarray, "N D"],
  radii: Float64[np.ndarray, " N"],
  points: Float[np.ndarray, "M D"],
  *,
  closed: bool,
) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " M"]]:
  """Counts points in balls.

  Args:
    centres: [N, D] of the balls.
    radii: [N] squared radii of the balls.
    points: [M, D].
    closed: whether points on a ball's surface are inside.

  Returns:
    (for each ball, how many points it holds; for each point, how many balls
    hold it).
  """
  side = block_side(centres.shape[1])
  middle = centres.mean(axis=0, dtype=np.float64)
  in_ball = np.zeros(len(centres), np.int64)
  around_point = np.zeros(len(points), np.int64)
  for columns in slices(len(points), side):
    for rows in slices(len(centres), side):
      lower, upper = _bounds(centres[rows], points[columns], middle)
      limit = radii[rows, None]
      inside = upper < limit
      pairs = np.nonzero((lower <= limit) & ~inside)
      squared = _squared_distances(centres[rows], points[columns], pairs)
      limits = radii[rows][pairs[0]]
      inside[pairs] = squared <= limits if closed else squared < limits
      in_ball[rows] += inside.sum(axis=1)
      around_point[columns] += inside.sum(axis=0)
  return in_ball, around_point

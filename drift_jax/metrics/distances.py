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

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from numpy.typing import ArrayLike

from drift_jax.metrics import frechet

# Numbers in a block: 32 MiB of float64.
BLOCK_ENTRIES = 2**22
# Squares and sums of float64 numbers up to here do not overflow.
_LARGEST = 1e140
_FIRST_COLUMNS = 32
# With a greater share of a block's pairs to sum, tighter bounds are faster.
_FEW = 1e-3

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
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(lower, upper) bounds [R, C] of what `_squared_distances` returns.

  First those of a float32 product, unless they would overflow or underflow,
  then those of a float64 product, which are tighter and take twice as long.
  """
  rows = rows - centre
  columns = columns - centre
  row_norms = np.einsum("nd,nd->n", rows, rows)
  column_norms = np.einsum("nd,nd->n", columns, columns)
  largest = max(row_norms.max(), column_norms.max())
  for dtype in (np.float32, np.float64):
    info = np.finfo(dtype)
    tiny, eps = float(info.tiny), float(info.eps)
    if dtype == np.float32 and not tiny / eps**2 < largest < info.max / 8:
      continue
    # A sum of D rounded products is off by D eps / 2 of the sum of magnitudes
    # at most, here |x|^2 + |y|^2 + 2 |x.y| <= 2 (|x|^2 + |y|^2). The sum of
    # squared differences and the shift by the centre are rounded too: twice
    # that, and a few terms more; what underflows is less than the smallest
    # normal number.
    slack = 2.0 * (rows.shape[1] + 8) * eps
    least = (rows.shape[1] + 8) * tiny
    product = (-2.0 * rows).astype(dtype) @ columns.astype(dtype).T
    lower, upper = (
      product
      + ((1 + sign * slack) * row_norms + sign * least).astype(dtype)[:, None]
      for sign in (-1, 1)
    )
    lower += ((1 - slack) * column_norms).astype(dtype)
    upper += ((1 + slack) * column_norms).astype(dtype)
    yield lower, upper


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
  pairs: tuple[np.ndarray, ...] = ()
  for lower, upper in _bounds(rows, columns, centre):
    if own is not None:
      itself = np.eye(len(rows), len(columns), own, dtype=bool)
      lower[itself] = np.nan  # is never below a limit
      upper[itself] = np.inf
    limit = known[:, -1].astype(lower.dtype)
    unknown = np.isinf(limit)
    if unknown.any() and len(columns) >= k:
      limit[unknown] = np.partition(upper[unknown], k - 1, axis=1)[:, k - 1]
    # Nothing is nearer than 0, and of equally near columns the first ones win.
    limit[known[:, -1] == 0.0] = -np.inf
    pairs = np.nonzero(lower <= limit[:, None])
    if len(pairs[0]) <= k * len(rows) + _FEW * lower.size:
      break
  return pairs


def neighbour_radii(points: Points, k: int) -> Float64[np.ndarray, " N"]:
  """Squared distance of each point to its k-th nearest other point."""
  return nearest(points, [points], k, exclude_self=True)[0][:, -1]


def ball_counts(
  centres: Float[np.ndarray, "N D"],
  radii: Float64[np.ndarray, " N"],
  points: Float[np.ndarray, "M D"],
) -> Int64[np.ndarray, " N"]:
  """How many points each open ball holds.

  Args:
    centres: [N, D] of the balls.
    radii: [N] squared radii of the balls.
    points: [M, D].
  """
  counts = np.zeros(len(centres), np.int64)
  for rows, _, nearer in _pairs(centres, points):
    (inside,) = nearer([radii[rows, None]], closed=False)
    counts[rows] += inside.sum(axis=1)
  return counts


def covered(
  first: Float[np.ndarray, "N D"],
  first_radii: Float64[np.ndarray, " N"],
  second: Float[np.ndarray, "M D"],
  second_radii: Float64[np.ndarray, " M"],
) -> tuple[Bool[np.ndarray, " N"], Bool[np.ndarray, " M"]]:
  """Which points of each set lie in a closed ball around one of the other set.

  Args:
    first: [N, D] points.
    first_radii: [N] squared radii of the balls around them.
    second: [M, D] points.
    second_radii: [M] squared radii of the balls around them.
  """
  of_first = np.zeros(len(first), bool)
  of_second = np.zeros(len(second), bool)
  for rows, columns, nearer in _pairs(first, second):
    limits = [first_radii[rows, None], second_radii[None, columns]]
    around_first, around_second = nearer(limits, closed=True)
    of_second[columns] |= around_first.any(axis=0)
    of_first[rows] |= around_second.any(axis=1)
  return of_first, of_second


def _pairs(
  first: np.ndarray, second: np.ndarray
) -> Iterator[tuple[slice, slice, Callable[..., list[np.ndarray]]]]:
  """Blocks of pairs: rows of `first`, of `second`, and `_nearer` of them."""
  side = block_side(first.shape[1])
  middle = first.mean(axis=0, dtype=np.float64)
  for columns in slices(len(second), side):
    for rows in slices(len(first), side):
      yield (
        rows,
        columns,
        functools.partial(_nearer, first[rows], second[columns], middle),
      )


def _nearer(
  rows: np.ndarray,
  columns: np.ndarray,
  centre: np.ndarray,
  limits: Sequence[np.ndarray],
  *,
  closed: bool,
) -> list[np.ndarray]:
  """[R, C] for each limits: whether a pair's squared distance is below them.

  Args:
    limits: each [R, 1] or [1, C].
    closed: whether it may be equal.
  """
  inside: list[np.ndarray] = []
  unsure: list[tuple[np.ndarray, ...]] = []
  for lower, upper in _bounds(rows, columns, centre):
    rounded = [limit.astype(lower.dtype) for limit in limits]
    inside = [upper < limit for limit in rounded]
    unsure = [
      np.nonzero((lower <= limit) & ~found)
      for limit, found in zip(rounded, inside, strict=True)
    ]
    if max(len(pairs[0]) for pairs in unsure) <= _FEW * lower.size:
      break
  for limit, found, pairs in zip(limits, inside, unsure, strict=True):
    squared = _squared_distances(rows, columns, pairs)
    threshold = np.broadcast_to(limit, found.shape)[pairs]
    found[pairs] = squared <= threshold if closed else squared < threshold
  return inside

import tracemalloc

import numpy as np
import pytest
from scipy.spatial import distance
from sklearn.neighbors import NearestNeighbors

from drift_jax.metrics import distances

BLOCK = distances.BLOCK_ENTRIES


def points(seed: int, count: int, dimensions: int = 6) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(count, dimensions))


def lattice(seed: int, count: int) -> np.ndarray:
  """Small integers: exact distances, many of them equal, and many copies."""
  integers = np.random.default_rng(seed).integers(0, 3, (count, 3))
  return integers.astype(np.float32)


def search(rows, parts, k, *, exclude_self=False, block=BLOCK):
  result = distances.NearestSearch(
    rows, k, exclude_self=exclude_self, block_entries=block
  )
  for part in parts:
    result.add(part)
  return result.squared, result.index


def brute_force(rows, columns, k):
  """(squared [N, k], index [N, k]) by a stable sort of all distances."""
  squared = np.square(rows[:, None].astype(np.float64) - columns).sum(axis=-1)
  index = np.argsort(squared, axis=1, kind="stable")[:, :k]
  return np.take_along_axis(squared, index, axis=1), index


@pytest.fixture
def summed(monkeypatch):
  """Counts the pairs whose distance is summed."""
  counts = []
  original = distances._squared_distances

  def count(rows, columns, pairs, block_entries):
    counts.append(len(pairs[0]))
    return original(rows, columns, pairs, block_entries)

  monkeypatch.setattr(distances, "_squared_distances", count)
  return counts


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-9])
def test_bounds_enclose_the_distance(dtype, offset, spread):
  rows = (offset + points(0, 50, 300)).astype(dtype)
  columns = (rows[::-1] + spread * points(1, 50, 300)).astype(dtype)
  centre = rows.mean(axis=0, dtype=np.float64)
  lower, upper = distances._bounds(rows, columns, centre)
  wide = rows[:, None].astype(np.longdouble) - columns.astype(np.longdouble)
  exact = np.square(wide).sum(axis=-1)
  assert (lower <= exact).all() and (exact <= upper).all()
  # 3e-13 of the squared norms after centring: worth the name of a bound.
  scale = np.square(rows - centre).sum(axis=1).max()
  scale += np.square(columns - centre).sum(axis=1).max()
  assert (upper - lower).max() <= 4 * 310 * np.finfo(np.float64).eps * scale


def test_bounds_allow_for_underflow():
  rows, columns = 1e-161 * points(0, 40), 1e-161 * points(1, 40)
  lower, upper = distances._bounds(rows, columns, rows.mean(axis=0))
  squared = distance.cdist(rows, columns, "sqeuclidean")
  assert squared.any() and (squared < np.finfo(np.float64).tiny).all()
  assert (lower <= squared).all() and (squared <= upper).all()


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("block", [1, 50, 700, BLOCK])
@pytest.mark.parametrize("splits", [[], [1], [0, 2, 40], [50, 51]])
def test_search_breaks_ties_by_number(k, block, splits):
  rows, columns = lattice(2, 30), lattice(3, 80)
  parts = [part for part in np.split(columns, splits) if len(part)]
  squared, index = search(rows, parts, k, block=block)
  expected = brute_force(rows, columns, k)
  assert np.array_equal(squared, expected[0])
  assert np.array_equal(index, expected[1])


def test_search_among_copies_takes_the_first_ones():
  rows = np.repeat(points(4, 2), 50, axis=0)
  squared, index = search(rows, [rows[::-1], rows[::-1]], 5, block=600)
  assert not squared.any()
  assert np.array_equal(index[:50], np.tile(np.arange(50, 55), (50, 1)))
  assert np.array_equal(index[50:], np.tile(np.arange(5), (50, 1)))


@pytest.mark.parametrize("block", [30, 500, BLOCK])
def test_radii_oracle(block):
  for rows in (points(5, 70) + 1e5, np.repeat(points(6, 20), 3, axis=0)):
    tree = NearestNeighbors(n_neighbors=3, algorithm="kd_tree").fit(rows)
    radii = distances.neighbour_radii(rows, 3, block)
    # With no query, a point is not its own neighbour, but its copies are.
    expected = tree.kneighbors()[0][:, -1]
    np.testing.assert_allclose(np.sqrt(radii), expected, rtol=1e-14, atol=0)


def test_fewer_columns_than_neighbours_leave_gaps():
  squared, index = search(points(7, 3), [points(8, 2)], 4)
  assert np.isinf(squared[:, 2:]).all() and (index[:, 2:] == -1).all()
  assert np.isfinite(squared[:, :2]).all() and (index[:, :2] >= 0).all()


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("block", [1, 100, BLOCK])
def test_balls_with_points_on_their_surface(closed, block):
  centres, inner = lattice(9, 40), lattice(10, 60)
  radii = np.arange(40) % 5 + np.where(np.arange(40) % 2, 0.5, 0.0)
  counts = distances.ball_counts(
    centres, radii, inner, closed=closed, block_entries=block
  )
  squared = distance.cdist(centres, inner, "sqeuclidean")
  expected = squared <= radii[:, None] if closed else squared < radii[:, None]
  assert (squared == radii[:, None]).sum() > 100
  assert np.array_equal(counts[0], expected.sum(axis=1))
  assert np.array_equal(counts[1], expected.sum(axis=0))


def test_few_pairs_are_summed(summed):
  rows, columns = points(11, 100, 64), points(12, 2000, 64)
  squared, index = search(rows, [columns], 3, block=2**16)
  expected = brute_force(rows[:20], columns, 3)
  assert np.array_equal(index[:20], expected[1])
  assert sum(summed) < 25 * len(rows)
  summed.clear()
  distances.ball_counts(
    rows, squared[:, -1], columns, closed=True, block_entries=2**16
  )
  # Those that lie on the surfaces, which the search found.
  assert sum(summed) == len(rows)


def test_collapsed_samples_do_not_all_have_to_be_summed(summed):
  rows = np.repeat(points(13, 1, 64), 400, axis=0)
  assert not distances.neighbour_radii(rows, 3, 2**13).any()
  assert sum(summed) < 0.1 * len(rows) ** 2


@pytest.mark.parametrize("cluster", [0.0, 1.0])
def test_memory_is_bounded_by_blocks(cluster):
  entries = 2**14
  # Two tight clusters: no pair within one can be told from another by bounds.
  centres = np.arange(600)[:, None] % 2 * cluster
  scale = 1e-9 if cluster else 1.0
  rows = centres + scale * points(14, 600, 64)
  assert distances.block_side(64, entries) == 128
  tracemalloc.start()
  radii = distances.neighbour_radii(rows, 3, entries)
  distances.ball_counts(rows, radii, rows, closed=True, block_entries=entries)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # All distances are 22 blocks.
  assert peak < (14 if cluster else 7) * entries * 8


def test_blocks_hold_few_wide_points():
  assert distances.block_side(2048, BLOCK) == 2048
  assert distances.block_side(196_608, BLOCK) == 21
  assert distances.block_side(10**7, BLOCK) == 1
  with pytest.raises(ValueError, match="block_entries must be >= 1, got 0"):
    distances.block_side(4, 0)


def test_points_keep_their_precision():
  for dtype, kept in (
    (np.float32, np.float32),
    (np.float64, np.float64),
    (np.float16, np.float64),
    (np.uint8, np.float64),
  ):
    array = np.ones((3, 2), dtype)
    result = distances.as_points(array, "features")
    assert result.dtype == kept
    assert (result is array) == (dtype == kept)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bad_points(dtype):
  array = np.zeros((4, 3), dtype)
  for bad in (array[:0], array[:, :0], array[0]):
    with pytest.raises(ValueError, match="features must be a non-empty"):
      distances.as_points(bad, "features")
  array[2, 1] = np.nan
  with pytest.raises(ValueError, match="features: 1 of 4 rows.*row 2"):
    distances.as_points(array, "features")
  with pytest.raises(ValueError, match="features: .*1e[+]200 overflow.*1e[+]1"):
    distances.as_points(np.full((2, 2), -1e200), "features")

import tracemalloc

import numpy as np
import pytest
from scipy.spatial import distance

from drift_jax.metrics import distances
from drift_jax.metrics.coverage import (
  density_coverage,
  duplicates,
  precision_recall,
)
from drift_jax.metrics.kid import kernel_distance
from drift_jax.metrics.neighbours import nearest_neighbours
from tests.metrics.conftest import GRID, points, radii_of

BLOCKS = pytest.mark.parametrize("block", [1, 50, 700, 2**22], indirect=True)


def lattice(seed: int, count: int) -> np.ndarray:
  """Small integers: exact distances, many of them equal, and many copies."""
  integers = np.random.default_rng(seed).integers(0, 3, (count, 3))
  return integers.astype(np.float32)


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

  def count(rows, columns, pairs):
    counts.append(len(pairs[0]))
    return original(rows, columns, pairs)

  monkeypatch.setattr(distances, "_squared_distances", count)
  return counts


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-9])
def test_bounds_enclose_the_distance(dtype, offset, spread):
  rows = (offset + points(0, 50, 300)).astype(dtype)
  columns = (rows[::-1] + spread * points(1, 50, 300)).astype(dtype)
  centre = rows.mean(axis=0, dtype=np.float64)
  wide = rows[:, None].astype(np.longdouble) - columns.astype(np.longdouble)
  exact = np.square(wide).sum(axis=-1)
  scale = np.square(rows - centre).sum(axis=1).max()
  scale += np.square(columns - centre).sum(axis=1).max()
  bounds = list(distances._bounds(rows, columns, centre))
  assert [lower.dtype for lower, _ in bounds] == [np.float32, np.float64]
  for lower, upper in bounds:
    assert (lower <= exact).all() and (exact <= upper).all()
    # 1.5e-4 and 3e-13 of the squared norms after centring: worth the name.
    eps = np.finfo(lower.dtype).eps
    assert (upper - lower).max() <= 4 * 310 * eps * scale


@pytest.mark.parametrize("size", [1e-161, 1e-22, 1e-10, 1e17, 1e30, 1e130])
def test_bounds_allow_for_small_and_large_numbers(size):
  rows, columns = size * points(0, 40, 6), size * points(1, 40, 6)
  squared = distance.cdist(rows, columns, "sqeuclidean")
  bounds = list(distances._bounds(rows, columns, rows.mean(axis=0)))
  assert squared.any() and len(bounds) == (2 if 1e-20 < size < 1e20 else 1)
  for lower, upper in bounds:
    assert (lower <= squared).all() and (squared <= upper).all()
    assert np.isfinite(lower).all() and np.isfinite(upper).all()


@BLOCKS
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("splits", [[], [1], [0, 2, 40], [50, 51]])
def test_search_breaks_ties_by_number(k, block, splits):
  rows, columns = lattice(2, 30), lattice(3, 80)
  parts = [part for part in np.split(columns, splits) if len(part)]
  squared, index, count = distances.nearest(rows, parts, k)
  expected = brute_force(rows, columns, k)
  assert np.array_equal(squared, expected[0]) and count == 80
  assert np.array_equal(index, expected[1])


@pytest.mark.parametrize("block", [600], indirect=True)
def test_search_among_copies_takes_the_first_ones(block):
  rows = np.repeat(points(4, 2, 6), 50, axis=0)
  squared, index, _ = distances.nearest(rows, [rows[::-1], rows[::-1]], 5)
  assert not squared.any()
  assert np.array_equal(index[:50], np.tile(np.arange(50, 55), (50, 1)))
  assert np.array_equal(index[50:], np.tile(np.arange(5), (50, 1)))


@BLOCKS
def test_radii_oracle(block):
  for rows in (points(5, 70) + 1e5, np.repeat(points(6, 20), 3, axis=0)):
    radii = np.sqrt(distances.neighbour_radii(rows, 3))
    np.testing.assert_allclose(radii, radii_of(rows, 3), rtol=1e-14, atol=0)


@BLOCKS
def test_balls_with_points_on_their_surface(block):
  centres, inner = lattice(9, 40), lattice(10, 60)
  radii = np.arange(40) % 5 + np.where(np.arange(40) % 2, 0.5, 0.0)
  squared = distance.cdist(centres, inner, "sqeuclidean")
  assert (squared == radii[:, None]).sum() > 100
  counts = distances.ball_counts(centres, radii, inner)
  assert np.array_equal(counts, (squared < radii[:, None]).sum(axis=1))
  small, large = radii / 3, np.where(np.arange(60) % 20, -1.0, 2.0)
  of_centres, of_inner = distances.covered(centres, small, inner, large)
  assert (squared == small[:, None]).any() and (squared == large).any()
  assert np.array_equal(of_inner, (squared <= small[:, None]).any(axis=0))
  assert np.array_equal(of_centres, (squared <= large).any(axis=1))
  assert 0 < of_inner.sum() < 60 and 0 < of_centres.sum() < 40


@pytest.mark.parametrize("block", [2**13], indirect=True)
def test_few_pairs_are_summed(summed, block):
  rows, columns = points(11, 100, 64), points(12, 2000, 64)
  squared, _, _ = distances.nearest(rows, [columns], 3)
  assert sum(summed) < 25 * len(rows)
  summed.clear()
  distances.covered(rows, squared[:, -1], columns, np.zeros(len(columns)))
  # Those that lie on the surfaces, which the search found, and few more.
  assert len(rows) <= sum(summed) < 2 * len(rows)
  summed.clear()
  collapsed = np.repeat(points(13, 1, 64), 400, axis=0)
  assert not distances.neighbour_radii(collapsed, 3).any()
  assert sum(summed) < 0.1 * len(collapsed) ** 2


@pytest.mark.parametrize("block", [2**14], indirect=True)
@pytest.mark.parametrize("cluster", [0.0, 1.0])
def test_memory_is_bounded_by_blocks(cluster, block):
  # Two tight clusters: no pair within one can be told from another by bounds.
  centres = np.arange(600)[:, None] % 2 * cluster
  scale = 1e-9 if cluster else 1.0
  rows = centres + scale * points(14, 600, 64)
  assert distances.block_side(64) == 128 and distances.block_side(2**20) == 1
  tracemalloc.start()
  radii = distances.neighbour_radii(rows, 3)
  distances.covered(rows, radii, rows, radii)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # All distances are 22 blocks.
  assert peak < (14 if cluster else 7) * 2**14 * 8


def test_points_keep_their_precision():
  for dtype in (np.float32, np.float64, np.float16, np.uint8):
    array = np.ones((3, 2), dtype)
    (result,) = distances.as_points(features=array)
    assert result.dtype == (np.float32 if dtype == np.float32 else np.float64)
    assert (result is array) == (dtype in (np.float32, np.float64))


GOOD = points(0, 9)
BROKEN = GOOD.copy()
BROKEN[4, 2] = np.nan
# (names of points, other arguments).
FUNCTIONS = {
  density_coverage: ("real fake", {"k": 3}),
  precision_recall: ("real fake", {"k": 3}),
  duplicates: ("fake train heldout", {"grid": GRID}),
  kernel_distance: ("real fake", {}),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (points(0, 9, 4), r"differ in dimension.*\(9, "),
    (GOOD[0], "must be a non-empty"),
    (BROKEN.astype(np.float32), "1 of 9 rows.*row 4"),
    (np.full((9, 5), -1e200), "1e[+]200 overflow.*1e[+]1"),
  ],
)
def test_bad_points(function, bad, message):
  names, others = FUNCTIONS[function]
  for name in names.split():
    sets = dict.fromkeys(names.split(), GOOD) | {name: bad}
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
      function(**sets, **others)


def test_bad_k():
  for function in (density_coverage, precision_recall):
    for k in (0, 9):
      with pytest.raises(ValueError, match=f"k = {k} .*9 real.*1 to 8"):
        function(GOOD, points(1, 20), k)
  with pytest.raises(ValueError, match="k = 9 .*among 8 fake.*1 to 7"):
    precision_recall(points(1, 20), GOOD[:8], 9)


def test_bad_blocks():
  for blocks, k, message in (
    ([GOOD], 0, "k must be at least 1, got 0"),
    ([GOOD[:3], GOOD[:1]], 5, "k = 5 .*among 4 training.*1 to 4"),
    ([], 5, "among 0 training"),
    ([GOOD, GOOD[:, :4]], 5, r"block 1 of the.*\(9, 4\)"),
    ([GOOD, BROKEN], 5, "block 1 of the.*row 4"),
  ):
    with pytest.raises(ValueError, match=message):
      nearest_neighbours(GOOD, blocks, k)
  with pytest.raises(ValueError, match="query.*row 4"):
    nearest_neighbours(BROKEN, [GOOD], 5)

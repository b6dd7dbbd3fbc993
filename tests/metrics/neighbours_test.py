import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from drift_jax.metrics.images import image_grid
from drift_jax.metrics.neighbours import (
  distance_summary,
  nearest_neighbours,
  neighbour_grid,
  plot_nearest_distances,
)
from tests.metrics.conftest import points


@pytest.fixture(scope="module")
def features(digits):
  """(held-out [540, 64], training [1257, 64]) pixels, float32."""
  heldout = digits.test_images.reshape(540, 64)
  return heldout, digits.train_images.reshape(-1, 64)


@pytest.mark.parametrize("size", [1257, 256, 100])
@pytest.mark.parametrize("block", [2**17], indirect=True)
def test_oracle_for_a_streamed_training_set(features, size, block):
  query, train = features[0][::3], features[1]
  parts = (train[i : i + size] for i in range(0, len(train), size))
  found = nearest_neighbours(query, parts, 10)
  tree = NearestNeighbors(n_neighbors=10, algorithm="kd_tree").fit(train)
  np.testing.assert_allclose(
    found.distance, tree.kneighbors(query)[0], rtol=1e-14
  )
  # Squares of digits' distances are exact, with ties: lowest number first.
  squared = np.square(query[:, None] - train).sum(axis=-1)
  expected = np.argsort(squared, axis=1, kind="stable")[:, :10]
  assert np.array_equal(found.index, expected)
  assert found.count == 1257


@pytest.mark.parametrize("step", [0.0, 1e-4])
def test_near_points_far_from_the_origin_keep_their_distances(step):
  # Sums of squares are 5e12 here: their rounding is 1e-3, the step's square 0
  # or 5e-8.
  reference = points(9, 20) + 1e6
  query = reference[::-1] + step
  found = nearest_neighbours(query, [reference], 1)
  expected = np.linalg.norm(query - reference[::-1], axis=1)
  np.testing.assert_allclose(found.distance[:, 0], expected, rtol=1e-14, atol=0)
  assert np.array_equal(found.index[:, 0], np.arange(20)[::-1])


def test_blocks_are_read_one_at_a_time(features):
  query, train = features
  alive = []

  def blocks():
    for start in range(0, 1000, 100):
      block = train[start : start + 100].copy()
      alive.append(block.__array_interface__["data"][0])
      yield block

  nearest_neighbours(query[:5], blocks(), 3)
  # Freed memory is used again, so addresses repeat.
  assert len(set(alive)) <= 3


@pytest.mark.parametrize("channels, scale", [(1, 3), (3, 1)])
def test_grid_shows_each_image_beside_its_neighbours(channels, scale):
  random = np.random.default_rng(0)
  images = random.uniform(-1, 1, (3, 11, 8, 6, channels)).astype(np.float32)
  grid = neighbour_grid(images[:, 0], images[:, 1:], padding=1, scale=scale)
  whole = image_grid(
    images.reshape(33, 8, 6, channels), columns=11, padding=1, scale=scale
  )
  cell, gap = 6 * scale + 1, 2 * scale
  # The gap, and the padding on both sides of it.
  assert grid.shape[1] == whole.shape[1] + gap + 1
  assert np.array_equal(grid[:, : cell + 1], whole[:, : cell + 1])
  assert np.array_equal(grid[:, cell + 1 + gap :], whole[:, cell:])
  assert (grid[:, cell + 1 : cell + 1 + gap] == 255).all()


def test_summary_of_new_and_of_memorised_images(features):
  query, train = features
  heldout = nearest_neighbours(query, [train], 1).distance[:, 0]
  summary = distance_summary(heldout, heldout)
  # 540 distances: 6 lie below their 1 % quantile.
  assert summary["generated_closer"] == summary["heldout_closer"] == 6 / 540
  assert summary["threshold"] == summary["generated_p01"]
  assert summary["heldout_p50"] == np.median(heldout)
  assert summary["generated_count"] == summary["heldout_count"] == 540
  assert summary["generated_identical"] == 0.0
  mixed = np.concatenate([train[:30], train[30:60] + 1e-3, query[:60]])
  generated = nearest_neighbours(mixed, [train], 1).distance[:, 0]
  summary = distance_summary(generated, heldout)
  near = np.count_nonzero(heldout[:60] < summary["threshold"])
  assert summary["generated_closer"] == (60 + near) / 120
  assert summary["generated_identical"] == 0.25
  assert summary["generated_p95"] == np.quantile(generated, 0.95)
  assert all(type(value) is float for value in summary.values())
  summary = distance_summary([0.5, 0.49], [0.5])  # closer is strict
  assert summary["threshold"] == summary["generated_closer"] == 0.5
  assert summary["heldout_closer"] == 0.0


def test_plot_shows_the_distances(tmp_path, figures):
  random = np.random.default_rng(1)
  heldout = random.gamma(9.0, size=400)
  generated = random.gamma(7.0, size=300)
  path = tmp_path / "new" / "plot.png"
  plot_nearest_distances(generated, heldout, path, space="MAE features")
  with Image.open(path) as image:
    assert image.format == "PNG" and min(image.size) > 600
  assert len(list(path.parent.iterdir())) == 1
  histogram, cumulative = figures[0].axes
  assert "MAE features" in cumulative.get_xlabel()
  for i, values in enumerate((generated, heldout)):
    fractions, edges, _ = histogram.patches[i].get_data()
    assert fractions.sum() == pytest.approx(1.0, rel=1e-12)
    inside = np.mean((values >= edges[10]) & (values < edges[20]))
    assert fractions[10:20].sum() == pytest.approx(inside, rel=1e-12)
    steps = cumulative.get_lines()[i].get_xydata()
    assert np.array_equal(steps[1:, 0], np.sort(values))
    assert np.allclose(steps[:, 1], np.linspace(0, 1, len(values) + 1))
  summary = distance_summary(generated, heldout)
  line = cumulative.get_lines()[2]
  assert set(line.get_xdata()) == {summary["threshold"]}
  assert f"{summary['generated_closer']:.1%}" in line.get_label()
  # All distances may be 0.
  plot_nearest_distances([0.0], [0.0, 0.0], path, space="x")
  fractions, edges, _ = figures[1].axes[0].patches[0].get_data()
  assert (np.diff(edges) > 0).all() and fractions[0] == 1.0

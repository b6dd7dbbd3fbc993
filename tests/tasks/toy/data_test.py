"""Toy distributions and their feed."""

import numpy as np
import pytest

from drift_jax.tasks.toy.config import DISTRIBUTIONS
from drift_jax.tasks.toy.data import (
  TOYS,
  ToyFeed,
  draw_points,
  fixed_points,
  modes_of,
)


def draw(name, count=4_000, noise=0.0, seed=0):
  return draw_points(name, count, noise, np.random.default_rng(seed))


def test_the_config_knows_all_of_them():
  assert DISTRIBUTIONS == TOYS


@pytest.mark.parametrize("name", TOYS)
def test_points_fill_the_square(name):
  points = draw(name)
  assert points.shape == (4_000, 2) and points.dtype == np.float32
  reach = np.abs(points).max()
  assert 0.5 <= reach <= 1.0
  # The noise is what it says, and nothing but added.
  difference = draw(name, noise=0.1) - points
  np.testing.assert_allclose(difference.std(axis=0), 0.1, rtol=0.05)
  np.testing.assert_allclose(difference.mean(axis=0), 0, atol=0.01)


def test_the_checkerboard_has_eight_cells():
  points = draw("checkerboard", count=8_000)
  cells = np.floor((points + 1) / 0.5).astype(int)
  assert (cells.sum(axis=1) % 2 == 0).all()
  counts = np.bincount(cells[:, 0] * 4 + cells[:, 1], minlength=16)
  assert (counts > 0).sum() == 8
  # 6 standard deviations of a binomial.
  np.testing.assert_allclose(counts[counts > 0], 1_000, atol=180)


def test_the_swiss_roll_is_one():
  points = draw("swiss_roll").astype(np.float64)
  t = np.linalg.norm(points, axis=1) * 4.5 * np.pi
  assert t.min() >= np.pi / 2 - 1e-5 and t.max() <= 4.5 * np.pi + 1e-5
  unit = np.stack([np.cos(t), np.sin(t)], axis=1)
  np.testing.assert_allclose(points * 4.5 * np.pi, t[:, None] * unit, atol=1e-4)
  # u is uniform.
  u = (t - np.pi / 2) / (4 * np.pi)
  np.testing.assert_allclose(
    np.quantile(u, [0.25, 0.75]), [0.25, 0.75], atol=0.04
  )


@pytest.mark.parametrize("name", ["bimodal", "checkerboard", "eight_gaussians"])
def test_modes_are_where_the_mass_is(name):
  modes = modes_of(name, 0.05)
  assert modes.masses.sum() == pytest.approx(1)
  points = draw(name, noise=0.05)
  distance = np.linalg.norm(points[:, None] - modes.centres, axis=-1)
  assert np.mean(distance.min(axis=1) > modes.radius) < 2e-3
  counts = np.bincount(distance.argmin(axis=1), minlength=len(modes.centres))
  expected = modes.masses * len(points)
  assert (np.abs(counts - expected) < 6 * np.sqrt(expected)).all()


def test_what_has_no_modes():
  assert modes_of("spiral", 0.05) is None


def test_unknown_distributions():
  for call in (
    lambda: draw("spirals"),
    lambda: modes_of("spirals", 0.1),
    lambda: feed(distribution="spirals"),
  ):
    with pytest.raises(ValueError, match="'spirals': valid options .*'spiral'"):
      call()


def feed(distribution="moons", **changes):
  sizes = {"noise": 0.1, "seed": 3, "num_labels": 4, "num_positives": 5}
  return ToyFeed(distribution, **sizes | changes)


def same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


def test_batches_are_points():
  batch = next(feed())
  assert {k: v.shape for k, v in batch.items()} == {"positives": (4, 5, 2)}
  # Labels are independent problems, and so are steps and seeds.
  points = batch["positives"].reshape(4, -1)
  assert len(np.unique(points, axis=0)) == 4
  again = feed()
  next(again)
  assert (next(again)["positives"] != batch["positives"]).all()
  assert (next(feed(seed=4))["positives"] != batch["positives"]).all()


def test_a_restored_feed_goes_on():
  running = feed()
  for _ in range(3):
    next(running)
  state = running.state()
  restored = feed()
  assert restored.abstract(state)["position"].dtype == np.int64
  restored.restore(state)
  for _ in range(2):
    same(next(restored), next(running))


def test_any_number_of_processes_draw_the_same():
  whole = next(feed())
  parts = [next(feed(process_index=p, process_count=2)) for p in range(2)]
  same({k: np.concatenate([part[k] for part in parts]) for k in whole}, whole)
  with pytest.raises(ValueError, match="batch.labels=4 .*3 processes"):
    feed(process_count=3)


def test_what_judges_is_not_what_trains():
  fixed = [fixed_points("moons", 5, 0.1, seed=3, number=n) for n in (0, 1)]
  assert (fixed[0] != fixed[1]).all()
  np.testing.assert_array_equal(
    fixed[0], fixed_points("moons", 5, 0.1, seed=3, number=0)
  )
  trained = next(feed())["positives"].reshape(-1, 2)
  assert not np.isin(np.concatenate(fixed), trained).any()

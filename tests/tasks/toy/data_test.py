"""Toy distributions and their feed."""

import numpy as np
import pytest

from configs import toy
from drift_jax.tasks import parse
from drift_jax.tasks.toy import config as toy_config
from drift_jax.tasks.toy.data import (
  DISTRIBUTIONS,
  ToyFeed,
  draw_points,
  fixed_points,
  modes_of,
)


def draw(name, count=4_000, noise=0.0, seed=0):
  return draw_points(name, count, noise, np.random.default_rng(seed))


@pytest.mark.parametrize("name", toy_config.DISTRIBUTIONS)
def test_points_fill_the_square(name):
  points = draw(name)
  assert points.shape == (4_000, 2) and points.dtype == np.float32
  reach = np.abs(points).max()
  assert 0.5 <= reach <= 1.0
  # The noise is what it says, and nothing but added.
  difference = draw(name, noise=0.1) - points
  np.testing.assert_allclose(difference.std(axis=0), 0.1, rtol=0.05)
  np.testing.assert_allclose(difference.mean(axis=0), 0, atol=0.01)
  assert tuple(DISTRIBUTIONS) == toy_config.DISTRIBUTIONS


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


def small(**changes):
  config = toy.get_config("moons,smoke")
  config.seed = 3
  config.batch.update(labels=4, positives=5)
  config.update(changes)
  return parse(config)


def test_batches_are_independent_points():
  batch = next(ToyFeed(small()))
  assert {k: v.shape for k, v in batch.items()} == {"positives": (4, 5, 2)}
  # Labels are independent problems, and so are steps and seeds.
  points = batch["positives"].reshape(4, -1)
  assert len(np.unique(points, axis=0)) == 4
  again = ToyFeed(small())
  next(again)
  others = (next(again), next(ToyFeed(small(seed=4))))
  assert all((b["positives"] != batch["positives"]).all() for b in others)


def test_a_restored_feed_goes_on():
  running, restored = ToyFeed(small()), ToyFeed(small())
  for _ in range(3):
    next(running)
  state = running.state()
  assert restored.abstract(state)["position"].dtype == np.int64
  restored.restore(state)
  for _ in range(2):
    got, wanted = next(restored), next(running)
    np.testing.assert_array_equal(got["positives"], wanted["positives"])


def test_any_number_of_processes_draw_the_same():
  whole = next(ToyFeed(small()))["positives"]
  parts = [next(ToyFeed(small(), p, 2))["positives"] for p in range(2)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  with pytest.raises(ValueError, match="batch.labels=4 .*3 processes"):
    ToyFeed(small(), process_count=3)


def test_what_judges_is_not_what_trains():
  fixed = [fixed_points(small(), 5, number) for number in (0, 1, 0)]
  assert (fixed[0] != fixed[1]).all()
  np.testing.assert_array_equal(fixed[0], fixed[2])
  trained = next(ToyFeed(small()))["positives"].reshape(-1, 2)
  assert not np.isin(np.concatenate(fixed), trained).any()

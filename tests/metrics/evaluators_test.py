import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.metrics.errors import EvaluationError
from drift_jax.metrics.evaluators import (
  Evaluator,
  FrechetEvaluator,
  baselines,
  class_subset,
  merge_figures,
)
from drift_jax.metrics.frechet import FeatureStats, frechet_distance
from tests.metrics.conftest import ImageSet, batch_of, feed, labels_of

FEATURES = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)


@jax.jit
def features(images):
  return jnp.tanh(images.reshape(len(images), -1) @ FEATURES)


def pixels(images):
  return images.reshape(len(images), -1)


def build(digits, feature_fn=features, name="fd_test", **changes):
  settings = {"labels": labels_of(20), "batch_size": 32, "seed": 0}
  settings |= changes
  return FrechetEvaluator(name, feature_fn, *digits.reals, **settings)


def statistics(images):
  return FeatureStats.from_features(features(images))


def class_indices(labels, per_class):
  return np.concatenate(
    [np.flatnonzero(labels == label)[:per_class] for label in range(10)]
  )


@pytest.mark.parametrize("split", [200, 32, 7])
def test_frechet_streams_to_the_exact_distance(digits, split):
  chosen = class_indices(digits.train_labels, 20)
  images = -digits.train_images[chosen]
  labels = digits.train_labels[chosen]
  evaluator = build(digits)
  assert isinstance(evaluator, Evaluator)
  # Images before a reset must not count.
  feed(evaluator, images[:50], labels[:50])
  evaluator.reset()
  for start in range(0, 200, split):
    part = slice(start, start + split)
    feed(evaluator, jnp.asarray(images[part]), labels[part])
  expected = frechet_distance(
    statistics(images), statistics(digits.test_images)
  )
  result = evaluator.result()
  assert list(result) == ["fd_test"]
  assert result["fd_test"] == pytest.approx(expected, rel=1e-6)


def test_frechet_baseline_is_train_against_heldout_of_the_same_count(digits):
  evaluator = build(digits, seed=3)
  chosen = class_subset(digits.train_labels, labels_of(20), seed=3)
  expected = frechet_distance(
    statistics(digits.train_images[chosen]), statistics(digits.test_images)
  )
  assert evaluator.baseline()["fd_test"] == pytest.approx(expected, rel=1e-6)
  whole = frechet_distance(
    statistics(digits.train_images), statistics(digits.test_images)
  )
  assert expected > 1.2 * whole


def test_feature_fn_sees_one_shape_and_each_image_once(digits):
  batches = []

  def record(images):
    batches.append(images)
    return pixels(images)

  evaluator = build(digits, record, batch_size=48)
  evaluator.baseline()
  assert {batch.shape for batch in batches} == {(48, 8, 8, 1)}
  assert {batch.dtype for batch in batches} == {np.dtype(np.float32)}
  # 540 held-out images in 12 batches, 200 training images in 5; computed once.
  assert len(batches) == 17
  evaluator.baseline()
  assert len(batches) == 17
  held_out = np.concatenate(batches[5:])[:540]
  assert np.array_equal(held_out, digits.test_images)


def test_rows_that_only_fill_up_a_batch_do_not_count(digits):
  chosen = class_indices(digits.train_labels, 20)
  images, labels = digits.train_images[chosen], digits.train_labels[chosen]
  evaluator = build(digits)
  evaluator.update(batch_of(images, labels))
  expected = evaluator.result()
  evaluator.reset()
  evaluator.update(batch_of(images[:150], labels[:150]))
  evaluator.update(batch_of(images[150:], labels[150:], 150, padding=100))
  assert evaluator.result() == expected


def test_class_subset():
  labels = np.array([2, 0, 2, 2, 0, 5, 5, 0])
  wanted = np.array([5, 0, 2, 2, 0])
  chosen = class_subset(labels, wanted, seed=0)
  assert labels[chosen].tolist() == [0, 0, 2, 2, 5]
  assert len(set(chosen)) == 5
  assert np.array_equal(chosen, class_subset(labels, wanted, seed=0))
  draws = {tuple(class_subset(labels, wanted, seed=i)) for i in range(20)}
  assert len(draws) > 3
  for label, count in ((5, 2), (7, 0)):
    with pytest.raises(
      ValueError, match=f"{label} has {count}.*fewer than.* 3"
    ):
      class_subset(labels, np.array([label] * 3), seed=0)


@pytest.mark.parametrize("name", ["fid", "FID", "fd_fid", "x"])
def test_reserved_names(digits, name):
  with pytest.raises(ValueError, match=f"'{name}'.*'fd_'.*Inception"):
    build(digits, name=name)


def test_baselines_are_joined(digits):
  one, two = build(digits), build(digits, pixels, name="fd_pixel")
  assert baselines([one, two]) == one.baseline() | two.baseline()
  with pytest.raises(EvaluationError, match="evaluator 'a' finds kid = nan"):
    merge_figures([("a", {"fid": 1.0, "kid": float("nan")})])


def test_bad_images(digits):
  images, labels = digits.train_images[:4].copy(), digits.train_labels[:4]
  evaluator = build(digits)
  with pytest.raises(ValueError, match="no features"):
    evaluator.result()
  images[2, 0, 0, 0] = np.nan
  feed(evaluator, images, labels)
  with pytest.raises(ValueError, match="features: 1 of 4.*row 2"):
    evaluator.result()
  train, test = digits.reals
  empty = ImageSet(test.images[:0], test.labels[:0])
  settings = {"labels": labels, "batch_size": 4, "seed": 0}
  for reals in ((train, empty), (empty, test)):
    with pytest.raises(ValueError, match="fd_test: there are no"):
      FrechetEvaluator("fd_test", features, *reals, **settings)

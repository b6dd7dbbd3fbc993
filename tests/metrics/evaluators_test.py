import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.metrics.coverage import density_coverage
from drift_jax.metrics.evaluators import (
  Evaluator,
  FeatureEvaluator,
  baselines,
  class_subset,
  merge_figures,
)
from drift_jax.metrics.frechet import FeatureStats, frechet_distance
from drift_jax.system.errors import EvaluationError
from tests.metrics.conftest import batch_of, feed, labels_of

FEATURES = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)


@jax.jit
def features(images):
  return jnp.tanh(images.reshape(len(images), -1) @ FEATURES)


def pixels(images):
  return images.reshape(len(images), -1)


def build(digits, feature_fn=features, name="fd_test", seed=0, batch_size=32):
  settings = {"labels": labels_of(20), "batch_size": batch_size, "seed": seed}
  return FeatureEvaluator(
    name, lambda x: (feature_fn(x),), [name], *digits.reals, **settings
  )


def statistics(images):
  return FeatureStats.from_features(features(images))


@pytest.mark.parametrize("split", [200, 32, 7])
def test_frechet_streams_to_the_exact_distance(digits, split):
  images = -digits.train_images[:200]
  labels = digits.train_labels[:200]
  evaluator = build(digits)
  assert isinstance(evaluator, Evaluator)
  # Images before a reset must not count, nor rows that fill up a batch.
  feed(evaluator, images[:50], labels[:50])
  evaluator.reset()
  for start in range(0, 200, split):
    part = slice(start, start + split)
    evaluator.update(batch_of(images[part], labels[part], start, padding=9))
  expected = frechet_distance(
    statistics(images), statistics(digits.test_images)
  )
  assert evaluator.result() == {"fd_test": pytest.approx(expected, rel=1e-6)}


def test_frechet_baseline_is_train_against_heldout_of_the_same_count(digits):
  evaluator = build(digits, seed=3)
  chosen = class_subset(digits.train_labels, labels_of(20), seed=3)
  expected, whole = (
    frechet_distance(statistics(images), statistics(digits.test_images))
    for images in (digits.train_images[chosen], digits.train_images)
  )
  assert evaluator.baseline()["fd_test"] == pytest.approx(expected, rel=1e-6)
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
  evaluator.baseline()
  assert len(batches) == 17
  held_out = np.concatenate(batches[5:])[:540]
  assert np.array_equal(held_out, digits.test_images)


def test_coverage_in_pixels_is_that_of_the_held_out_images(digits):
  labels = labels_of(54)
  evaluator = FeatureEvaluator(
    *("coverage", lambda x: (pixels(x),), ["coverage"], *digits.reals),
    **dict(labels=labels, batch_size=32, seed=1, k=5),
  )
  with pytest.raises(ValueError, match="no features"):
    evaluator.result()
  chosen = class_subset(digits.train_labels, labels, seed=1)
  stand_in, test = digits.train_images[chosen], pixels(digits.test_images)
  density, covered = density_coverage(test, pixels(stand_in), 5)
  expected = {"density": density, "coverage": covered}
  assert evaluator.baseline() == expected
  # 540 real digits against 540 others.
  assert 0.95 < covered <= 1.0 and 0.9 < density < 1.15
  feed(evaluator, -stand_in, labels)
  evaluator.reset()
  for part in (slice(0, 100), slice(100, 101), slice(101, None)):
    feed(evaluator, jnp.asarray(stand_in[part]), labels[part], part.start)
  assert evaluator.result() == expected
  means = [
    stand_in[digits.train_labels[chosen] == label].mean(axis=0)
    for label in labels
  ]
  evaluator.reset()
  feed(evaluator, np.stack(means), labels)
  collapsed = evaluator.result()
  assert collapsed["density"] > 3.0 and collapsed["coverage"] < 0.7
  with pytest.raises(ValueError, match="k = 540 .*1 to 539"):
    FeatureEvaluator(
      *("coverage", lambda x: (x,), ["coverage"], *digits.reals),
      **dict(labels=labels, batch_size=32, seed=1, k=540),
    )


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


def test_bad_figures(digits):
  evaluators = build(digits), build(digits, pixels, name="fd_pixel")
  one, two = (evaluator.baseline() for evaluator in evaluators)
  assert baselines(evaluators) == one | two
  with pytest.raises(EvaluationError, match="evaluator 'a' finds kid = nan"):
    merge_figures([("a", {"fid": 1.0, "kid": float("nan")})])
  images = digits.train_images[:4].copy()
  images[2, 0, 0, 0] = np.nan
  feed(evaluators[0], images, digits.train_labels[:4])
  with pytest.raises(ValueError, match="features: 1 of 4.*row 2"):
    evaluators[0].result()

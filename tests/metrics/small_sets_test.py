import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.metrics import small_sets
from drift_jax.metrics.coverage import density_coverage
from drift_jax.metrics.evaluators import Evaluator, class_subset
from drift_jax.metrics.neighbours import nearest_neighbours
from drift_jax.metrics.small_sets import (
  CoverageEvaluator,
  DuplicatesEvaluator,
  LabelAccuracyEvaluator,
)
from tests.metrics.conftest import GRID, ImageSet, feed, labels_of


def flat(images):
  return np.asarray(images).reshape(len(images), -1)


def coverage_evaluator(digits, **changes):
  settings = {"k": 5, "labels": labels_of(54), "seed": 1} | changes
  return CoverageEvaluator(*digits.reals, **settings)


@pytest.fixture
def every(digits):
  return [
    coverage_evaluator(digits),
    LabelAccuracyEvaluator(*digits.reals),
    DuplicatesEvaluator(*digits.reals, grid=GRID),
  ]


@pytest.fixture(scope="module")
def stand_in(digits):
  """54 training images of each class: what a perfect memory would draw."""
  chosen = class_subset(digits.train_labels, labels_of(54), seed=1)
  return digits.train_images[chosen], digits.train_labels[chosen]


def test_evaluators_forget_on_reset_and_join_batches(every, stand_in):
  images, labels = stand_in
  for evaluator in every:
    assert isinstance(evaluator, Evaluator)
    feed(evaluator, images, labels)
    expected = evaluator.result()
    feed(evaluator, -images, labels)
    evaluator.reset()
    with pytest.raises(ValueError, match=f"{evaluator.name}: no images"):
      evaluator.result()
    for part in (slice(0, 100), slice(100, 101), slice(101, None)):
      feed(evaluator, jnp.asarray(images[part]), labels[part], part.start)
    assert evaluator.result() == expected
    assert all(type(value) is float for value in expected.values())
    assert list(evaluator.baseline()) == list(expected)


def test_coverage_against_heldout(digits, stand_in):
  evaluator = coverage_evaluator(digits)
  density, covered = density_coverage(
    flat(digits.test_images), flat(stand_in[0]), 5
  )
  assert evaluator.baseline() == {"density": density, "coverage": covered}
  # 540 real digits against 540 others.
  assert 0.95 < covered <= 1.0 and 0.9 < density < 1.15
  feed(evaluator, *stand_in)
  assert evaluator.result() == evaluator.baseline()
  evaluator.reset()
  images, labels = stand_in
  means = [images[labels == label].mean(axis=0) for label in labels]
  feed(evaluator, np.stack(means), labels)
  collapsed = evaluator.result()
  assert collapsed["density"] > 3.0 and collapsed["coverage"] < 0.7


def test_label_accuracy_is_that_of_a_classifier_of_reals(digits):
  evaluator = LabelAccuracyEvaluator(*digits.reals)
  heldout = evaluator.baseline()["label_accuracy"]
  assert heldout >= 0.985
  feed(evaluator, digits.test_images, digits.test_labels)
  assert evaluator.result() == evaluator.baseline()
  evaluator.reset()
  wrong = (digits.test_labels + 1) % 10
  feed(evaluator, digits.test_images, wrong)
  assert evaluator.result()["label_accuracy"] < 0.01
  again = LabelAccuracyEvaluator(*digits.reals)
  assert again.baseline()["label_accuracy"] == heldout


def test_label_accuracy_learns_nothing_from_heldout_images(digits):
  train, test = digits.reals
  wrong = ImageSet(test.images, (test.labels + 1) % 10)
  evaluator = LabelAccuracyEvaluator(train, wrong)
  assert evaluator.baseline()["label_accuracy"] < 0.01
  feed(evaluator, train.images, train.labels)
  assert evaluator.result()["label_accuracy"] == 1.0


def test_duplicates_of_training_images(digits):
  evaluator = DuplicatesEvaluator(*digits.reals, grid=GRID)
  baseline = evaluator.baseline()
  images = flat(digits.test_images), [flat(digits.train_images)]
  distance = nearest_neighbours(*images, 1).distance
  threshold = float(np.quantile(distance, 0.01))
  assert baseline == {
    "exact_duplicates": 0.0,
    "near_duplicates": 6.0,
    "near_duplicate_rate": 6.0 / 540.0,
    "near_threshold": threshold,
  }
  noise = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 1))
  images = np.concatenate([digits.train_images[:15], noise.astype(np.float32)])
  feed(evaluator, images, np.zeros(20, np.int32))
  assert evaluator.result() == {
    "exact_duplicates": 15.0,
    "near_duplicates": 15.0,
    "near_duplicate_rate": 0.75,
    "near_threshold": threshold,
  }


def test_too_many_images_are_refused(monkeypatch, digits, every):
  monkeypatch.setattr(small_sets, "MAX_IMAGES", 1000)
  for evaluator in every:
    part = digits.train_images[:600], digits.train_labels[:600]
    feed(evaluator, *part)
    with pytest.raises(ValueError, match="1200 generated.*at most 1000"):
      feed(evaluator, *part)
  train, test = digits.reals
  # Only those that stand in for generated images count, and they are read.
  coverage_evaluator(digits)
  with pytest.raises(ValueError, match="coverage: 1010 training.*at most 1000"):
    coverage_evaluator(digits, labels=labels_of(101))
  with pytest.raises(ValueError, match="accuracy: 1257 training.*at most 1000"):
    LabelAccuracyEvaluator(train, test)
  monkeypatch.setattr(small_sets, "MAX_IMAGES", 1257)
  more = ImageSet(
    np.concatenate([train.images, train.images[:1]]),
    np.concatenate([train.labels, train.labels[:1]]),
  )
  with pytest.raises(ValueError, match="accuracy: 1258 held-out.*at most 1257"):
    LabelAccuracyEvaluator(train, more)


def test_bad_settings(digits):
  with pytest.raises(ValueError, match="k = 540 .*1 to 539"):
    coverage_evaluator(digits, k=540)
  with pytest.raises(ValueError, match="class 0 has"):
    coverage_evaluator(digits, labels=labels_of(500))
  train, test = digits.reals
  with pytest.raises(ValueError, match="have 64 values.*32"):
    LabelAccuracyEvaluator(train, ImageSet(test.images[:, :4], test.labels))
  with pytest.raises(ValueError, match="at least 2 classes"):
    LabelAccuracyEvaluator(
      ImageSet(train.images, np.zeros_like(train.labels)), test
    )

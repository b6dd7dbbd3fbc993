import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.metrics import small_sets
from drift_jax.metrics.coverage import duplicates
from drift_jax.metrics.evaluators import Evaluator, class_subset
from drift_jax.metrics.small_sets import (
  DuplicatesEvaluator,
  LabelAccuracyEvaluator,
)
from drift_jax.system import devices
from drift_jax.system.errors import EvaluationError
from tests.metrics.conftest import GRID, ImageSet, feed, labels_of


def flat(images):
  return np.asarray(images).reshape(len(images), -1)


def near_copies(train, test):
  return DuplicatesEvaluator(train, test, grid=GRID)


EVERY = [LabelAccuracyEvaluator, near_copies]


@pytest.fixture(scope="module")
def stand_in(digits):
  """54 training images of each class: what a perfect memory would draw."""
  chosen = class_subset(digits.train_labels, labels_of(54), seed=1)
  return digits.train_images[chosen], digits.train_labels[chosen]


@pytest.mark.parametrize("build", EVERY)
def test_evaluators_forget_on_reset_and_join_batches(digits, stand_in, build):
  images, labels = stand_in
  evaluator = build(*digits.reals)
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


def test_label_accuracy_is_that_of_a_classifier_of_reals(digits):
  train, test = digits.reals
  wrong = ImageSet(test.images, (test.labels + 1) % 10)
  evaluator = LabelAccuracyEvaluator(train, test)
  assert evaluator.baseline()["label_accuracy"] >= 0.985
  feed(evaluator, test.images, wrong.labels)
  assert evaluator.result()["label_accuracy"] < 0.01
  # It learns nothing from held-out images.
  evaluator = LabelAccuracyEvaluator(train, wrong)
  assert evaluator.baseline()["label_accuracy"] < 0.01
  feed(evaluator, train.images, train.labels)
  assert evaluator.result()["label_accuracy"] == 1.0


def test_duplicates_of_training_images(digits):
  evaluator = near_copies(*digits.reals)
  train, test = flat(digits.train_images), flat(digits.test_images)
  assert evaluator.baseline() == duplicates(test, train, test, grid=GRID)
  feed(evaluator, digits.train_images[:15], np.zeros(15, np.int32))
  result = evaluator.result()
  assert result == duplicates(train[:15], train, test, grid=GRID)
  assert result["exact_duplicates"] == result["near_duplicates"] == 15.0


@pytest.mark.parametrize("build", EVERY)
def test_too_many_images_are_refused(monkeypatch, digits, build):
  train, test = digits.reals
  evaluator = build(train, test)
  monkeypatch.setattr(small_sets, "MAX_IMAGES", 1000)
  feed(evaluator, train.images[:600], train.labels[:600])
  with pytest.raises(EvaluationError, match="1200 generated.*at most 1000"):
    feed(evaluator, train.images[:600], train.labels[:600])
  with pytest.raises(EvaluationError, match="1257 held-out.*at most 1000"):
    build(test, train)
  with pytest.raises(EvaluationError, match="1257 training.*at most 1000"):
    build(train, test)


class Unread(ImageSet):
  """Of which one image may be looked at."""

  def fixed(self, indices):
    assert len(indices) == 1
    return super().fixed(indices)


@pytest.mark.parametrize("build", EVERY)
def test_too_large_images_are_refused(monkeypatch, digits, build):
  """Before they are read, and while they are generated."""
  train, test = digits.reals
  monkeypatch.setattr(devices, "machine_memory", lambda: 2 * 12 * 1257 * 64)
  evaluator = build(train, test)
  feed(evaluator, train.images, train.labels)
  with pytest.raises(EvaluationError, match="1258 generated images of 64 val"):
    feed(evaluator, train.images[:1], train.labels[:1])
  monkeypatch.setattr(devices, "machine_memory", lambda: 2 * 12 * 540 * 64 - 1)
  with pytest.raises(EvaluationError, match="540 held-out images of 64 values"):
    build(train, Unread(test.images, test.labels))


def test_bad_settings(digits):
  train, test = digits.reals
  with pytest.raises(ValueError, match="have 64 values.*32"):
    near_copies(train, ImageSet(test.images[:, :4], test.labels))
  alike = ImageSet(train.images, np.zeros_like(train.labels))
  with pytest.raises(ValueError, match="at least 2 classes"):
    LabelAccuracyEvaluator(alike, test)

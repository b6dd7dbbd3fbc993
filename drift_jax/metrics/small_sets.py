"""Evaluators for small data sets, which keep every image in memory.

They compare all pairs of images or fit a kernel classifier, in time that grows
with the square of the counts: each refuses more than MAX_IMAGES training,
held-out or generated images, and images too large to keep so many of.
"""

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from drift_jax.metrics import memory
from drift_jax.metrics.batches import Batch
from drift_jax.metrics.coverage import (
  check_grid,
  check_neighbours,
  density_coverage,
  duplicates,
)
from drift_jax.metrics.errors import EvaluationError
from drift_jax.metrics.evaluators import (
  Reals,
  check_labels,
  check_reals,
  class_subset,
)
from drift_jax.system import processes

MAX_IMAGES = 10_000
# Each value is kept as float32, and classifiers copy it as float64.
_BYTES = 12


def _check_size(
  count: int, shape: tuple[int, ...], what: str, name: str
) -> None:
  """Raises EvaluationError for more images of a shape than can be kept."""
  if count > MAX_IMAGES:
    raise EvaluationError(
      f"{name}: {count} {what} images; this evaluator is for small data sets"
      f" and takes at most {MAX_IMAGES}"
    )
  values = math.prod(shape)
  memory.check_fits(
    _BYTES * count * values,
    f"{name}: {count} {what} images of {values} values are kept in {_BYTES}"
    " bytes for each value",
  )


def _flat(
  reals: Reals, what: str, name: str, indices: np.ndarray | None = None
) -> np.ndarray:
  """Images [N, H, W, C], all or those of the indices, as [N, H W C]."""
  if indices is None:
    indices = np.arange(len(reals.labels))
  shape = np.shape(reals.fixed(indices[:1]))[1:]
  _check_size(len(indices), shape, what, name)
  images = np.asarray(reals.fixed(indices), np.float32)
  return images.reshape(len(images), -1)


def _flat_reals(
  train: Reals, test: Reals, name: str
) -> tuple[np.ndarray, np.ndarray]:
  """All training and held-out images as [N, H W C], checked."""
  check_reals(train, test, name)
  flat = _flat(train, "training", name), _flat(test, "held-out", name)
  if flat[0].shape[1:] != flat[1].shape[1:]:
    raise ValueError(
      f"{name}: training images have {flat[0].shape[1]} values, held-out ones"
      f" {flat[1].shape[1]}"
    )
  return flat


class _KeepsImages:
  """The part of these evaluators that collects what was generated."""

  name: str

  def __init__(self, name: str):
    self.name = name
    self.reset()

  def reset(self) -> None:
    self._kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

  def update(self, batch: Batch) -> None:
    self._kept.append((batch.images, batch.labels, batch.index))
    # Of this process: no more are kept than the limit.
    count = sum(len(index) for _, _, index in self._kept)
    self._check(count, batch.images)

  def _check(self, count: int, images: np.ndarray) -> None:
    _check_size(count, images.shape[1:], "generated", self.name)

  def _generated(self) -> tuple[np.ndarray, np.ndarray]:
    """(images [N, H W C], labels [N]) of all processes since reset, in order.

    Every process gets them all: there are few.
    """
    if not self._kept:
      raise ValueError(f"{self.name}: no images since reset()")
    own = [np.concatenate(part) for part in zip(*self._kept, strict=True)]
    images, labels, index = (np.concatenate(processes.gather(x)) for x in own)
    self._check(len(index), images)
    order = np.argsort(index, kind="stable")
    return images[order].reshape(len(order), -1), labels[order]


class CoverageEvaluator(_KeepsImages):
  """`density` and `coverage` (`density_coverage`) against held-out reals.

  Raw pixels are the features. For small data sets: keeps all images and takes
  at most MAX_IMAGES of each kind.
  """

  def __init__(
    self,
    train: Reals,
    test: Reals,
    *,
    k: int,
    labels: np.ndarray,
    seed: int,
  ):
    """Reads the images that it compares.

    Args:
      train: reals that stand in for generated images in the baseline.
      test: held-out reals, the reference.
      k: neighbours that set the radius around a held-out image.
      labels: [M] integers, those of the images that will be generated.
      seed: picks the training images of the baseline.

    Raises:
      ValueError: for empty, ill-matched or too many images, too few training
        images of a class, or k out of range.
    """
    super().__init__("coverage")
    check_reals(train, test, self.name)
    chosen = class_subset(train.labels, labels, seed)
    self._stand_in = _flat(train, "training", self.name, chosen)
    self._test = _flat(test, "held-out", self.name)
    check_neighbours(k, len(self._test))
    self._wanted = np.asarray(labels)
    self._k = k

  def result(self) -> dict[str, float]:
    images, labels = self._generated()
    check_labels(labels, self._wanted, self.name)
    return self._figures(images)

  def baseline(self) -> dict[str, float]:
    return dict(self._baseline)

  @functools.cached_property
  def _baseline(self) -> dict[str, float]:
    return self._figures(self._stand_in)

  def _figures(self, images: np.ndarray) -> dict[str, float]:
    density, coverage = density_coverage(self._test, images, self._k)
    return {"density": density, "coverage": coverage}


class LabelAccuracyEvaluator(_KeepsImages):
  """`label_accuracy`: how often a classifier sees the label asked for.

  The classifier is scikit-learn's SVC (Gaussian kernel, C = 10, deterministic),
  fitted to the pixels of the real training images only; the baseline is its
  accuracy on the held-out reals. A generator that draws only class means scores
  1: read it beside coverage. For small data sets: takes at most MAX_IMAGES.
  """

  def __init__(
    self,
    train: Reals,
    test: Reals,
  ):
    """Reads all images.

    Raises:
      ValueError: for empty, ill-matched or too many images, or training images
        of a single class.
    """
    super().__init__("label_accuracy")
    self._train, self._test = _flat_reals(train, test, self.name)
    self._train_labels = np.asarray(train.labels)
    self._test_labels = np.asarray(test.labels)
    if len(np.unique(self._train_labels)) < 2:
      raise ValueError(
        f"{self.name}: a classifier needs at least 2 classes, the training"
        f" labels hold only {np.unique(self._train_labels)}"
      )

  def result(self) -> dict[str, float]:
    return self._figures(*self._generated())

  def baseline(self) -> dict[str, float]:
    return dict(self._baseline)

  @functools.cached_property
  def _classifier(self) -> Any:
    # Imported where it is used: a second.
    from sklearn import svm

    return svm.SVC(C=10.0, gamma="scale").fit(self._train, self._train_labels)

  @functools.cached_property
  def _baseline(self) -> dict[str, float]:
    return self._figures(self._test, self._test_labels)

  def _figures(
    self, images: np.ndarray, labels: np.ndarray
  ) -> dict[str, float]:
    predicted = self._classifier.predict(images)
    return {"label_accuracy": float(np.mean(predicted == labels))}


class DuplicatesEvaluator(_KeepsImages):
  """Copies of training images among the generated (`duplicates`).

  Figures: exact_duplicates and near_duplicates (counts), near_duplicate_rate
  (near_duplicates over the number of images) and near_threshold (Euclidean
  distance in pixels of [-1, 1]). The baseline counts the held-out reals: real
  training images in place of generated ones would all be copies of themselves.
  For small data sets: takes at most MAX_IMAGES of each kind.
  """

  def __init__(
    self,
    train: Reals,
    test: Reals,
    *,
    grid: ArrayLike,
  ):
    """Reads all images.

    Args:
      train: what must not be copied.
      test: held-out reals.
      grid: [G] ascending values that a pixel of the data can take.

    Raises:
      ValueError: for empty, ill-matched or too many images, or a grid that does
        not ascend.
    """
    super().__init__("duplicates")
    self._train, self._test = _flat_reals(train, test, self.name)
    self._grid = check_grid(grid)

  def result(self) -> dict[str, float]:
    images, _ = self._generated()
    counts = duplicates(images, self._train, self._test, grid=self._grid)
    return {
      "exact_duplicates": counts["exact"],
      "near_duplicates": counts["near"],
      "near_duplicate_rate": counts["near"] / counts["count"],
      "near_threshold": counts["threshold"],
    }

  def baseline(self) -> dict[str, float]:
    return dict(self._baseline)

  @functools.cached_property
  def _baseline(self) -> dict[str, float]:
    counts = duplicates(self._test, self._train, self._test, grid=self._grid)
    return {
      "exact_duplicates": counts["heldout_exact"],
      "near_duplicates": counts["heldout_near"],
      "near_duplicate_rate": counts["heldout_near"] / counts["heldout_count"],
      "near_threshold": counts["threshold"],
    }

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

from drift_jax.metrics.batches import Batch
from drift_jax.metrics.coverage import duplicates
from drift_jax.metrics.evaluators import Figures, Reals
from drift_jax.system import devices, processes
from drift_jax.system.errors import EvaluationError

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
      f" and takes at most {MAX_IMAGES}: leave it out of eval.metrics"
    )
  values = math.prod(shape)
  devices.check_fits(
    _BYTES * count * values,
    f"{name}: {count} {what} images of {values} values are kept in {_BYTES}"
    " bytes for each value",
    "leave it out of eval.metrics",
  )


class _SmallSet:
  """Base of these evaluators: reads reals, keeps what was generated.

  Subclasses define `_figures(images [N, H W C], labels [N])`. The held-out
  images take the place of generated ones in the baseline.
  """

  def __init__(self, name: str, test: Reals):
    self.name = name
    self._test = self._read(test, "held-out", np.arange(len(test.labels)))
    self._labels = np.asarray(test.labels)
    self.reset()

  def _read(self, reals: Reals, what: str, indices: np.ndarray) -> np.ndarray:
    """Images [N, H W C] of the indices."""
    shape = np.shape(reals.fixed(indices[:1]))[1:]
    _check_size(len(indices), shape, what, self.name)
    images = np.asarray(reals.fixed(indices), np.float32)
    return images.reshape(len(images), -1)

  def _read_all(self, train: Reals) -> np.ndarray:
    """All training images [N, H W C], checked against the held-out ones."""
    images = self._read(train, "training", np.arange(len(train.labels)))
    if images.shape[1] != self._test.shape[1]:
      raise ValueError(
        f"{self.name}: training images have {images.shape[1]} values, held-out"
        f" ones {self._test.shape[1]}"
      )
    return images

  def reset(self) -> None:
    self._kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

  def update(self, batch: Batch) -> None:
    self._kept.append((batch.images, batch.labels, batch.index))
    # This process keeps no more than the limit.
    count = sum(len(index) for _, _, index in self._kept)
    _check_size(count, batch.images.shape[1:], "generated", self.name)

  def result(self) -> Figures:
    """Figures of the images of all processes since reset: there are few."""
    if not self._kept:
      raise ValueError(f"{self.name}: no images since reset()")
    local = [np.concatenate(part) for part in zip(*self._kept, strict=True)]
    images, labels, index = (np.concatenate(processes.gather(x)) for x in local)
    _check_size(len(index), images.shape[1:], "generated", self.name)
    order = np.argsort(index, kind="stable")
    return self._figures(images[order].reshape(len(order), -1), labels[order])

  def baseline(self) -> Figures:
    return dict(self._baseline)

  @functools.cached_property
  def _baseline(self) -> Figures:
    return self._figures(self._test, self._labels)

  def _figures(self, images: np.ndarray, labels: np.ndarray) -> Figures:
    raise NotImplementedError


class LabelAccuracyEvaluator(_SmallSet):
  """`label_accuracy`: how often a classifier sees the label asked for.

  The classifier is scikit-learn's SVC (Gaussian kernel, C = 10, deterministic),
  fitted to the pixels of the real training images only; the baseline is its
  accuracy on the held-out reals. A generator that draws only class means scores
  1: read it beside coverage. For small data sets: takes at most MAX_IMAGES.
  """

  def __init__(self, train: Reals, test: Reals):
    """Reads all images.

    Raises:
      ValueError: for empty, ill-matched or too many images, or training images
        of a single class.
    """
    super().__init__("label_accuracy", test)
    self._train = self._read_all(train), np.asarray(train.labels)
    classes = np.unique(self._train[1])
    if len(classes) < 2:
      raise ValueError(
        f"{self.name}: a classifier needs at least 2 classes, the training"
        f" labels hold only {classes}"
      )

  @functools.cached_property
  def _classifier(self) -> Any:
    # Imported at use: it takes a second.
    from sklearn import svm

    return svm.SVC(C=10.0, gamma="scale").fit(*self._train)

  def _figures(self, images: np.ndarray, labels: np.ndarray) -> Figures:
    predicted = self._classifier.predict(images)
    return {"label_accuracy": float(np.mean(predicted == labels))}


class DuplicatesEvaluator(_SmallSet):
  """Copies of training images among the generated: figures of `duplicates`.

  The baseline counts the held-out reals: real training images in place of
  generated ones would all be copies of themselves. Distances are those of
  pixels in [-1, 1]. For small data sets: takes at most MAX_IMAGES of each kind.
  """

  def __init__(self, train: Reals, test: Reals, *, grid: ArrayLike):
    """Reads all images.

    Args:
      train: what must not be copied.
      test: held-out reals.
      grid: [G] ascending values that a pixel of the data can take.

    Raises:
      ValueError: for empty, ill-matched or too many images.
    """
    super().__init__("duplicates", test)
    self._train = self._read_all(train)
    self._grid = grid

  def _figures(self, images: np.ndarray, labels: np.ndarray) -> Figures:
    return duplicates(images, self._train, self._test, grid=self._grid)

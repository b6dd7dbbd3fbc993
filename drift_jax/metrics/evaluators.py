"""Evaluators: plug-ins that are fed generated images and report figures."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from drift_jax.metrics.frechet import (
  FeatureStats,
  as_feature_matrix,
  frechet_distance,
)
from drift_jax.metrics.images import Images

FeatureFn = Callable[[np.ndarray], np.ndarray | jax.Array]


@runtime_checkable
class Evaluator(Protocol):
  """What `evaluate` asks of a plug-in.

  Attributes:
    name: names the plug-in in messages.
  """

  name: str

  def reset(self) -> None:
    """Forgets all generated images."""
    ...

  def update(self, images: Images, labels: np.ndarray) -> None:
    """Takes generated images [B, H, W, C] in [-1, 1] and labels [B].

    Exactly the valid ones: padding must have been removed.
    """
    ...

  def result(self) -> dict[str, float]:
    """Figures of all images since reset.

    Raises:
      ValueError: when there are none.
    """
    ...

  def baseline(self) -> dict[str, float]:
    """The same figures with real training images in place of generated ones.

    As many of each class as are generated, against the held-out reals: what a
    perfect generator of this sample count would score. Computed once.
    """
    ...


def merge_figures(
  figures: Iterable[tuple[str, Mapping[str, float]]],
) -> dict[str, float]:
  """Joins (evaluator's name, {figure: value}) pairs into {figure: value}.

  Raises:
    ValueError: when two evaluators report the same figure, naming both.
  """
  merged: dict[str, float] = {}
  owner: dict[str, str] = {}
  for name, values in figures:
    for figure, value in values.items():
      if figure in owner:
        raise ValueError(
          f"evaluators '{owner[figure]}' and '{name}' both report '{figure}'"
        )
      owner[figure] = name
      merged[figure] = float(value)
  return merged


def baselines(evaluators: Sequence[Evaluator]) -> dict[str, float]:
  """Baseline figures of all evaluators, joined as `evaluate` joins results."""
  return merge_figures(
    (evaluator.name, evaluator.baseline()) for evaluator in evaluators
  )


def class_subset(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
  """Indices of per_class samples of each class, drawn without replacement.

  Args:
    labels: [N] integers.
    per_class: samples of each class that occurs, >= 1.
    seed: fixes the draw.

  Returns:
    [classes * per_class] indices in ascending order of class.

  Raises:
    ValueError: when a class has fewer samples, naming it and its count.
  """
  labels = np.asarray(labels)
  if per_class < 1 or not labels.size:
    raise ValueError(
      f"cannot draw per_class={per_class} of {labels.size} labels"
    )
  random = np.random.default_rng(seed)
  chosen = []
  for label in np.unique(labels):
    members = np.flatnonzero(labels == label)
    if len(members) < per_class:
      raise ValueError(
        f"class {label} has {len(members)} training images, fewer than"
        f" the {per_class} generated per class that they stand in for"
      )
    chosen.append(random.permutation(members)[:per_class])
  return np.concatenate(chosen)


def check_images(images: Images, labels: np.ndarray, name: str) -> np.ndarray:
  """Returns images as float32 [N, H, W, C] on the host.

  Raises:
    ValueError: when there are none, or not one label for each.
  """
  array = np.asarray(jax.device_get(images)).astype(np.float32)
  if array.ndim != 4 or 0 in array.shape or np.shape(labels) != array.shape[:1]:
    raise ValueError(
      f"{name}: need non-empty images [N, H, W, C] and labels [N], got shapes"
      f" {array.shape} and {np.shape(labels)}"
    )
  return array


def check_per_class(
  labels: np.ndarray, classes: np.ndarray, per_class: int, name: str
) -> None:
  """Refuses generated counts that the baseline does not stand for.

  Frechet distance, density and coverage depend on how many images there are, so
  a baseline of another count would mislead.

  Raises:
    ValueError: when one of `classes` does not have per_class images, or another
      class has some.
  """
  for label in np.union1d(labels, classes):
    count = np.count_nonzero(labels == label)
    wanted = per_class if label in classes else 0
    if count != wanted:
      raise ValueError(
        f"{name}: {count} generated images of class {label}, but the baseline"
        f" is for {wanted} (per_class={per_class} of {len(classes)} classes)"
      )


class FrechetEvaluator:
  """Frechet distance to held-out reals in one feature space.

  Reports one figure under its own name, `frechet_distance` between all
  generated and all held-out images; the baseline is that between per_class
  training images of each class and the held-out ones. Statistics are streamed:
  no image is kept.
  """

  def __init__(
    self,
    name: str,
    feature_fn: FeatureFn,
    train_images: Images,
    train_labels: np.ndarray,
    test_images: Images,
    test_labels: np.ndarray,
    *,
    per_class: int,
    batch_size: int,
    seed: int,
  ):
    """Keeps references; features are computed when first needed.

    Args:
      name: `fd_` and the feature space, e.g. `fd_encoder`, `fd_pixel`. FID is
        reserved for Inception-v3 features.
      feature_fn: images [batch_size, H, W, C] float32 in [-1, 1] -> features
        [batch_size, D]. Always called with full batches: jit it.
      train_images: [N, H, W, C] in [-1, 1].
      train_labels: [N] integers.
      test_images: [M, H, W, C] held-out reals.
      test_labels: [M] integers.
      per_class: images of each class that will be generated.
      batch_size: images per call of feature_fn.
      seed: picks the training images of the baseline.

    Raises:
      ValueError: for a reserved name, empty or ill-matched images, too few
        training images of a class, or batch_size < 1.
    """
    if not name.startswith("fd_") or "fid" in name.lower():
      raise ValueError(
        f"a Frechet evaluator cannot be named '{name}': its name starts with"
        " 'fd_' (e.g. 'fd_encoder', 'fd_pixel'), and 'fid' is reserved for"
        " Inception-v3 features"
      )
    if batch_size < 1:
      raise ValueError(f"{name}: batch_size must be >= 1, got {batch_size}")
    self.name = name
    self._feature_fn = feature_fn
    self._batch_size = batch_size
    self._per_class = per_class
    self._classes = np.unique(train_labels)
    self._test_images = check_images(test_images, test_labels, name)
    train = check_images(train_images, train_labels, name)
    self._stand_in = train[class_subset(train_labels, per_class, seed)]
    self.reset()

  def reset(self) -> None:
    self._stats: FeatureStats | None = None
    self._labels: list[np.ndarray] = []

  def update(self, images: Images, labels: np.ndarray) -> None:
    stats = self._statistics(check_images(images, labels, self.name))
    self._stats = stats if self._stats is None else self._stats.merge(stats)
    self._labels.append(np.asarray(labels))

  def result(self) -> dict[str, float]:
    if self._stats is None:
      raise ValueError(f"{self.name}: no images since reset()")
    labels = np.concatenate(self._labels)
    check_per_class(labels, self._classes, self._per_class, self.name)
    return {self.name: frechet_distance(self._stats, self._reference)}

  def baseline(self) -> dict[str, float]:
    return {self.name: self._baseline}

  @functools.cached_property
  def _reference(self) -> FeatureStats:
    return self._statistics(self._test_images)

  @functools.cached_property
  def _baseline(self) -> float:
    return frechet_distance(self._statistics(self._stand_in), self._reference)

  def _statistics(self, images: np.ndarray) -> FeatureStats:
    """Statistics of features, computed in batches of one compiled shape."""
    stats = None
    for start in range(0, len(images), self._batch_size):
      index = np.arange(start, start + self._batch_size)
      batch = images[np.minimum(index, len(images) - 1)]
      features = np.asarray(jax.device_get(self._feature_fn(batch)))
      if features.ndim != 2 or len(features) != self._batch_size:
        raise ValueError(
          f"{self.name}: feature_fn must return [{self._batch_size}, D], got"
          f" shape {features.shape}"
        )
      part = FeatureStats.from_features(
        as_feature_matrix(
          features[: len(images) - start], f"{self.name} features"
        )
      )
      stats = part if stats is None else stats.merge(part)
    assert stats is not None  # check_images refuses empty sets
    return stats

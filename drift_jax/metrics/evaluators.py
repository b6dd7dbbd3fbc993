"""Evaluators: plug-ins that are fed generated images and report figures."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


@runtime_checkable
class Reals(Protocol):
  """Real images that are read when they are needed.

  Attributes:
    labels: [N] integers.
  """

  @property
  def labels(self) -> np.ndarray: ...

  def fixed(self, indices: np.ndarray) -> np.ndarray:
    """Images [n, H, W, C] float32 of the given numbers, always the same."""
    ...


def class_subset(
  labels: np.ndarray, wanted: np.ndarray, seed: int
) -> np.ndarray:
  """Indices of as many samples of each class as `wanted` holds labels of it.

  Args:
    labels: [N] integers, what there is.
    wanted: [M] integers, what is to be stood in for.
    seed: fixes the draw, which is without replacement.

  Returns:
    [M] indices in ascending order of class.

  Raises:
    ValueError: when a class has fewer samples, naming it and its count.
  """
  labels, wanted = np.asarray(labels), np.asarray(wanted)
  if not wanted.size or not labels.size:
    raise ValueError(
      f"cannot draw samples for {wanted.size} labels from {labels.size}"
    )
  random = np.random.default_rng(seed)
  chosen = []
  for label, count in zip(*np.unique(wanted, return_counts=True), strict=True):
    members = np.flatnonzero(labels == label)
    if len(members) < count:
      raise ValueError(
        f"class {label} has {len(members)} training images, fewer than"
        f" the {count} generated ones that they stand in for"
      )
    chosen.append(random.permutation(members)[:count])
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


def check_reals(train: Reals, test: Reals, name: str) -> None:
  """Refuses empty sets.

  Raises:
    ValueError: naming the evaluator and the set.
  """
  for kind, reals in (("training", train), ("held-out", test)):
    if not len(reals.labels):
      raise ValueError(f"{name}: there are no {kind} images")


def check_labels(labels: np.ndarray, wanted: np.ndarray, name: str) -> None:
  """Refuses generated counts that the baseline does not stand for.

  Frechet distance, density and coverage depend on how many images there are, so
  a baseline of another count would mislead.

  Raises:
    ValueError: when a class has more or fewer labels than in `wanted`.
  """
  for label in np.union1d(labels, wanted):
    count = np.count_nonzero(labels == label)
    expected = np.count_nonzero(wanted == label)
    if count != expected:
      raise ValueError(
        f"{name}: {count} generated images of class {label}, but the baseline"
        f" is for {expected}"
      )


class FrechetEvaluator:
  """Frechet distance to held-out reals in one feature space.

  Reports one figure under its own name, `frechet_distance` between all
  generated and all held-out images; the baseline is that between as many
  training images of each class and the held-out ones. Statistics are streamed:
  no image is kept.
  """

  def __init__(
    self,
    name: str,
    feature_fn: FeatureFn,
    train: Reals,
    test: Reals,
    *,
    labels: np.ndarray,
    batch_size: int,
    seed: int,
  ):
    """Keeps references; images are read when first needed.

    Args:
      name: `fd_` and the feature space, e.g. `fd_encoder`, `fd_pixel`. FID is
        reserved for Inception-v3 features.
      feature_fn: images [batch_size, H, W, C] float32 in [-1, 1] -> features
        [batch_size, D]. Always called with full batches: jit it.
      train: real images that stand in for generated ones in the baseline.
      test: held-out reals, the reference.
      labels: [M] integers, those of the images that will be generated.
      batch_size: images per call of feature_fn.
      seed: picks the training images of the baseline.

    Raises:
      ValueError: for a reserved name, no images, too few training images of a
        class, or batch_size < 1.
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
    check_reals(train, test, name)
    self._wanted = np.asarray(labels)
    self._train, self._test = train, test
    self._stand_in = class_subset(train.labels, labels, seed)
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
    check_labels(labels, self._wanted, self.name)
    return {self.name: frechet_distance(self._stats, self._reference)}

  def baseline(self) -> dict[str, float]:
    return {self.name: self._baseline}

  @functools.cached_property
  def _reference(self) -> FeatureStats:
    return self._statistics_of(self._test, np.arange(len(self._test.labels)))

  @functools.cached_property
  def _baseline(self) -> float:
    stand_in = self._statistics_of(self._train, self._stand_in)
    return frechet_distance(stand_in, self._reference)

  def _statistics_of(self, reals: Reals, indices: np.ndarray) -> FeatureStats:
    """Statistics of real images, read batch by batch."""
    return _merged(
      self._statistics(
        check_images(reals.fixed(part), reals.labels[part], self.name)
      )
      for part in _parts(indices, self._batch_size)
    )

  def _statistics(self, images: np.ndarray) -> FeatureStats:
    """Statistics of features, computed in batches of one compiled shape."""
    return _merged(
      self._batch_statistics(images, part)
      for part in _parts(np.arange(len(images)), self._batch_size)
    )

  def _batch_statistics(
    self, images: np.ndarray, part: np.ndarray
  ) -> FeatureStats:
    filled = np.resize(part, self._batch_size)
    features = np.asarray(jax.device_get(self._feature_fn(images[filled])))
    if features.ndim != 2 or len(features) != self._batch_size:
      raise ValueError(
        f"{self.name}: feature_fn must return [{self._batch_size}, D], got"
        f" shape {features.shape}"
      )
    return FeatureStats.from_features(
      as_feature_matrix(features[: len(part)], f"{self.name} features")
    )


def _parts(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
  for start in range(0, len(indices), size):
    yield indices[start : start + size]


def _merged(parts: Iterable[FeatureStats]) -> FeatureStats:
  """All parts in one; there is at least one."""
  return functools.reduce(lambda total, part: total.merge(part), parts)

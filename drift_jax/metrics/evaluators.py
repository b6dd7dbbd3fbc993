"""Evaluators: plug-ins that are fed generated images and report figures."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from drift_jax.metrics import frechet
from drift_jax.metrics.batches import Batch, OneLate, local_batches, one_late
from drift_jax.metrics.images import Images
from drift_jax.system import sharding
from drift_jax.system.errors import EvaluationError

FeatureFn = Callable[[Images], Images]
# {name of a figure: value}.
Figures = dict[str, float]


@runtime_checkable
class Evaluator(Protocol):
  """Plug-in of `evaluate`: takes generated images, reports figures.

  Attributes:
    name: names the plug-in in messages.
  """

  name: str

  def reset(self) -> None:
    """Forgets all generated images."""
    ...

  def update(self, batch: Batch) -> None:
    """Takes generated samples; of several processes, all take each batch."""
    ...

  def result(self) -> Figures:
    """Figures of all samples of all processes since reset.

    Raises:
      ValueError: when there are none.
    """
    ...

  def baseline(self) -> Figures:
    """The same figures with real training images in place of generated ones.

    As many of each class as are generated, against the held-out reals: the
    score of a perfect generator of this sample count. Computed once; empty if
    it would cost too much.
    """
    ...


def merge_figures(
  figures: Iterable[tuple[str, Mapping[str, float]]],
) -> Figures:
  """Joins (evaluator's name, {figure: value}) pairs into {figure: value}.

  Raises:
    EvaluationError: a value that is not finite, naming both.
  """
  merged: Figures = {}
  for name, values in figures:
    for figure, value in values.items():
      if not math.isfinite(value):
        raise EvaluationError(f"evaluator '{name}' finds {figure} = {value}")
      merged[figure] = float(value)
  return merged


def baselines(evaluators: Sequence[Evaluator]) -> Figures:
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
  labels: np.ndarray,
  wanted: np.ndarray,
  seed: int,
  key: str = "eval.num_samples",
) -> np.ndarray:
  """Indices of as many samples of each class as `wanted` holds labels of it.

  Args:
    labels: [N] integers, class of each sample.
    wanted: [M > 0] integers, class of each sample to stand in for.
    seed: fixes the draw, which is without replacement.
    key: of the config that says how many are wanted, for the message.

  Returns:
    [M] indices in ascending order of class.

  Raises:
    ValueError: when a class has fewer samples, naming it and its count.
  """
  random = np.random.default_rng(seed)
  classes, counts = np.unique(wanted, return_counts=True)
  members = [np.flatnonzero(labels == label) for label in classes]
  fewest = min(map(len, members))
  for label, count, there in zip(classes, counts, members, strict=True):
    if len(there) < count:
      fitting = f"set {key}={fewest * len(classes)}, " * (fewest > 0)
      raise ValueError(
        f"class {label} has {len(there)} training images, fewer than"
        f" the {count} generated ones that they stand in for: {fitting}hold out"
        f" fewer (data.held_out=0.1 suits classes of any size with {key}=0), or"
        " add images"
      )
  return np.concatenate(
    [
      random.permutation(there)[:count]
      for count, there in zip(counts, members, strict=True)
    ]
  )


def features_of(
  feature_fn: FeatureFn,
  read: Callable[[np.ndarray], np.ndarray],
  indices: np.ndarray,
  *,
  batch_size: int,
) -> Iterator[np.ndarray]:
  """Features of real images, batch by batch; the device is never waited for.

  Args:
    feature_fn: this process' part of a batch, on the host, -> features
      [batch_size, D] on the mesh.
    read: indices -> images, e.g. `Reals.fixed`.
    indices: [N] integers, of all processes.
    batch_size: of all processes together.

  Yields:
    [b, D]: those of this process; b may be 0.
  """
  batches = (
    (feature_fn(read(indices[numbers])), valid)
    for numbers, valid in local_batches(len(indices), batch_size)
  )
  for features, valid in one_late(batches):
    yield sharding.local_rows(features)[:valid]


class FrechetEvaluator:
  """Frechet distance to held-out reals in one feature space.

  Reports one figure under its own name, `frechet_distance` between all
  generated and all held-out samples; the baseline is that between as many
  training samples of each class and the held-out ones. Statistics are streamed:
  no sample is kept.
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
    """Keeps references; reals are read when first needed.

    Args:
      name: `fd_` and the feature space, e.g. `fd_encoder`, `fd_pixel`. FID is
        reserved for Inception-v3 features.
      feature_fn: samples [B, H, W, C], on the mesh or this process' part of
        them on the host, -> features [B, D] on the mesh. Always called with
        full batches: jit it.
      train: reals that stand in for generated samples in the baseline.
      test: held-out reals, the reference.
      labels: [M] integers, those of the samples that will be generated.
      batch_size: reals per call of feature_fn, of all processes together.
      seed: picks the training samples of the baseline.

    Raises:
      ValueError: too few training samples of a class.
    """
    self.name = name
    self._feature_fn = feature_fn
    self._batch_size = batch_size
    self._train, self._test = train, test
    self._stand_in = class_subset(train.labels, labels, seed)
    self.reset()

  def reset(self) -> None:
    self._stats = frechet.FeatureStream()
    self._late = OneLate(lambda batch, rows: self._stats.update(rows[0]))

  def update(self, batch: Batch) -> None:
    self._late.push(batch, self._feature_fn(batch.samples))

  def result(self) -> Figures:
    self._late.flush()
    return {
      self.name: frechet.frechet_distance(self._stats.result(), self._reference)
    }

  def baseline(self) -> Figures:
    return {self.name: self._baseline}

  @functools.cached_property
  def _reference(self) -> frechet.FeatureStats:
    return self._statistics_of(self._test, np.arange(len(self._test.labels)))

  @functools.cached_property
  def _baseline(self) -> float:
    stats = self._statistics_of(self._train, self._stand_in)
    return frechet.frechet_distance(stats, self._reference)

  def _statistics_of(
    self, reals: Reals, indices: np.ndarray
  ) -> frechet.FeatureStats:
    stream = frechet.FeatureStream()
    for features in features_of(
      self._feature_fn, reals.fixed, indices, batch_size=self._batch_size
    ):
      stream.update(features)
    return stream.result()

"""Evaluators: plug-ins that are fed generated images and report figures."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from drift_jax.metrics import frechet
from drift_jax.metrics.batches import Batch, OneLate, local_batches, one_late
from drift_jax.metrics.coverage import density_coverage
from drift_jax.metrics.distances import check_neighbours
from drift_jax.metrics.images import Images
from drift_jax.system import processes, sharding
from drift_jax.system.errors import EvaluationError

FeatureFn = Callable[[Images], Images]
# Samples -> (features [B, D], logits [B, C] if it has any), on the mesh.
JudgeFn = Callable[[Images], tuple[Images, ...]]
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
    key: config key that sets how many are wanted; the message names it.

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
  feature_fn: Callable[[Images], Any],
  read: Callable[[np.ndarray], np.ndarray],
  indices: np.ndarray,
  *,
  batch_size: int,
) -> Iterator[Any]:
  """Features of real images, batch by batch; the device is never waited for.

  Args:
    feature_fn: this process' part of a batch, on the host, -> features
      [batch_size, D] on the mesh, or several such arrays.
    read: indices -> images, e.g. `Reals.fixed`.
    indices: [N] integers, of all processes.
    batch_size: of all processes together.

  Yields:
    [b, D]: those of this process, or several; b may be 0.
  """
  batches = (
    (feature_fn(read(indices[numbers])), valid)
    for numbers, valid in local_batches(len(indices), batch_size)
  )
  for features, valid in one_late(batches):
    yield jax.tree.map(lambda x, n=valid: sharding.local_rows(x)[:n], features)


class _Seen:
  """What figures need of a set of images, from batches of their features."""

  def __init__(self, figures: Sequence[str]):
    self.stats = frechet.FeatureStream()
    self._streams = any(name.startswith("fd_") for name in figures)
    self._keeps = any(name.startswith("coverage") for name in figures)
    self._features: list[np.ndarray] = []
    self._right: list[np.ndarray] = []

  def take(self, values: Sequence[np.ndarray], labels: np.ndarray) -> None:
    """Takes (features [b, D], logits [b, C] if there are any) of images."""
    features, *logits = values
    if self._streams:
      self.stats.update(features)
    if self._keeps:
      self._features.append(features.astype(np.float32))
    self._right += [np.argmax(rows, axis=1) == labels for rows in logits]

  def features(self) -> np.ndarray:
    """[N, D] of all processes."""
    return _of_all(self._features)

  def accuracy(self) -> float:
    """The share of labels that the logits see."""
    return float(np.mean(_of_all(self._right)))


def _of_all(parts: Sequence[np.ndarray]) -> np.ndarray:
  """The rows of all processes; ValueError if there are none."""
  joined = processes.gather(np.concatenate(parts)) if parts else []
  if not sum(map(len, joined)):
    raise ValueError("no features were given")
  return np.concatenate(joined)


class FeatureEvaluator:
  """Figures of generated and held-out images in the features of one network.

  The network sees each image once. The baseline has as many training images of
  each class in the place of generated ones. For a Frechet distance statistics
  are streamed; for coverage features are kept, 4 D bytes for each image.
  """

  def __init__(
    self,
    name: str,
    network: JudgeFn,
    figures: Sequence[str],
    train: Reals,
    test: Reals,
    *,
    labels: np.ndarray,
    batch_size: int,
    seed: int,
    k: int = 1,
  ):
    """Keeps references; reals are read when first needed.

    Args:
      name: of the evaluator, in messages.
      network: samples [B, H, W, C], on the mesh or this process' part of them
        on the host, -> features [B, D] and, of a classifier, logits, on the
        mesh. Always called with full batches: jit it.
      figures: 'fd_NAME': `frechet_distance` of all samples to all held-out
        images. 'coverageNAME': it and 'densityNAME', see density_coverage.
        Others: how often the logits see the label asked for; the baseline is
        that of the held-out images. FID is reserved for Inception-v3.
      train: reals that stand in for generated samples in the baseline.
      test: held-out reals, the reference.
      labels: [M] integers, those of the samples that will be generated.
      batch_size: reals per call of the network, of all processes together.
      seed: picks the training samples of the baseline.
      k: neighbours that set the radius around a held-out image.

    Raises:
      ValueError: too few training samples of a class, or k out of range.
    """
    self.name = name
    self._network = network
    self._figures = tuple(figures)
    self._batch_size = batch_size
    self._train, self._test = train, test
    self._stand_in = class_subset(train.labels, labels, seed)
    self._k = k
    if any(figure.startswith("coverage") for figure in figures):
      check_neighbours(k, len(test.labels), "real")
    self.reset()

  def reset(self) -> None:
    self._seen = _Seen(self._figures)
    self._late = OneLate(
      lambda batch, values: self._seen.take(values, batch.labels)
    )

  def update(self, batch: Batch) -> None:
    self._late.push(batch, *self._network(batch.samples))

  def result(self) -> Figures:
    self._late.flush()
    return self._compare(self._seen, self._seen)

  def baseline(self) -> Figures:
    return dict(self._baseline)

  @functools.cached_property
  def _reference(self) -> _Seen:
    return self._see(self._test, np.arange(len(self._test.labels)))

  @functools.cached_property
  def _baseline(self) -> Figures:
    stand_in = self._see(self._train, self._stand_in)
    return self._compare(stand_in, self._reference)

  def _compare(self, seen: _Seen, classified: _Seen) -> Figures:
    """All figures; accuracy is that of the images that were `classified`."""
    results: Figures = {}
    for figure in self._figures:
      if figure.startswith("fd_"):
        results[figure] = frechet.frechet_distance(
          seen.stats.result(), self._statistics
        )
      elif figure.startswith("coverage"):
        pair = density_coverage(self._real, seen.features(), self._k)
        names = figure.replace("coverage", "density"), figure
        results |= dict(zip(names, pair, strict=True))
      else:
        results[figure] = classified.accuracy()
    return results

  @functools.cached_property
  def _statistics(self) -> frechet.FeatureStats:
    return self._reference.stats.result()

  @functools.cached_property
  def _real(self) -> np.ndarray:
    return self._reference.features()

  def _see(self, reals: Reals, indices: np.ndarray) -> _Seen:
    seen, size = _Seen(self._figures), self._batch_size
    rows = features_of(self._network, reals.fixed, indices, batch_size=size)
    for values, (numbers, valid) in zip(
      rows, local_batches(len(indices), size), strict=True
    ):
      seen.take(values, reals.labels[indices[numbers[:valid]]])
    return seen

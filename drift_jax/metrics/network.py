"""Figures in the features of an evaluation network, against a reference file.

FID, Inception score, precision and recall, KID, density and coverage of
Inception-v3 (arXiv:2602.04770, section 5.2); Frechet distances of others.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from drift_jax.metrics.batches import Batch, OneLate
from drift_jax.metrics.coverage import density_coverage, precision_recall
from drift_jax.metrics.evaluators import Figures
from drift_jax.metrics.frechet import FeatureStream, frechet_distance
from drift_jax.metrics.inception import InceptionScore
from drift_jax.metrics.kid import kernel_distance, kernel_distance_subsets
from drift_jax.metrics.reference import ReferenceStats
from drift_jax.system import processes

# 8-bit RGB images [B, H, W, 3] on the mesh -> features [B, D] and, of a
# classifier, logits [B, C].
NetworkFn = Callable[[jax.Array], tuple[jax.Array, ...]]

# Figures that keep the features of all samples, and compare them with those of
# single real images.
FROM_FEATURES = ("precision_recall", "kid", "coverage_inception")
# How many samples and single real images figures need at least, if more than
# the two of a covariance.
LEAST = {
  "inception_score": (10, 0),
  "precision_recall": (4, 4),
  "kid": (2, 2),
  "coverage_inception": (1, 6),
}
# As papers report them.
SPLITS = 10
NEIGHBOURS = 3
COVERAGE_NEIGHBOURS = 5
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


def check_singles(name: str, figures: Sequence[str], there: bool) -> None:
  """Raises ValueError if figures lack the features of single real images.

  Args:
    name: of the network.
    figures: of it that are asked for.
    there: whether the reference statistics hold features.
  """
  single = [figure for figure in figures if figure in FROM_FEATURES]
  if single and not there:
    raise ValueError(
      f"{name}: {single} compare with features of single real images, which"
      " the reference statistics do not hold: make them by python -m"
      " drift_jax.tools.reference_stats with --num_features=10000"
    )


class NetworkEvaluator:
  """Figures of the generated images in one network's features and logits.

  The network sees each image once. Statistics are streamed; for a figure of
  FROM_FEATURES features are kept, 4 D bytes for each sample on every host.
  """

  def __init__(
    self,
    name: str,
    network: NetworkFn,
    figures: Sequence[str],
    reference: ReferenceStats | None,
    *,
    count: int,
    seed: int,
    shuffle: bool = True,
  ):
    """Keeps references.

    Args:
      name: of the network, in messages.
      network: called with `Batch.pixels`; jit it.
      figures: 'fid' or 'fd_NAME': the Frechet distance to the reference, under
        that name. 'inception_score': it and its spread over 10 parts, of the
        logits. 'precision_recall': k = 3. 'kid': mean and spread over 100
        subsets of 1000, or the estimate of all pairs of fewer samples.
        'coverage_inception': density and coverage, k = 5. The last three
        compare with the reference's features.
      reference: statistics of real images; None if no figure needs them.
      count: samples that will come.
      seed: picks KID's subsets.
      shuffle: see InceptionScore.

    Raises:
      ValueError: a figure that needs what the reference does not hold, or more
        samples than there are.
    """
    self.name = name
    self._network = network
    self._figures = tuple(figures)
    self._count = count
    self._seed = seed
    self._shuffle = shuffle
    self._reference = reference
    single = [f for f in figures if f in FROM_FEATURES]
    self._real = np.empty((0, 0))
    if single and reference is not None:
      check_singles(name, figures, reference.features is not None)
      assert reference.features is not None
      self._real = reference.features
    for figure in figures:
      least, reals = LEAST.get(figure, (2, 0))
      if count < least or len(self._real) < reals:
        raise ValueError(
          f"{name}: {figure!r} needs at least {least} samples and {reals}"
          f" single real images, got {count} and {len(self._real)}"
        )
    self._keeps = bool(single)
    self.reset()

  def reset(self) -> None:
    self._stats = FeatureStream()
    self._score: InceptionScore | None = None
    self._features: list[np.ndarray] = []
    self._index = [np.empty(0, np.int32)]
    self._late = OneLate(self._take)

  def update(self, batch: Batch) -> None:
    self._late.push(batch, *self._network(batch.pixels))

  def _take(self, batch: Batch, values: tuple[np.ndarray, ...]) -> None:
    features, *logits = values
    self._index.append(batch.index)
    self._stats.update(features)
    if self._keeps:
      self._features.append(features)
    if "inception_score" in self._figures:
      if self._score is None:
        classes = logits[0].shape[1]
        self._score = InceptionScore(
          self._count, classes, SPLITS, self._shuffle
        )
      self._score.update(logits[0], batch.index)

  def result(self) -> Figures:
    """The figures asked for.

    Raises:
      ValueError: unless exactly `count` samples came.
    """
    self._late.flush()
    index = np.concatenate(processes.gather(np.concatenate(self._index)))
    if not np.array_equal(np.sort(index), np.arange(self._count)):
      raise ValueError(
        f"{self.name}: {len(index)} samples came, {len(np.unique(index))} of"
        f" them different; expected are 0 to {self._count - 1}, each once"
      )
    fake = np.empty((0, 0))
    if self._keeps:
      gathered = processes.gather(np.concatenate(self._features))
      fake = np.concatenate(gathered)[np.argsort(index)]
    results: Figures = {}
    for figure in self._figures:
      results |= self._figure(figure, fake)
    return results

  def baseline(self) -> Figures:
    """None: reference files stand for more images than a run should read."""
    return {}

  def _figure(self, figure: str, fake: np.ndarray) -> Figures:
    if figure == "inception_score":
      assert self._score is not None
      mean, spread = self._score.result()
      return {figure: mean, "inception_score_std": spread}
    if figure not in FROM_FEATURES:
      assert self._reference is not None
      return {figure: frechet_distance(self._stats.result(), self._reference)}
    real = self._real
    if figure == "precision_recall":
      precision, recall = precision_recall(real, fake, NEIGHBOURS)
      return {"precision": precision, "recall": recall}
    if figure == "coverage_inception":
      density, coverage = density_coverage(real, fake, COVERAGE_NEIGHBOURS)
      return {"density_inception": density, figure: coverage}
    if min(len(real), len(fake)) < KID_SUBSET_SIZE:
      return {figure: kernel_distance(real, fake)}
    size = KID_SUBSET_SIZE
    mean, spread = kernel_distance_subsets(
      real, fake, subsets=KID_SUBSETS, subset_size=size, seed=self._seed
    )
    return {figure: mean, "kid_std": spread}

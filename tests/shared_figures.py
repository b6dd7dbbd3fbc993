"""Every figure that processes share, for one process and for several."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from drift_jax.metrics.evaluators import FeatureEvaluator
from drift_jax.metrics.frechet import FeatureStats
from drift_jax.metrics.generation import evaluate
from drift_jax.metrics.network import NetworkEvaluator
from drift_jax.metrics.reference import Provenance, ReferenceStats
from drift_jax.metrics.small_sets import DuplicatesEvaluator
from drift_jax.system import sharding


@dataclasses.dataclass(frozen=True)
class Reals:
  """Images in memory, as evaluators.Reals; of one class."""

  images: np.ndarray

  @property
  def labels(self):
    return np.zeros(len(self.images), np.int32)

  def fixed(self, indices):
    return self.images[indices]


def figures_of_few(pictures, real, mesh):
  """All of them, of samples that are these pictures.

  In batches of twice as many, of which the second of two processes gets none.
  """
  count = len(pictures)
  labels = np.zeros(count, np.int32)

  @jax.jit
  def network(pixels):
    features = pixels.reshape(len(pixels), -1).astype(jnp.float32) / 255.0
    return features, 5.0 * features[:, :6]

  @jax.jit
  def classifier(images):
    flat = images.reshape(len(images), -1)
    return flat, flat[:, :2]

  reference = ReferenceStats.from_stats(
    FeatureStats.from_features(real.reshape(len(real), -1)),
    Provenance(
      **dict(source="here", split="train", crop="none", network="none"),
      **dict(resolution=2, network_sha256="0" * 64),
    ),
    real.reshape(len(real), -1),
  )
  judged = NetworkEvaluator(
    "inception",
    network,
    ["fid", "inception_score", "precision_recall", "kid", "coverage_inception"],
    reference,
    count=count,
    seed=0,
  )
  train, test = Reals(real[:20]), Reals(real[20:])
  evaluators = [
    judged,
    FeatureEvaluator(
      "pixel",
      classifier,
      ["fd_pixel", "coverage", "accuracy"],
      *(train, test),
      labels=labels,
      batch_size=2 * count,
      seed=0,
      k=3,
    ),
    DuplicatesEvaluator(train, test, grid=np.linspace(-1, 1, 256)),
  ]
  results = evaluate(
    evaluators,
    lambda labels, alpha, index: sharding.put_batch(pictures[index], mesh),
    labels,
    [1.0],
    2 * count,
  )
  return results[1.0]

"""The plain ways to figures from features: whole matrices, all at once."""

import warnings

import numpy as np
from scipy import linalg, special

from drift_jax.metrics.frechet import FeatureStats


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
  """By the root of the product of covariances, as pytorch-fid does it."""
  covariances = [a.covariance(), b.covariance()]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that the product is singular
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    if not np.isfinite(root).all():
      covariances = [x + 1e-6 * np.eye(len(x)) for x in covariances]
      root = linalg.sqrtm(covariances[0] @ covariances[1])
  difference = a.mean - b.mean
  return float(
    difference @ difference
    + np.trace(covariances[0])
    + np.trace(covariances[1])
    - 2 * np.trace(root).real
  )


def inception_score(logits: np.ndarray, splits: int) -> list[float]:
  """[mean, standard deviation] from all probabilities at once."""
  order = np.random.RandomState(2020).permutation(len(logits))
  probability = special.softmax(logits[order].astype(np.float64), axis=1)
  scores = []
  for part in np.split(probability, splits):
    ratio = np.log(part) - np.log(part.mean(axis=0))
    scores.append(np.exp((part * ratio).sum(axis=1).mean()))
  return [float(np.mean(scores)), float(np.std(scores))]


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Of all pairs, in the points' dtype."""
  squares = -2 * (x @ y.T)
  squares += np.square(x).sum(axis=1)[:, None]
  squares += np.square(y).sum(axis=1)
  return squares


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int) -> list[float]:
  """From whole matrices of distances in the features' dtype."""
  reach = [
    np.partition(squared_distances(x, x), k, axis=1)[:, k] for x in (real, fake)
  ]
  distances = squared_distances(real, fake)
  return [
    float((distances <= reach[0][:, None]).any(axis=0).mean()),
    float((distances <= reach[1]).any(axis=1).mean()),
  ]


def kernel_distance_subsets(
  real: np.ndarray, fake: np.ndarray, *, subsets: int, size: int, seed: int
) -> float:
  """Mean over the subsets that ours draws, in the features' dtype."""
  random = np.random.default_rng(seed)

  def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3

  def off_diagonal(matrix: np.ndarray) -> float:
    return float(matrix.sum() - np.trace(matrix)) / (size * (size - 1))

  estimates = []
  for _ in range(subsets):
    x = real[random.choice(len(real), size, replace=False)]
    y = fake[random.choice(len(fake), size, replace=False)]
    within = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y))
    estimates.append(within - 2 * float(kernel(x, y).mean()))
  return float(np.mean(estimates))

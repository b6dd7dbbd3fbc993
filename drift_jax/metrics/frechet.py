"""Frechet distance between Gaussians fitted to two sets of features.

Heusel et al. 2017 (arXiv:1706.08500), eq. 6. With Inception-v3 features it is
the FID of section 5.2 of arXiv:2602.04770; in any other feature space it is a
Frechet distance (FD) and must not be called FID.
"""

import dataclasses

import numpy as np
from absl import logging
from jaxtyping import Float64
from numpy.typing import ArrayLike

from drift_jax.metrics import files

_FIELDS = ("count", "mean", "scatter")


def as_feature_matrix(features: ArrayLike, name: str) -> np.ndarray:
  """Returns features as a float64 matrix [N, D].

  Raises:
    ValueError: when they are not two-dimensional, are empty or hold a
      non-finite number; the message names `name` and the offending row.
  """
  matrix = np.asarray(features, np.float64)
  if matrix.ndim != 2 or 0 in matrix.shape:
    raise ValueError(
      f"{name} must be a non-empty [N, D] matrix, got shape {matrix.shape}"
    )
  finite = np.isfinite(matrix).all(axis=1)
  if not finite.all():
    raise ValueError(
      f"{name}: {np.count_nonzero(~finite)} of {len(matrix)} rows are not"
      f" finite, the first is row {np.argmin(finite)}"
    )
  return matrix


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStats:
  """Count, mean and scatter of feature vectors: all that an FD needs.

  Attributes:
    count: number of vectors N >= 1.
    mean: [D] float64, (1/N) sum_i x_i.
    scatter: [D, D] float64, sum_i (x_i - mean)(x_i - mean)^T. Sums of centred
      products merge without the cancellation of sums of raw products.
  """

  count: int
  mean: Float64[np.ndarray, " D"]
  scatter: Float64[np.ndarray, "D D"]

  @classmethod
  def from_features(cls, features: ArrayLike) -> "FeatureStats":
    """Statistics of features [N, D], any float dtype, summed in float64.

    Raises:
      ValueError: for an empty, non-finite or not two-dimensional array.
    """
    matrix = as_feature_matrix(features, "features")
    mean = matrix.mean(axis=0)
    centred = matrix - mean
    return cls(len(matrix), mean, centred.T @ centred)

  def merge(self, other: "FeatureStats") -> "FeatureStats":
    """Statistics of both sets together (Chan, Golub, LeVeque 1983).

    S = S_a + S_b + (N_a N_b / N) d d^T with d = mean_b - mean_a; only
    differences of means enter, so a large common offset costs no digits.

    Raises:
      ValueError: when the dimensions differ.
    """
    _check_dimensions(self, other)
    count = self.count + other.count
    delta = other.mean - self.mean
    return FeatureStats(
      count,
      self.mean + delta * (other.count / count),
      self.scatter
      + other.scatter
      + np.outer(delta, delta) * (self.count * other.count / count),
    )

  def covariance(self) -> Float64[np.ndarray, "D D"]:
    """Unbiased covariance [D, D] (ddof 1): scatter / (N - 1).

    Raises:
      ValueError: with fewer than two vectors.
    """
    if self.count < 2:
      raise ValueError(
        f"a covariance needs at least 2 feature vectors, got {self.count}"
      )
    return self.scatter / (self.count - 1)

  def save(self, path: files.PathLike) -> None:
    """Writes count, mean and scatter to an .npz file, atomically."""
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
      np.savez(file, count=self.count, mean=self.mean, scatter=self.scatter)

  @classmethod
  def load(cls, path: files.PathLike) -> "FeatureStats":
    """Reads what `save` wrote.

    Raises:
      ValueError: when the file lacks one of the three arrays.
    """
    with np.load(path) as archive:
      missing = [name for name in _FIELDS if name not in archive]
      if missing:
        raise ValueError(
          f"{path} is no file of feature statistics: it lacks {missing} and"
          f" holds {sorted(archive)}"
        )
      return cls(int(archive["count"]), archive["mean"], archive["scatter"])


def _check_dimensions(a: FeatureStats, b: FeatureStats) -> None:
  if a.mean.shape != b.mean.shape:
    raise ValueError(
      "feature dimensions differ:"
      f" {len(a.mean)} (of {a.count} vectors) against"
      f" {len(b.mean)} (of {b.count} vectors)"
    )


def _square_root_factor(
  covariance: Float64[np.ndarray, "D D"],
) -> Float64[np.ndarray, "D R"]:
  """A with A A^T = covariance and as many columns as its numerical rank."""
  values, vectors = np.linalg.eigh(covariance)
  # Below this an eigenvalue is rounding (numpy.linalg.matrix_rank's rule), and
  # its square root, 1e-8 of the largest, would not be small any more.
  floor = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
  kept = values > floor
  return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
  """FD = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), float64.

  With S_a = A A^T and S_b = B B^T from symmetric eigen-decompositions,
  tr (S_a S_b)^(1/2) is the sum of the singular values of A^T B. This holds for
  singular covariances too, and loses no digits to square roots of rounding.

  Returns:
    A number >= 0, in squared units of the features.

  Raises:
    ValueError: when the dimensions differ or a set has fewer than two vectors.
  """
  _check_dimensions(a, b)
  dimensions = len(a.mean)
  covariance_a, covariance_b = a.covariance(), b.covariance()
  if min(a.count, b.count) < dimensions:
    logging.warning(
      "Frechet distance from %d and %d feature vectors of dimension %d: fewer"
      " vectors than dimensions bias it upwards; compare equal counts only.",
      a.count,
      b.count,
      dimensions,
    )
  product = _square_root_factor(covariance_a).T @ _square_root_factor(
    covariance_b
  )
  root_trace = np.linalg.svd(product, compute_uv=False).sum()
  distance = (
    np.sum((a.mean - b.mean) ** 2)
    + np.trace(covariance_a)
    + np.trace(covariance_b)
    - 2.0 * root_trace
  )
  return max(float(distance), 0.0)

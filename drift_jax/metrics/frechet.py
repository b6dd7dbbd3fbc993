"""Frechet distance between Gaussians fitted to two sets of features.

Heusel et al. 2017 (arXiv:1706.08500), eq. 6. With Inception-v3 features it is
the FID of section 5.2 of arXiv:2602.04770; in any other feature space it is a
Frechet distance (FD) and must not be called FID.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from drift_jax.system import devices, processes
from drift_jax.system.console import logger

# Matrices [D, D] of float64 that a distance keeps at a time, at most: the
# reference's, a stream's, its result's and one factor, then a covariance, its
# eigenvectors' two of work space, and one to spare.
_MATRICES = 8
# Entries of a matrix that are made at a time.
_ENTRIES = 2**20
# Rows that a stream of features is cut into.
_CHUNK_ROWS = 2048
# Reciprocal condition number from which Cholesky factors lose no digits that
# eigenvectors would keep.
_WELL_CONDITIONED = 1e-9


def check_feature_matrix(matrix: np.ndarray, name: str) -> None:
  """Refuses anything but a matrix of finite numbers [N, D].

  Raises:
    ValueError: when it is not two-dimensional, is empty or holds a non-finite
      number; the message names `name` and the offending row.
  """
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


def as_feature_matrix(features: ArrayLike, name: str) -> np.ndarray:
  """Returns features as a float64 matrix [N, D].

  Raises:
    ValueError: as `check_feature_matrix`.
  """
  matrix = np.asarray(features, np.float64)
  check_feature_matrix(matrix, name)
  return matrix


@runtime_checkable
class Moments(Protocol):
  """Mean and covariance of a set of feature vectors."""

  @property
  def count(self) -> int | None:
    """Number of vectors, None when nobody recorded it."""
    ...

  @property
  def mean(self) -> Float64[np.ndarray, " D"]: ...

  def covariance(self) -> Float64[np.ndarray, "D D"]:
    """Unbiased covariance (ddof 1), an array that may be overwritten."""
    ...


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
    """
    count = self.count + other.count
    delta = other.mean - self.mean
    mean = self.mean + delta * (other.count / count)
    scatter = self.scatter + other.scatter
    _add_square(scatter, delta, self.count * other.count / count)
    return FeatureStats(count, mean, scatter)

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


def _add_square(matrix: np.ndarray, vector: np.ndarray, factor: float) -> None:
  """matrix += factor * outer(vector, vector), in place, some rows at a time."""
  rows = max(1, _ENTRIES // len(vector))
  for start in range(0, len(vector), rows):
    part = np.outer(vector[start : start + rows], vector)
    part *= factor
    matrix[start : start + rows] += part


def check_frechet_width(dimensions: int, name: str) -> None:
  """Refuses features too wide for covariances in this machine's memory.

  Raises:
    EvaluationError: with the arithmetic.
  """
  devices.check_fits(
    _MATRICES * 8 * dimensions**2,
    f"{name}: a Frechet distance of {dimensions} features needs {_MATRICES}"
    f" matrices of {dimensions} x {dimensions} float64 numbers",
    f"leave {name} out of eval.metrics",
  )


class FeatureStream:
  """Statistics of features that come batch by batch.

  Batches are cut and joined to chunks of 2048 rows, so the result is the same
  to the last bit for any sizes of batches, and little time goes into merging:
  a merge is as dear as the statistics of some hundred rows of 2048 features.
  Memory: 2048 rows of features and some [D, D] matrices of float64, 170 MB for
  D = 2048, however many rows come.
  """

  def __init__(self) -> None:
    self._stats: FeatureStats | None = None
    self._buffer: np.ndarray | None = None
    self._rows = 0

  def update(self, features: ArrayLike) -> None:
    """Takes features [B, D], any float dtype; B may be 0.

    Raises:
      EvaluationError: for a dimension too large for the machine's memory.
      ValueError: for a non-finite or not two-dimensional array, or another
        dimension than before.
    """
    if np.ndim(features) == 2 and not len(np.asarray(features)):
      return
    matrix = as_feature_matrix(features, "features")
    if self._buffer is None:
      check_frechet_width(matrix.shape[1], "features")
      self._buffer = np.empty((_CHUNK_ROWS, matrix.shape[1]))
    while len(matrix):
      part = matrix[: len(self._buffer) - self._rows]
      self._buffer[self._rows : self._rows + len(part)] = part
      self._rows += len(part)
      matrix = matrix[len(part) :]
      if self._rows == len(self._buffer):
        self._stats, self._rows = self._joined(), 0

  def _joined(self) -> FeatureStats | None:
    if self._buffer is None or not self._rows:
      return self._stats
    stats = FeatureStats.from_features(self._buffer[: self._rows])
    return stats if self._stats is None else self._stats.merge(stats)

  def result(self) -> FeatureStats:
    """Statistics of all features so far, of all processes together.

    Raises:
      ValueError: when there are none.
    """
    stats = self._joined()
    if jax.process_count() > 1:
      stats = _over_processes(stats)
    if stats is None:
      raise ValueError("no features were given")
    return stats


def _over_processes(local: FeatureStats | None) -> FeatureStats | None:
  """Statistics of all processes' sets together, the same in all.

  As `FeatureStats.merge`, with the mean of all as the common centre: only one
  sum of [D, D] matrices goes over the network.
  """
  size = [0, 0] if local is None else [local.count, len(local.mean)]
  counts, dimensions = np.concatenate(
    processes.gather(np.asarray([size], np.int64))
  ).T
  count = int(counts.sum())
  if not count:
    return None
  if local is None:
    empty = np.zeros((dimensions.max(), dimensions.max()))
    local = FeatureStats(0, empty[0], empty)
  mean = processes.total(local.mean * (local.count / count))
  scatter = local.scatter.copy()
  _add_square(scatter, local.mean - mean, local.count)
  return FeatureStats(count, mean, processes.total(scatter))


def _cholesky(covariance: np.ndarray) -> np.ndarray | None:
  """Lower Cholesky factor, None when the matrix is not safely definite.

  The factor takes the place of the covariance, which is lost either way.
  """
  # Imported at use: it takes a quarter of a second.
  from scipy import linalg

  # In Fortran's order, which a symmetric matrix has as well, none is copied.
  symmetric = covariance.T
  norm, condition = linalg.get_lapack_funcs(("lange", "pocon"), (symmetric,))
  size = norm("1", symmetric)
  try:
    factor = linalg.cholesky(
      symmetric, lower=True, overwrite_a=True, check_finite=False
    )
  except linalg.LinAlgError:
    return None
  reciprocal, _ = condition(factor, size, uplo="L")
  return factor if reciprocal >= _WELL_CONDITIONED else None


def _square_root_factor(moments: Moments) -> Float64[np.ndarray, "D R"]:
  """A with A A^T = covariance and as many columns as its numerical rank."""
  from scipy import linalg

  factor = _cholesky(moments.covariance())
  if factor is not None:
    return factor
  values, vectors = linalg.eigh(
    moments.covariance().T, overwrite_a=True, check_finite=False, driver="evd"
  )
  # Below this an eigenvalue is rounding (numpy.linalg.matrix_rank's rule), and
  # its square root, 1e-8 of the largest, would not be small any more.
  floor = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
  # They ascend.
  first = np.searchsorted(values, floor, side="right")
  factor = vectors[:, first:]
  factor *= np.sqrt(values[first:])
  return factor


def frechet_distance(a: Moments, b: Moments) -> float:
  """FD = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), float64.

  With S_a = A A^T and S_b = B B^T, by Cholesky's method for well-conditioned
  matrices and from symmetric eigen-decompositions for others, the trace of
  (S_a S_b)^(1/2), or of (S_a^(1/2) S_b S_a^(1/2))^(1/2), is the sum of the
  singular values of A^T B. This holds for singular covariances too, and loses
  no digits to square roots of rounding.

  A set of D or fewer vectors has a singular covariance of its D dimensions: a
  warning says so, and how many are needed.

  Beside the moments, some four matrices [D, D] of float64 are in memory.

  Returns:
    A number >= 0, in squared units of the features.

  Raises:
    ValueError: when the dimensions differ or a set has fewer than two vectors.
  """
  from scipy import linalg

  dimensions = len(a.mean)
  if dimensions != len(b.mean):
    raise ValueError(
      f"feature dimensions differ: {dimensions} (of {a.count} vectors) against"
      f" {len(b.mean)} (of {b.count} vectors)"
    )
  counts = [moments.count for moments in (a, b)]
  if any(count is not None and count <= dimensions for count in counts):
    logger.warning(
      "Frechet distance from %s feature vectors of dimension %d: at least %d of"
      " each are needed for covariances of full rank. With fewer it is biased"
      " upwards; compare equal counts only.",
      " and ".join("?" if count is None else str(count) for count in counts),
      dimensions,
      dimensions + 1,
    )
  traces = sum(np.trace(moments.covariance()) for moments in (a, b))
  means = np.sum((a.mean - b.mean) ** 2)
  product = _square_root_factor(a).T @ _square_root_factor(b)
  # Singular values are the transposed matrix's, which is in Fortran's order.
  values = linalg.svdvals(product.T, overwrite_a=True, check_finite=False)
  return max(float(means + traces - 2.0 * np.sum(values)), 0.0)

"""Files of reference statistics: ours and the public ones.

Ours is an .npz of `mu` [D], `sigma` [D, D] (float64, ddof 1), `provenance`, a
JSON text, `count` if it is known, and maybe `features` [n, D] (float32) of
single images. Public files for ImageNet-256 hold `mu` and `sigma`
(among other arrays in ADM's VIRTUAL_imagenet256_labeled.npz, which are not
read) or `ref_mu` and `ref_sigma`, and say nothing of where they come from.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from drift_jax.metrics import files, frechet
from drift_jax.system import paths
from drift_jax.system.console import logger

_FORMS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))
# Regular expressions of Provenance's texts that are more than not empty.
_TEXTS = {"network_sha256": "[0-9a-f]{64}"}
# float32 sums leave asymmetries of some 1e-7 of the largest entry.
_ASYMMETRY = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
  """Source of statistics: images and network.

  Attributes:
    source: data set, e.g. "imagenet2012".
    split: e.g. "train".
    crop: how images were cut to a square, as in data.crop: "center" is ADM's.
    resolution: side of the square images in pixels.
    network: feature network, e.g. "inception-v3-2015 pool3".
    network_sha256: of the network's weights, 64 hexadecimal digits.
  """

  source: str
  split: str
  crop: str
  resolution: int
  network: str
  network_sha256: str

  def __post_init__(self) -> None:
    for field, value in dataclasses.asdict(self).items():
      if field == "resolution":
        # bool is an int to isinstance.
        valid, expected = type(value) is int and value > 0, "positive integer"
      else:
        expected = _TEXTS.get(field, ".+")
        valid = isinstance(value, str) and re.fullmatch(expected, value)
      if not valid:
        raise ValueError(f"provenance: {field}={value!r}, expected {expected}")


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceStats:
  """Mean and covariance of real images' features: a `frechet.Moments`.

  Attributes:
    mean: [D] float64.
    sigma: [D, D] float64, the unbiased covariance (ddof 1).
    count: images, None in public files, which do not say.
    provenance: None in public files.
    features: [n, D] float32 of some of the images, for figures that compare
      single ones; None in public files.
  """

  mean: Float64[np.ndarray, " D"]
  sigma: Float64[np.ndarray, "D D"]
  count: int | None
  provenance: Provenance | None
  features: Float32[np.ndarray, "n D"] | None = None

  @classmethod
  def from_stats(
    cls,
    stats: frechet.FeatureStats,
    provenance: Provenance,
    features: Float32[np.ndarray, "n D"] | None = None,
  ) -> "ReferenceStats":
    """Raises ValueError with fewer than two feature vectors."""
    sigma = stats.covariance()
    return cls(stats.mean, sigma, stats.count, provenance, features)

  def covariance(self) -> Float64[np.ndarray, "D D"]:
    return self.sigma.copy()


def save_reference(path: files.PathLike, reference: ReferenceStats) -> None:
  """Writes the file, with its provenance; it appears whole or not at all."""
  assert reference.provenance is not None
  text = json.dumps(dataclasses.asdict(reference.provenance), sort_keys=True)
  arrays: dict[str, Any] = {
    "mu": reference.mean,
    "sigma": reference.sigma,
    "provenance": np.asarray(text),
    "count": reference.count,
    "features": reference.features,
  }
  arrays = {key: array for key, array in arrays.items() if array is not None}
  with files.replacing(path) as temporary, open(temporary, "wb") as file:
    np.savez(file, **arrays)


def load_reference(
  path: files.PathLike,
  *,
  dimensions: int | None = None,
  resolution: int | None = None,
  crop: str | None = None,
  network_sha256: str | None = None,
) -> ReferenceStats:
  """Reads our files and the public ones; object arrays are refused.

  Args:
    path: .npz file.
    dimensions, resolution, crop, network_sha256: expected of the file; None
      expects nothing. A public file does not record the last three: they
      are believed, with a warning.

  Raises:
    FileNotFoundError: when there is none.
    ValueError: for a file of another kind, wrong shapes or dtypes, non-finite
      numbers, a matrix that is no covariance, or other dimensions, resolution,
      crop or network than asked for, naming both.
  """
  path = paths.expand(path)
  with files.reading_npz(path):
    with np.load(path) as archive:
      arrays = _read(archive)
    reference = _checked(arrays)
  if dimensions not in (None, len(reference.mean)):
    raise ValueError(
      f"{path} holds statistics of {len(reference.mean)} dimensions, expected"
      f" {dimensions}"
    )
  asked = {
    "resolution": resolution,
    "crop": crop,
    "network_sha256": network_sha256,
  }
  _check_asked(reference.provenance, asked, path)
  return reference


def has_features(path: files.PathLike) -> bool:
  """Whether a file of statistics holds features of single images.

  Raises:
    FileNotFoundError, ValueError: as `load_reference`.
  """
  path = paths.expand(path)
  with files.reading_npz(path), np.load(path) as archive:
    return "features" in archive.files


def _read(archive: np.lib.npyio.NpzFile) -> dict[str, np.ndarray]:
  """The arrays of one form and what goes with them, not the others."""
  complete = [form for form in _FORMS if set(form) <= set(archive.files)]
  if len(complete) != 1:
    raise ValueError(
      "the file must hold either mu and sigma or ref_mu and ref_sigma, it"
      f" holds {sorted(archive.files)}"
    )
  arrays = {}
  for key in (*complete[0], "count", "provenance", "features"):
    if key in archive.files:
      try:
        arrays[key.removeprefix("ref_")] = archive[key]
      except ValueError as error:
        raise ValueError(f"{key} cannot be read: {error}") from error
  return arrays


def _checked(arrays: Mapping[str, np.ndarray]) -> ReferenceStats:
  """Statistics that a file's arrays hold; ValueError for anything else."""
  mean, sigma = _checked_moments(arrays["mu"], arrays["sigma"])
  count = arrays.get("count")
  if count is not None:
    if count.ndim or count.dtype.kind not in "iu" or count < 2:
      raise ValueError(
        f"count must be an integer >= 2, found {count.dtype} {count.tolist()}"
      )
    count = int(count)
  features = arrays.get("features")
  if features is not None:
    if features.dtype != np.float32 or features.shape[1:] != mean.shape:
      raise ValueError(
        f"features must be float32 [n, {len(mean)}], found {features.dtype}"
        f" {features.shape}"
      )
    frechet.check_feature_matrix(features, "features")
  provenance = arrays.get("provenance")
  if provenance is not None:
    try:
      provenance = Provenance(**json.loads(provenance.item()))
    except (ValueError, TypeError) as error:
      raise ValueError(f"provenance is no record: {error}") from error
  return ReferenceStats(mean, sigma, count, provenance, features)


def _checked_moments(
  mean: np.ndarray, sigma: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(mean, sigma) as float64, sigma exactly symmetric."""
  # 1. Dtypes, shapes, finite numbers.
  for key, array in (("mu", mean), ("sigma", sigma)):
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
      raise ValueError(f"{key} must be float32 or float64, found {array.dtype}")
    bad = np.count_nonzero(~np.isfinite(array))
    if bad:
      raise ValueError(f"{bad} of {array.size} numbers in {key} are not finite")
  if mean.ndim != 1 or not mean.size or sigma.shape != 2 * mean.shape:
    raise ValueError(
      f"expected mu [D] and sigma [D, D], found shapes {mean.shape} and"
      f" {sigma.shape}"
    )
  # 2. A covariance: symmetric, of possible correlations.
  mean, sigma = mean.astype(np.float64), sigma.astype(np.float64)
  scale = float(np.abs(sigma).max())
  asymmetry = float(np.abs(sigma - sigma.T).max())
  if asymmetry > _ASYMMETRY * scale:
    raise ValueError(
      "sigma is not symmetric: entries differ from their mirror images by up"
      f" to {asymmetry:.3g}, expected at most {_ASYMMETRY * scale:.3g}"
    )
  sigma = (sigma + sigma.T) / 2.0
  variances = np.diagonal(sigma)
  bound = np.sqrt(np.outer(np.abs(variances), np.abs(variances)))
  if (variances < 0).any() or (np.abs(sigma) > bound + 1e-5 * scale).any():
    raise ValueError(
      "sigma is no covariance: a variance is negative or an entry exceeds the"
      " product of its standard deviations; the smallest variance is"
      f" {variances.min():.3g}"
    )
  return mean, sigma


def _check_asked(
  provenance: Provenance | None, asked: Mapping[str, Any], path: str
) -> None:
  """Raises ValueError if a file is of something else than was asked for."""
  asked = {key: value for key, value in asked.items() if value is not None}
  if provenance is None:
    if asked:
      logger.warning(
        "%s does not record what it was computed from; it is taken to be of %s",
        path,
        ", ".join(f"{key} {value}" for key, value in asked.items()),
      )
    return
  recorded = dataclasses.asdict(provenance)
  wrong = [
    f"{key} found {recorded[key]!r}, expected {value!r}"
    for key, value in asked.items()
    if recorded[key] != value
  ]
  if wrong:
    raise ValueError(
      f"{path} is for other images or another network than asked for: "
      + ", ".join(wrong)
    )

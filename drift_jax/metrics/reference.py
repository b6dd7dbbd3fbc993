"""Files of reference statistics: ours and the public ones.

Ours is an .npz of `mu` [D], `sigma` [D, D] (float64, ddof 1), `provenance`, a
JSON text, `count` where it is known, and maybe `features` [n, D] (float32) of
single images. Public files for ImageNet-256 hold `mu` and `sigma`
(among other arrays in ADM's VIRTUAL_imagenet256_labeled.npz, which are not
read) or `ref_mu` and `ref_sigma`, and say nothing of where they come from.
"""

import dataclasses
import json
import re
import zipfile
import zlib

import numpy as np
from absl import logging
from jaxtyping import Float32, Float64
from numpy.typing import ArrayLike

from drift_jax.metrics import files, frechet
from drift_jax.system import paths

_FORMS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))
# float32 sums leave asymmetries of some 1e-7 of the largest entry.
_ASYMMETRY = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
  """What statistics were computed from.

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
    for field in ("source", "split", "crop", "network"):
      if not getattr(self, field):
        raise ValueError(f"provenance: {field} is empty")
    if self.resolution < 1:
      raise ValueError(
        f"provenance: resolution must be positive, got {self.resolution}"
      )
    if not re.fullmatch("[0-9a-f]{64}", self.network_sha256):
      raise ValueError(
        "provenance: network_sha256 must be 64 lower-case hexadecimal digits,"
        f" got {self.network_sha256!r}"
      )


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
    return cls(
      stats.mean, stats.covariance(), stats.count, provenance, features
    )

  def covariance(self) -> Float64[np.ndarray, "D D"]:
    return self.sigma.copy()


def save_reference(path: files.PathLike, reference: ReferenceStats) -> None:
  """Writes the file; it appears whole or not at all.

  Raises:
    ValueError: without a provenance, or for numbers that `load_reference`
      would refuse.
  """
  if reference.provenance is None:
    raise ValueError(
      f"{path}: reference statistics are saved with their provenance, got None"
    )
  mean, sigma = _checked_moments(
    reference.mean, reference.sigma, ("mu", "sigma"), str(path)
  )
  text = json.dumps(dataclasses.asdict(reference.provenance), sort_keys=True)
  arrays: dict[str, np.ndarray] = {
    "mu": mean,
    "sigma": sigma,
    "provenance": np.asarray(text),
  }
  if reference.count is not None:
    arrays["count"] = np.asarray(reference.count, np.int64)
    _checked_count(arrays["count"], str(path))
  if reference.features is not None:
    arrays["features"] = reference.features
    _checked_features(arrays["features"], len(mean), str(path))
  with files.replacing(path) as temporary, open(temporary, "wb") as file:
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


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
    dimensions, resolution, crop, network_sha256: what the file must be for;
      None asks for nothing. A public file does not record the last three: they
      are believed, with a warning.

  Raises:
    FileNotFoundError: when there is none.
    ValueError: for a file of another kind, wrong shapes or dtypes, non-finite
      numbers, a matrix that is no covariance, or other dimensions, resolution,
      crop or network than asked for, naming what was found and expected.
  """
  path = name = paths.expand(path)
  # A missing file is no zip file either: opening it says so.
  with open(path, "rb") as file:
    if not zipfile.is_zipfile(file):
      raise ValueError(f"{name} is no .npz file, or is cut short")
  try:
    files.check_one_zip(path)
    with np.load(path) as archive:
      arrays = _read(archive, name)
  except (zipfile.BadZipFile, zlib.error, EOFError) as error:
    raise ValueError(f"{name} is damaged: {error}") from error
  keys = next(form for form in _FORMS if form[0] in arrays)
  mean, sigma = _checked_moments(arrays[keys[0]], arrays[keys[1]], keys, name)
  reference = ReferenceStats(
    mean,
    sigma,
    _checked_count(arrays["count"], name) if "count" in arrays else None,
    _parsed(arrays["provenance"], name) if "provenance" in arrays else None,
    _checked_features(arrays["features"], len(mean), name)
    if "features" in arrays
    else None,
  )
  if dimensions not in (None, len(mean)):
    raise ValueError(
      f"{name} holds statistics of {len(mean)} dimensions, expected"
      f" {dimensions}"
    )
  _check_provenance(
    reference.provenance,
    {
      "resolution": resolution,
      "crop": crop,
      "network_sha256": network_sha256,
    },
    name,
  )
  return reference


def _read(archive: np.lib.npyio.NpzFile, name: str) -> dict[str, np.ndarray]:
  """The arrays of one form and what goes with them, not the others."""
  complete = [form for form in _FORMS if set(form) <= set(archive.files)]
  if len(complete) != 1:
    raise ValueError(
      f"{name} must hold either mu and sigma or ref_mu and ref_sigma, it holds"
      f" {sorted(archive.files)}"
    )
  arrays = {}
  for key in (*complete[0], "count", "provenance", "features"):
    if key in archive.files:
      try:
        arrays[key] = archive[key]
      except ValueError as error:
        raise ValueError(f"{name}: {key} cannot be read: {error}") from error
  return arrays


def _checked_moments(
  mean: ArrayLike, sigma: ArrayLike, keys: tuple[str, str], name: str
) -> tuple[np.ndarray, np.ndarray]:
  """(mean, sigma) as float64, sigma exactly symmetric."""
  mean, sigma = np.asarray(mean), np.asarray(sigma)
  for key, array in zip(keys, (mean, sigma), strict=True):
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
      raise ValueError(
        f"{name}: {key} must be float32 or float64, found {array.dtype}"
      )
  if mean.ndim != 1 or not mean.size or sigma.shape != 2 * mean.shape:
    raise ValueError(
      f"{name}: expected {keys[0]} [D] and {keys[1]} [D, D], found shapes"
      f" {mean.shape} and {sigma.shape}"
    )
  mean, sigma = mean.astype(np.float64), sigma.astype(np.float64)
  for key, array in zip(keys, (mean, sigma), strict=True):
    bad = np.count_nonzero(~np.isfinite(array))
    if bad:
      raise ValueError(
        f"{name}: {bad} of {array.size} numbers in {key} are not finite"
      )
  scale = float(np.abs(sigma).max())
  asymmetry = float(np.abs(sigma - sigma.T).max())
  if asymmetry > _ASYMMETRY * scale:
    raise ValueError(
      f"{name}: {keys[1]} is not symmetric: entries differ from their mirror"
      f" images by up to {asymmetry:.3g}, expected at most"
      f" {_ASYMMETRY * scale:.3g}"
    )
  sigma = (sigma + sigma.T) / 2.0
  variances = np.diagonal(sigma)
  bound = np.sqrt(np.outer(np.abs(variances), np.abs(variances)))
  if (variances < 0).any() or (np.abs(sigma) > bound + 1e-5 * scale).any():
    raise ValueError(
      f"{name}: {keys[1]} is no covariance: a variance is negative or an entry"
      " exceeds the product of its standard deviations; the smallest variance"
      f" is {variances.min():.3g}"
    )
  return mean, sigma


def _checked_count(array: np.ndarray, name: str) -> int:
  if array.ndim or array.dtype.kind not in "iu" or array < 2:
    raise ValueError(
      f"{name}: count must be an integer >= 2, found {array.dtype}"
      f" {array.tolist()}"
    )
  return int(array)


def _checked_features(
  features: np.ndarray, dimensions: int, name: str
) -> np.ndarray:
  if features.dtype != np.float32 or features.shape[1:] != (dimensions,):
    raise ValueError(
      f"{name}: features must be float32 [n, {dimensions}], found"
      f" {features.dtype} {features.shape}"
    )
  frechet.check_feature_matrix(features, f"{name}: features")
  return features


def _parsed(text: np.ndarray, name: str) -> Provenance:
  types = {"resolution": int}
  expected = [field.name for field in dataclasses.fields(Provenance)]
  try:
    record = json.loads(text.item()) if text.dtype.kind == "U" else None
  except (json.JSONDecodeError, ValueError) as error:
    raise ValueError(f"{name}: provenance is no JSON: {error}") from error
  if not isinstance(record, dict) or sorted(record) != sorted(expected):
    found = sorted(record) if isinstance(record, dict) else record
    raise ValueError(
      f"{name}: provenance must be a JSON object of {expected}, found {found}"
    )
  for field, value in record.items():
    # bool is an int to isinstance.
    if type(value) is not types.get(field, str):
      raise ValueError(
        f"{name}: provenance: {field} must be of type"
        f" {types.get(field, str).__name__}, found {value!r}"
      )
  try:
    return Provenance(**record)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error


def _check_provenance(
  found: Provenance | None, asked: dict[str, str | int | None], name: str
) -> None:
  asked = {key: value for key, value in asked.items() if value is not None}
  if found is None:
    if asked:
      logging.warning(
        "%s does not record what it was computed from; it is taken to be of %s",
        name,
        ", ".join(f"{key} {value}" for key, value in asked.items()),
      )
    return
  wrong = {
    key: value for key, value in asked.items() if getattr(found, key) != value
  }
  if wrong:
    raise ValueError(
      f"{name} is for other images or another network than asked for: "
      + ", ".join(
        f"{key} found {getattr(found, key)!r}, expected {value!r}"
        for key, value in wrong.items()
      )
    )

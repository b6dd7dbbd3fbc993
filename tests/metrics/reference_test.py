import dataclasses
import json
import pickle

import numpy as np
import pytest

from drift_jax.metrics.frechet import FeatureStats, frechet_distance
from drift_jax.metrics.reference import (
  Provenance,
  ReferenceStats,
  load_reference,
  save_reference,
)
from tests.conftest import assert_close

DIGEST = "0123456789abcdef" * 4
PROVENANCE = Provenance(
  source="imagenet2012",
  split="train",
  crop="adm",
  resolution=256,
  network="inception-v3-2015 pool3",
  network_sha256=DIGEST,
)


def stats(seed: int = 0, count: int = 50, dimensions: int = 6) -> FeatureStats:
  random = np.random.default_rng(seed)
  mixing = random.normal(size=(dimensions, dimensions))
  return FeatureStats.from_features(
    random.normal(size=(count, dimensions)) @ mixing + seed
  )


def public(path, form=("mu", "sigma"), dtype=np.float64, **others):
  """Writes a file as others publish them."""
  fitted = stats()
  arrays = {
    form[0]: fitted.mean.astype(dtype),
    form[1]: fitted.covariance().astype(dtype),
  }
  np.savez(path, **(arrays | others))
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / "stats.npz"


def test_saved_statistics_come_back(path):
  saved = ReferenceStats.from_stats(stats(), PROVENANCE)
  save_reference(path, saved)
  assert [file.name for file in path.parent.iterdir()] == ["stats.npz"]
  loaded = load_reference(
    path, dimensions=6, resolution=256, crop="adm", network_sha256=DIGEST
  )
  assert np.array_equal(loaded.mean, saved.mean)
  assert np.array_equal(loaded.covariance(), saved.covariance())
  assert loaded.count == 50
  assert loaded.provenance == PROVENANCE
  assert frechet_distance(loaded, stats()) < 1e-12
  # Other tools read the same file.
  with np.load(path) as archive:
    assert set(archive.files) == {"mu", "sigma", "count", "provenance"}
    record = json.loads(str(archive["provenance"]))
  assert record["resolution"] == 256 and record["network_sha256"] == DIGEST


@pytest.mark.parametrize("form", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_public_files(path, form, dtype):
  public(path, form, dtype)
  loaded = load_reference(path, dimensions=6)
  assert loaded.count is None and loaded.provenance is None
  assert loaded.mean.dtype == loaded.sigma.dtype == np.float64
  tolerance = 1e-15 if dtype is np.float64 else 1e-7
  assert_close(loaded.mean, stats().mean, tolerance)
  assert_close(loaded.covariance(), stats().covariance(), tolerance)
  other = stats(1)
  distance = frechet_distance(loaded, other)
  assert distance == pytest.approx(frechet_distance(stats(), other), rel=1e-6)


def test_the_adm_file_holds_more_that_is_not_read(path):
  public(
    path,
    mu_s=np.zeros(3),
    sigma_s=np.full((3, 3), np.nan),
    # Reading it would need a pickle.
    arr_0=np.array([{"not": "read"}], object),
  )
  assert load_reference(path).mean.shape == (6,)


def test_public_files_are_believed_with_a_warning(path, caplog):
  public(path)
  load_reference(path)
  assert not caplog.records
  load_reference(path, resolution=256, crop="adm")
  assert "taken to be of resolution 256, crop adm" in caplog.text


@pytest.mark.parametrize(
  "asked, message",
  [
    ({"resolution": 64}, "resolution found 256, expected 64"),
    ({"crop": "resize"}, "crop found 'adm', expected 'resize'"),
    ({"network_sha256": "0" * 64}, f"found '{DIGEST}', expected '0000"),
    ({"resolution": 64, "crop": "x"}, "resolution found.*crop found"),
    ({"dimensions": 2048}, "dimensions found 6, expected 2048"),
  ],
)
def test_statistics_of_something_else_are_refused(path, asked, message):
  save_reference(path, ReferenceStats.from_stats(stats(), PROVENANCE))
  with pytest.raises(ValueError, match=f"stats.npz.*{message}"):
    load_reference(path, **asked)


def identity(*entries) -> np.ndarray:
  """[6, 6] but for (row, column, value) each."""
  sigma = np.eye(6)
  for row, column, value in entries:
    sigma[row, column] = value
  return sigma


@pytest.mark.parametrize(
  "arrays, message",
  [
    ({"sigma": np.eye(5)}, r"expected mu \[D\].*\(6,\) and \(5, 5\)"),
    ({"mu": np.zeros((1, 6))}, r"\(1, 6\) and \(6, 6\)"),
    ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"\(0,\) and"),
    ({"mu": np.full(6, np.inf)}, "6 of 6 numbers in mu are not finite"),
    ({"sigma": identity((0, 3, np.nan))}, "1 of 36 numbers in sigma"),
    ({"sigma": identity((1, 2, 1e-3))}, "up to 0.001, expected at most 1e-05"),
    ({"sigma": identity((2, 2, -1.0))}, "smallest variance is -1"),
    ({"sigma": identity((1, 2, 1.5), (2, 1, 1.5))}, "an entry exceeds"),
    ({"mu": np.zeros(6, np.int64)}, "mu must be float32.*found int64"),
    ({"sigma": np.array([{}], object)}, "sigma cannot be read.*allow_pickle"),
    ({"ref_mu": np.zeros(6), "ref_sigma": np.eye(6)}, "either mu.*or ref_mu"),
    ({"count": np.float64(7.0)}, "count must be an integer.*float64 7.0"),
    ({"count": np.int64(1)}, "count must be an integer >= 2.*1"),
    ({"provenance": np.str_("{")}, "provenance is no record"),
    ({"provenance": np.str_("{}")}, "provenance is no record"),
    ({"provenance": np.zeros(3)}, "provenance is no record"),
  ],
)
def test_broken_arrays(path, arrays, message):
  public(path, **arrays)
  with pytest.raises(ValueError, match=f"stats.npz.*{message}"):
    load_reference(path)


def test_rounding_of_float32_sums_is_no_asymmetry(path):
  sigma = stats().covariance()
  noise = np.random.default_rng(2).normal(size=sigma.shape)
  public(path, sigma=sigma + 1e-7 * np.abs(sigma).max() * noise)
  loaded = load_reference(path)
  assert np.array_equal(loaded.sigma, loaded.sigma.T)
  assert_close(loaded.sigma, sigma, 1e-6)


def test_other_files_are_refused(path):
  np.savez(path, mu=np.zeros(3), arr_0=np.zeros(2))
  with pytest.raises(ValueError, match=r"the file holds \['arr_0', 'mu'\]"):
    load_reference(path)
  whole = public(path).read_bytes()
  flipped = bytearray(whole)
  flipped[200] ^= 1
  for data, message in (
    (pickle.dumps({"mu": np.zeros(3)}), "no .npz file"),
    (whole[: len(whole) // 2], "cut short"),
    (bytes(flipped), "is damaged: Bad CRC"),
    (2 * whole, "several files in one"),
  ):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"stats.npz.*{message}"):
      load_reference(path)
  with pytest.raises(FileNotFoundError):
    load_reference(path.parent / "none.npz")


@pytest.mark.parametrize(
  "field, value",
  [
    ("source", ""),
    ("crop", 3),
    ("resolution", 0),
    ("resolution", -1),
    ("resolution", 256.0),
    ("network_sha256", "ab"),
    ("network_sha256", "Z" * 64),
  ],
)
def test_bad_provenance(path, field, value):
  record = dataclasses.asdict(PROVENANCE) | {field: value}
  public(path, provenance=np.str_(json.dumps(record)))
  with pytest.raises(ValueError, match=rf"stats.npz.*provenance[\s\S]*{field}"):
    load_reference(path)

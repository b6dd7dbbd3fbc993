import dataclasses
import json

import numpy as np
import pytest

from drift_jax.metrics.frechet import frechet_distance
from drift_jax.metrics.reference import (
  ReferenceStats,
  load_reference,
  save_reference,
)
from tests.conftest import assert_close
from tests.metrics.conftest import PROVENANCE, stats

DIGEST = PROVENANCE.network_sha256


def public(path, form=("mu", "sigma"), dtype=np.float64, **others):
  """Writes a file as others publish them."""
  arrays = stats(0).mean.astype(dtype), stats(0).covariance().astype(dtype)
  np.savez(path, **(dict(zip(form, arrays, strict=True)) | others))
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / "stats.npz"


def test_saved_statistics_come_back(path):
  saved = ReferenceStats.from_stats(stats(0), PROVENANCE)
  save_reference(path, saved)
  assert [file.name for file in path.parent.iterdir()] == ["stats.npz"]
  loaded = load_reference(
    path, dimensions=6, resolution=256, crop="adm", network_sha256=DIGEST
  )
  assert np.array_equal(loaded.mean, saved.mean)
  assert np.array_equal(loaded.covariance(), saved.covariance())
  assert loaded.count == 60
  assert loaded.provenance == PROVENANCE
  assert frechet_distance(loaded, stats(0)) < 1e-12
  # Other tools read the same file.
  with np.load(path) as archive:
    assert archive.files == ["mu", "sigma", "provenance", "count"]
    record = json.loads(str(archive["provenance"]))
  assert record == dataclasses.asdict(PROVENANCE)


@pytest.mark.parametrize("form", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_public_files(path, form, dtype):
  # The one of ADM holds more; reading it would need a pickle.
  public(path, form, dtype, mu_s=np.zeros(3), arr_0=np.array([{}], object))
  loaded = load_reference(path, dimensions=6)
  assert loaded.count is None and loaded.provenance is None
  assert loaded.mean.dtype == loaded.sigma.dtype == np.float64
  tolerance = 1e-15 if dtype is np.float64 else 1e-7
  assert_close(loaded.mean, stats(0).mean, tolerance)
  assert_close(loaded.covariance(), stats(0).covariance(), tolerance)


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
    ({"dimensions": 2048}, "6 dimensions, expected 2048"),
  ],
)
def test_statistics_of_something_else_are_refused(path, asked, message):
  save_reference(path, ReferenceStats.from_stats(stats(0), PROVENANCE))
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
    ({"mu": np.full(6, np.inf)}, "6 of 6 numbers in mu are not finite"),
    ({"sigma": identity((0, 3, np.nan))}, "1 of 36 numbers in sigma"),
    ({"sigma": identity((1, 2, 1e-3))}, "up to 0.001, expected at most 1e-05"),
    ({"sigma": identity((2, 2, -1.0))}, "smallest variance is -1"),
    ({"sigma": identity((1, 2, 1.5), (2, 1, 1.5))}, "an entry exceeds"),
    ({"mu": np.zeros(6, np.int64)}, "mu must be float32.*found int64"),
    ({"sigma": np.array([{}], object)}, "sigma cannot be read.*allow_pickle"),
    ({"ref_mu": np.zeros(6), "ref_sigma": np.eye(6)}, "must hold either mu"),
    ({"count": np.float64(7.0)}, "count must be an integer.*float64 7.0"),
    ({"provenance": np.str_("{")}, "provenance is no record"),
    ({"provenance": np.zeros(3)}, "provenance is no record"),
  ],
)
def test_broken_arrays(path, arrays, message):
  public(path, **arrays)
  with pytest.raises(ValueError, match=f"stats.npz.*{message}"):
    load_reference(path)


def test_rounding_of_float32_sums_is_no_asymmetry(path):
  sigma = stats(0).covariance()
  noise = np.random.default_rng(2).normal(size=sigma.shape)
  public(path, sigma=sigma + 1e-7 * np.abs(sigma).max() * noise)
  loaded = load_reference(path)
  assert np.array_equal(loaded.sigma, loaded.sigma.T)
  assert_close(loaded.sigma, sigma, 1e-6)


def test_other_files_are_refused(path):
  np.savez(path, mu=np.zeros(3), arr_0=np.zeros(2))
  with pytest.raises(ValueError, match=r"it holds \['arr_0', 'mu'\]"):
    load_reference(path)
  flipped = bytearray(public(path).read_bytes())
  flipped[200] ^= 1
  path.write_bytes(bytes(flipped))
  with pytest.raises(ValueError, match="stats.npz is damaged: Bad CRC"):
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

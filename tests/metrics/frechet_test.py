import functools
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.metrics import frechet
from drift_jax.metrics.frechet import (
  FeatureStats,
  FeatureStream,
  frechet_distance,
)
from tests.conftest import assert_close
from tests.metrics.conftest import random_features, stats

CASES = ["shifted", "same", "rank_deficient", "relu_like"]


def distance_from_features(x: np.ndarray, y: np.ndarray) -> float:
  """FD with the root's trace as the nuclear norm of X Y^T: no covariances."""
  x, y = x.astype(np.float64), y.astype(np.float64)
  centred_x = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
  centred_y = (y - y.mean(axis=0)) / np.sqrt(len(y) - 1)
  return float(
    np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2)
    + np.sum(centred_x**2)
    + np.sum(centred_y**2)
    - 2.0 * np.linalg.norm(centred_x @ centred_y.T, "nuc")
  )


@pytest.mark.parametrize("case", CASES)
def test_golden_statistics_and_distance(golden, case):
  arrays = golden("metrics")
  features, fitted = {}, {}
  for side in ("ref", "gen"):
    features[side] = arrays[f"fid/{case}/features_{side}"]
    fitted[side] = FeatureStats.from_features(features[side])
    mean, sigma = (arrays[f"fid/{case}/{x}_{side}"] for x in ("mu", "sigma"))
    assert_close(fitted[side].mean, mean, 1e-12)
    assert_close(fitted[side].covariance(), sigma, 1e-12)
  distance = frechet_distance(fitted["ref"], fitted["gen"])
  exact = distance_from_features(features["ref"], features["gen"])
  assert abs(distance - exact) <= 1e-12 * max(exact, 1.0)
  expected = float(arrays[f"fid/{case}/fid"])
  # Where the rank is deficient, square roots of rounding put the published
  # algorithms 1.5e-8 away from the exact value.
  tolerance = 3e-8 if case == "rank_deficient" else 1e-12
  assert abs(distance - expected) <= tolerance * max(expected, 1.0)


def test_closed_form_for_gaussians_with_common_axes():
  random = np.random.default_rng(3)
  axes = np.linalg.qr(random.normal(size=(5, 5)))[0]
  mean_a, mean_b = random.normal(size=(2, 5))
  # Variances over eight orders of magnitude, one of them zero on one side.
  sigma_a = np.array([1e2, 3.0, 1e-2, 1e-6, 0.0])
  sigma_b = np.array([1e1, 5.0, 2.0, 1e-3, 0.5])
  count = 11
  a, b = (
    FeatureStats(count, mean, (axes * s**2) @ axes.T * (count - 1))
    for mean, s in ((mean_a, sigma_a), (mean_b, sigma_b))
  )
  expected = np.sum((mean_a - mean_b) ** 2) + np.sum((sigma_a - sigma_b) ** 2)
  assert abs(frechet_distance(a, b) / expected - 1.0) < 1e-9


@pytest.mark.parametrize("count", [200, 20])
def test_properties_of_a_distance(count):
  a = stats(4, count, 64)
  assert 0.0 <= frechet_distance(a, a) < 1e-10 * np.trace(a.covariance())
  constant = [FeatureStats.from_features(np.full((9, 3), x)) for x in (1.0, 3)]
  assert frechet_distance(*constant) == pytest.approx(12.0, rel=1e-12)
  x, y = random_features(7, 80, 6), random_features(8, count // 5, 6)
  axes = np.linalg.qr(np.random.default_rng(9).normal(size=(6, 6)))[0]
  distance, moved, scaled = (
    frechet_distance(
      FeatureStats.from_features(move(x)), FeatureStats.from_features(move(y))
    )
    for move in (lambda z: z, lambda z: z @ axes + 5.0, lambda z: 3.0 * z)
  )
  assert moved == pytest.approx(distance, rel=1e-10) and distance > 1.0
  assert scaled == pytest.approx(9.0 * distance, rel=1e-10)
  swapped = [FeatureStats.from_features(z) for z in (y, x)]
  assert frechet_distance(*swapped) == pytest.approx(distance, rel=1e-12)


@pytest.mark.parametrize("splits", [[1], [49], [1, 2, 3]])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streaming_merge_equals_one_shot(splits, offset):
  features = random_features(10, 50, 6) + offset
  whole = FeatureStats.from_features(features)
  parts = [FeatureStats.from_features(x) for x in np.split(features, splits)]
  for ordered in (parts, parts[::-1]):
    merged = functools.reduce(FeatureStats.merge, ordered)
    assert merged.count == 50
    assert_close(merged.mean, whole.mean, 1e-14)
    # One rounding of an offset of 1e6 is 1e-10 of these features.
    assert_close(merged.scatter, whole.scatter, 1e-9 if offset else 1e-13)


def test_bfloat16_and_float32_features_are_summed_in_float64():
  values = np.random.default_rng(11).normal(size=(40, 3)).astype(np.float32)
  rounded = jnp.asarray(values, jnp.bfloat16)
  expected = np.cov(np.asarray(rounded).astype(np.float64), rowvar=False)
  result = FeatureStats.from_features(rounded)
  assert result.mean.dtype == result.scatter.dtype == np.float64
  assert_close(result.covariance(), expected, 1e-14)


@pytest.mark.parametrize("decades", [2, 6, 14])
def test_both_factorisations_agree_with_the_oracle(monkeypatch, decades):
  random = np.random.default_rng(16)
  scales = np.logspace(0, -decades / 2, 24)
  x, y = (
    (random.normal(size=(400, 24)) * scales)
    @ np.linalg.qr(random.normal(size=(24, 24)))[0]
    + shift
    for shift in (0.0, 0.1)
  )
  a, b = FeatureStats.from_features(x), FeatureStats.from_features(y)
  assert (frechet._cholesky(a.covariance()) is None) == (decades == 14)
  distance = frechet_distance(a, b)
  assert distance == pytest.approx(distance_from_features(x, y), rel=1e-12)
  monkeypatch.setattr(frechet, "_cholesky", lambda covariance: None)
  assert frechet_distance(a, b) == pytest.approx(distance, rel=1e-13)


@pytest.mark.parametrize("sizes", [[1, 7, 30], [64], [100, 3], [45]])
def test_a_stream_does_not_depend_on_batches(monkeypatch, sizes):
  monkeypatch.setattr(frechet, "_CHUNK_ROWS", 16)
  features = random_features(17, 107, 5)
  once, stream = FeatureStream(), FeatureStream()
  once.update(features)
  start = 0
  for size in (sizes * 107)[:107]:
    batch = features[start : start + size].copy()
    stream.update(batch)
    # Nobody but the stream may hold what it keeps.
    batch[:] = np.nan
    start = min(start + size, 107)
    assert stream.result().count == start
  result, expected = stream.result(), once.result()
  assert np.array_equal(result.mean, expected.mean)
  assert np.array_equal(result.scatter, expected.scatter)
  whole = FeatureStats.from_features(features)
  assert_close(result.mean, whole.mean, 1e-15)
  assert_close(result.scatter, whole.scatter, 1e-14)


def test_few_samples_are_warned_of(caplog):
  frechet_distance(stats(13, 7, 6), stats(14, 7, 6))
  assert not caplog.records
  frechet_distance(stats(13, 9, 6), stats(14, 6, 6))
  assert "9 and 6 feature vectors of dimension 6" in caplog.text
  assert "at least 7 of each are needed" in caplog.text


def test_bad_features():
  for features, message in (
    (np.zeros((0, 3)), r"non-empty.*\(0, 3\)"),
    (np.zeros(3), r"\[N, D\]"),
    (np.array([[0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0]]), "2 of 3.*row 1"),
  ):
    with pytest.raises(ValueError, match=message):
      FeatureStats.from_features(features)
  one, other = FeatureStats.from_features(np.zeros((1, 6))), stats(15, 60, 4)
  with pytest.raises(ValueError, match="at least 2.*got 1"):
    frechet_distance(one, stats(15))
  with pytest.raises(ValueError, match="6 .*against 4"):
    frechet_distance(stats(15), other)
  stream = FeatureStream()
  with pytest.raises(ValueError, match="no features"):
    stream.result()
  stream.update(np.zeros((4, 3)))
  with pytest.raises(ValueError, match=r"shape \(4,2\) into shape \(4,3\)"):
    stream.update(np.zeros((4, 2)))
  assert stream.result().count == 4


@pytest.mark.parametrize("rows", [200, 100])
def test_memory_is_some_matrices(rows):
  """Of full rank (Cholesky) and of less (eigenvectors)."""
  a, b = stats(0, rows, 150), stats(1, rows, 150)
  frechet_distance(a, b)  # imports SciPy
  tracemalloc.start()
  frechet_distance(a, b)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < (4.2 if rows > 150 else 5.2) * 8 * 150**2

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.drift.features import pooled_features, root_mean_square
from tests.conftest import assert_close

ALL = {
  "patch_mean_size": (2, 4),
  "patch_std_size": (2, 4),
  "use_mean": True,
  "use_std": True,
}


def _map(height: int, width: int, channels: int = 3) -> np.ndarray:
  random = np.random.RandomState(height * 100 + width)
  return random.randn(2, height, width, channels).astype(np.float32)


def _patches(x: np.ndarray, size: int) -> np.ndarray:
  """[B, T, size * size, C] by explicit slicing, row-major, float64."""
  x = x.astype(np.float64)
  patches = [
    x[:, i : i + size, j : j + size].reshape(len(x), size * size, -1)
    for i in range(0, x.shape[1], size)
    for j in range(0, x.shape[2], size)
  ]
  return np.stack(patches, axis=1)


def test_values_equal_a_float64_oracle():
  x = _map(8, 4)
  features = pooled_features(jnp.asarray(x), "f", **ALL)
  expected = {"f": x.reshape(2, 32, 3)}
  whole = x.astype(np.float64).reshape(2, 1, 32, 3)
  for suffix, patches in (
    ("", whole),
    ("_2", _patches(x, 2)),
    ("_4", _patches(x, 4)),
  ):
    mean = patches.mean(axis=2)
    variance = ((patches - mean[:, :, None]) ** 2).mean(axis=2)
    expected[f"f_mean{suffix}"] = mean
    expected[f"f_std{suffix}"] = np.sqrt(variance + 1e-6)
  assert features.keys() == expected.keys()
  for key, value in expected.items():
    assert_close(features[key], value, 1e-6, key)


def _shapes(height: int, width: int, **changes):
  """Features without their values."""
  return jax.eval_shape(
    lambda x: pooled_features(x, "f", **(ALL | changes)), _map(height, width)
  )


@pytest.mark.parametrize(
  ("height", "width", "sizes"),
  [(8, 8, {2, 4}), (6, 8, {2}), (2, 2, {2}), (3, 4, set()), (1, 1, set())],
)
def test_patches_only_where_the_map_divides(height, width, sizes):
  features = _shapes(height, width)
  expected = {"f", "f_mean", "f_std"}
  expected |= {f"f_{s}_{k}" for s in ("mean", "std") for k in sizes}
  assert features.keys() == expected
  for k in sizes:
    assert features[f"f_mean_{k}"].shape == (2, height * width // k**2, 3)


def test_each_switch_removes_its_own_keys():
  full = set(_shapes(4, 4))
  for option, value, removed in (
    ("use_mean", False, {"f_mean"}),
    ("use_std", False, {"f_std"}),
    ("patch_mean_size", (4,), {"f_mean_2"}),
    ("patch_std_size", (), {"f_std_2", "f_std_4"}),
  ):
    assert full - set(_shapes(4, 4, **{option: value})) == removed


def test_bfloat16_statistics_are_taken_in_float32():
  # Around 100 a bfloat16 step is 0.5: rounding any intermediate shows.
  x = jnp.asarray(100 + _map(8, 8), jnp.bfloat16)
  features = pooled_features(x, "f", **ALL)
  exact = np.asarray(x, np.float64)
  for key, value in features.items():
    expected = jnp.float32 if "_std" in key else jnp.bfloat16
    assert value.dtype == expected, key
  assert_close(features["f_std"][:, 0], np.sqrt(exact.var((1, 2)) + 1e-6), 1e-5)
  mean = jnp.asarray(exact.mean((1, 2)), jnp.bfloat16)
  np.testing.assert_array_equal(features["f_mean"][:, 0], mean)


def test_constant_map_has_std_of_the_epsilon_and_a_finite_gradient():
  x = jnp.full((1, 4, 4, 2), 3.0)

  def total(x):
    vectors = list(pooled_features(x, "f", **ALL).values())
    return sum(v.sum() for v in [*vectors, root_mean_square(0 * x)])

  features = pooled_features(x, "f", **ALL)
  np.testing.assert_allclose(features["f_std_2"], 1e-3, rtol=1e-6)
  assert np.isfinite(jax.jit(jax.grad(total))(x)).all()


def test_root_mean_square_equals_a_float64_oracle():
  x = _map(5, 3)
  expected = np.sqrt((x.astype(np.float64) ** 2).mean((1, 2)) + 1e-6)
  assert_close(root_mean_square(jnp.asarray(x))[:, 0], expected, 1e-6)


@pytest.mark.parametrize("sizes", [(2, 4), (1, 2, 3, 4, 12), (4,), ()])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_gradient_equals_a_float64_oracle(sizes, offset):
  """d mean / dx = 1 / n, d std / dx = (x - mean) / (n std)."""
  x = _map(12, 24) + np.float32(offset)
  options = ALL | {"patch_mean_size": sizes, "patch_std_size": sizes}
  features = jax.eval_shape(
    lambda x: pooled_features(x, "f", **options), jnp.asarray(x)
  )
  random = np.random.RandomState(0)
  cotangents = {
    key: random.randn(*value.shape).astype(np.float32)
    for key, value in features.items()
  }

  @jax.jit
  def gradient(x):
    _, vjp = jax.vjp(lambda x: pooled_features(x, "f", **options), x)
    return vjp(jax.tree.map(jnp.asarray, cotangents))[0]

  wide = x.astype(np.float64)
  expected = cotangents["f"].astype(np.float64).reshape(x.shape)
  for suffix, rows, columns in (
    ("", 12, 24),
    *((f"_{size}", size, size) for size in sizes),
  ):
    one = np.ones((1, rows, columns, 1))

    def spread(patches: np.ndarray, one: np.ndarray = one) -> np.ndarray:
      """[B, T, C] or [B, h, w, C] -> [B, 12, 24, C]."""
      grid = patches.reshape(len(x), 12 // one.shape[1], 24 // one.shape[2], -1)
      return np.kron(grid, one)

    split = wide.reshape(len(x), 12 // rows, rows, 24 // columns, columns, -1)
    mean, variance = split.mean(axis=(2, 4)), split.var(axis=(2, 4))
    count = rows * columns
    expected += spread(cotangents[f"f_mean{suffix}"]) / count
    slope = cotangents[f"f_std{suffix}"].reshape(mean.shape)
    slope = slope / (count * np.sqrt(variance + 1e-6))
    expected += (wide - spread(mean)) * spread(slope)
  # Around 100 the input itself has 1e-5 of its spread.
  assert_close(gradient(x), expected, 2e-6 if offset == 0.0 else 2e-5)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.models import convolutions
from tests.conftest import assert_close


def _normal(seed: int, *shape: int) -> np.ndarray:
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (4, 3), (1, 5)])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolutions_of_small_maps_are_convolutions(
  size, height, width, stride
):
  layer = convolutions.conv(6, size, jnp.dtype("float32"), "conv", stride)
  kernel = _normal(0, size, size, 4, 6)
  x = _normal(1, 2, height, width, 4)
  padded = np.pad(
    x.astype(np.float64), ((0, 0), *2 * [2 * (size // 2,)], (0, 0))
  )
  expected = np.array(
    [
      [
        np.einsum(
          "bijc,ijcd->bd", padded[:, h : h + size, w : w + size], kernel
        )
        for w in range(0, width, stride)
      ]
      for h in range(0, height, stride)
    ]
  )
  out = layer.apply({"params": {"kernel": kernel}}, x)
  assert_close(out, np.moveaxis(expected, 2, 0), 1e-6)


def test_convolutions_of_few_maps_are_convolutions_and_so_are_their_gradients():
  """8 maps of 4 x 4 locations at a time, which is a product, by all 40."""
  layer = convolutions.conv(512, 3, jnp.dtype("float32"), "conv", 2)
  params = {"kernel": 0.1 * _normal(0, 3, 3, 5, 512)}
  maps, cotangents = _normal(1, 40, 8, 8, 5), _normal(2, 40, 4, 4, 512)

  @jax.jit
  def both(x, cotangent):
    apply = lambda params, x: layer.apply({"params": params}, x)  # noqa: E731
    out, vjp = jax.vjp(apply, params, x)
    return out, *vjp(cotangent)

  assert "conv_general" in str(jax.make_jaxpr(both)(maps, cotangents))
  out, gradient, by_x = both(maps, cotangents)
  parts = [slice(start, start + 8) for start in range(0, 40, 8)]
  few = [both(maps[part], cotangents[part]) for part in parts]
  traced = jax.make_jaxpr(both)(maps[:8], cotangents[:8])
  assert "conv_general" not in str(traced)
  outs, gradients, by_xs = zip(*few, strict=True)
  assert_close(np.concatenate(outs), out, 1e-6)
  assert_close(np.concatenate(by_xs), by_x, 1e-6)
  total = sum(g["kernel"] for g in gradients)
  assert_close(total, gradient["kernel"], 1e-6)


@pytest.mark.parametrize(
  ("channels", "groups"), [(4, 4), (32, 32), (48, 24), (96, 32), (37, 1)]
)
def test_group_norm_has_the_most_groups_that_divide_up_to_32(channels, groups):
  x = 3 + 2 * _normal(0, 2, 3, 3, channels)
  norm = convolutions.GroupNorm(jnp.dtype("float32"), 32)
  out, _ = jax.jit(norm.init_with_output)(jax.random.key(0), x)
  grouped = x.astype(np.float64).reshape(2, 9, groups, -1)
  mean = grouped.mean((1, 3), keepdims=True)
  variance = grouped.var((1, 3), keepdims=True)
  expected = (grouped - mean) / np.sqrt(variance + 1e-6)
  assert_close(out, expected.reshape(x.shape), 1e-6)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_group_norm_has_the_gradients_of_autodiff(offset):
  """Of the plain form in float64."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 5, 12)) + offset
  params = {"scale": rng.normal(size=12), "bias": rng.normal(size=12)}
  cotangent = rng.normal(size=x.shape)

  def plain(params, x):
    rows = x.reshape(2, 15, 4, 3)
    mean = rows.mean(axis=(1, 3), keepdims=True)
    variance = rows.var(axis=(1, 3), keepdims=True)
    normal = ((rows - mean) / jnp.sqrt(variance + 1e-6)).reshape(x.shape)
    return normal * params["scale"] + params["bias"]

  def ours(params, x):
    norm = convolutions.GroupNorm(jnp.dtype(jnp.float32), 4)
    return norm.apply({"params": params}, x)

  def both(function, dtype):
    inputs = jax.tree.map(
      lambda a: jnp.asarray(a, dtype), (params, x, cotangent)
    )

    @jax.jit
    def all_of(params, x, cotangent):
      out, vjp = jax.vjp(function, params, x)
      return out, vjp(cotangent)

    return jax.tree.map(np.asarray, all_of(*inputs))

  found = both(ours, jnp.float32)
  with jax.enable_x64(True):
    expected = both(plain, jnp.float64)
  # Around 30 the input itself has 1e-6 of its spread.
  rtol = 1e-6 if offset == 0.0 else 1e-5
  jax.tree.map(lambda a, b: assert_close(a, b, rtol), found, expected)

"""Inception-v3: torch-fidelity's numbers at full size, then its properties."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from configs import models as presets
from drift_jax.models import release
from drift_jax.models.inception import (
  Inception,
  InceptionOutput,
  average_pool,
  build_inception,
  max_pool,
  preprocess,
  resize_bilinear,
)
from drift_jax.tools.conversions.inception import convert_inception
from tests.conftest import assert_close, relative_error

SIZES = (32, 64, 256)
RESIZED = ((5, 7), (48, 36), (299, 299), (310, 400))
SMALL = {"width": 1, "num_classes": 5}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The golden arrays' weights, see tests/golden/README.md."""
  random = np.random.RandomState(zlib.crc32(name.encode()))
  uniform = 2 * random.random_sample(shape) - 1
  if name.endswith((".bias", ".running_mean")):
    uniform *= 0.2
  elif len(shape) == 1:
    uniform = 1 + 0.2 * uniform
  else:
    uniform *= np.sqrt(6 / np.prod(shape[1:]))
  return uniform.astype(np.float32)


def draw_images() -> dict[Any, np.ndarray]:
  """The golden arrays' images, by size and by (height, width)."""
  random = np.random.RandomState(0)
  images = {}
  for size in SIZES:
    coarse = random.randint(0, 256, (2, 8, 8, 3))
    coarse = coarse.repeat(size // 8, axis=1).repeat(size // 8, axis=2)
    fine = random.randint(0, 256, (2, size, size, 3))
    images[size] = ((coarse + fine) // 2).astype(np.uint8)
  for height, width in RESIZED:
    drawn = random.randint(0, 256, (1, height, width, 3))
    images[height, width] = drawn.astype(np.uint8)
  return images


class Full(NamedTuple):
  arrays: dict[str, np.ndarray]
  images: dict[Any, np.ndarray]
  inception: Inception
  variables: Any
  network: Callable[[jax.Array], InceptionOutput]


@pytest.fixture(scope="module")
def full(golden):
  """The golden arrays, their images and the full-size network, compiled."""
  arrays = golden("inception")
  weights = {}
  for line in arrays["parameters"]:
    name, shape = str(line).split()
    weights[name] = draw(name, tuple(map(int, shape.split(","))))
  model_config, params = convert_inception(weights, None)
  arguments = presets.inception_fid().to_dict()
  assert release.published_config("inception", arguments) == model_config
  inception = build_inception(**arguments)
  variables = {"params": jax.device_put(params)}
  network = jax.jit(lambda x: inception.apply(variables, x, method="network"))
  return Full(arrays, draw_images(), inception, variables, network)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_golden_features(full: Full, size):
  if f"images{size}" in full.arrays:
    np.testing.assert_array_equal(
      full.images[size], full.arrays[f"images{size}"]
    )
  output = full.network(jax.jit(preprocess)(full.images[size]))
  assert output.pool3.shape == (2, 2048)
  assert {leaf.dtype for leaf in output} == {np.dtype(np.float32)}
  for name in ("pool3", "logits_unbiased", "logits_biased"):
    key = f"{name}_{size}"
    if key in full.arrays:
      assert_close(getattr(output, name), full.arrays[key], 2e-6, key)
  # What the numbers above can tell apart.
  assert relative_error(output.logits_biased, output.logits_unbiased) > 0.01
  assert relative_error(output.pool3[0], output.pool3[1]) > 0.01


@pytest.mark.parametrize(("height", "width"), RESIZED)
def test_golden_resize(golden, height, width):
  images = draw_images()[height, width].astype(np.float32)
  resized = jax.jit(lambda x: resize_bilinear(x, 299))(images)
  assert resized.shape == (1, 299, 299, 3)
  expected = golden("inception")[f"resized_{height}_{width}"]
  np.testing.assert_allclose(
    resized[:, ::23, ::19], expected, rtol=0, atol=1e-4
  )


def test_preprocess_takes_pixels_to_minus_one_and_below_one():
  images = np.zeros((1, 2, 3, 3), np.uint8)
  images[..., 1] = 128
  images[..., 2] = 255
  result = preprocess(images)
  assert result.shape == (1, 299, 299, 3) and result.dtype == jnp.float32
  for channel, value in enumerate((-1, 0, 127 / 128)):
    np.testing.assert_array_equal(result[..., channel], np.float32(value))


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((1, 4, 4, 3), np.float32), "dtype float32, want uint8.*to_uint8"),
    (np.zeros((1, 4, 4, 3), np.int32), "dtype int32, want uint8"),
    (np.zeros((4, 4, 3), np.uint8), r"shape \(4, 4, 3\), want.*\[B, H, W, 3\]"),
    (np.zeros((1, 3, 4, 4), np.uint8), r"shape \(1, 3, 4, 4\), want"),
    (np.zeros((0, 4, 4, 3), np.uint8), r"shape \(0, 4, 4, 3\), want non-empty"),
  ],
)
def test_other_images_are_refused(images, message):
  with pytest.raises(ValueError, match=message):
    build_inception(**SMALL).apply({}, images)


def _windows(x: jax.Array, stride: int, pad: int) -> np.ndarray:
  """[B, h, w, C, 9] in float64, NaN where a window leaves the input."""
  widths = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  x = np.pad(np.asarray(x, np.float64), widths, constant_values=np.nan)
  view = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
  view = view[:, ::stride, ::stride]
  return view.reshape(*view.shape[:4], 9)


def test_pools_see_only_what_is_inside():
  random = np.random.RandomState(3)
  # Far below zero, so that padding with zeros would show.
  x = jnp.asarray(random.randn(2, 7, 6, 4) - 5, jnp.float32)
  inside = _windows(x, 1, 1)
  assert_close(average_pool(x), np.nanmean(inside, -1), 3e-7)
  np.testing.assert_array_equal(max_pool(x, 1), np.nanmax(inside, -1))
  np.testing.assert_array_equal(max_pool(x, 2), _windows(x, 2, 0).max(-1))


def test_products_are_of_full_float32_on_every_device():
  """Accelerators take fewer bits by default; a CPU would not show it."""
  inception = build_inception(**SMALL)
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
  jaxpr = jax.make_jaxpr(inception.init_with_output)(jax.random.key(0), images)
  products = [
    equation.params["precision"]
    for equation in _equations(jaxpr.jaxpr)
    if equation.primitive.name in ("conv_general_dilated", "dot_general")
  ]
  assert len(products) == 95
  highest = jax.lax.Precision.HIGHEST
  assert set(products) == {(highest, highest)}


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from _equations(inner)


@pytest.mark.slow
def test_whole_over_a_mesh(full: Full):
  """Each device has one image of two, and all parameters."""
  axis_types = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh(
    (2,), ("data",), axis_types=axis_types, devices=jax.devices()[:2]
  )
  shard = NamedSharding(mesh, PartitionSpec("data"))
  output = jax.jit(full.inception.apply)(
    jax.device_put(full.variables, NamedSharding(mesh, PartitionSpec())),
    jax.device_put(full.images[32], shard),
  )
  assert output.pool3.sharding.is_equivalent_to(shard, 2)
  assert_close(output.pool3, full.arrays["pool3_32"], 2e-6)
  assert_close(output.logits_biased, full.arrays["logits_biased_32"], 2e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"width": 0}, "width=0: must be an integer >= 1"),
    ({"num_classes": True}, "num_classes=True: must be an integer >= 1"),
    ({"dtype": "bfloat16"}, "does not know 'dtype'.*: width, num_classes"),
  ],
)
def test_other_networks_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    build_inception(**SMALL | change)

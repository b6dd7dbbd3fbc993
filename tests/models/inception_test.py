"""Inception-v3: torch-fidelity's numbers at full size, then its properties."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models as presets
from drift_jax.models import release
from drift_jax.models.inception import (
  average_pool,
  build_inception,
  max_pool,
  preprocess,
  resize_bilinear,
)
from drift_jax.training.conversions.inception import convert_inception
from tests.conftest import assert_close, relative_error
from tests.models.published import draw_all

SIZES = (32, 64, 256)
RESIZED = ((5, 7), (48, 36), (299, 299), (310, 400))


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


@pytest.fixture(scope="module")
def full(golden):
  """The golden arrays, their images and the full-size network, compiled."""
  arrays = golden("inception")
  weights = draw_all(arrays["parameters"], gain=6, variance=0.2)
  model_config, params = convert_inception(weights, None)[:2]
  arguments = presets.inception_fid().to_dict()
  assert release.published_config("inception", arguments) == model_config
  inception = build_inception(**arguments)
  variables = {"params": jax.device_put(params)}
  # The weights are an argument: constants take long to compile.
  network = jax.jit(functools.partial(inception.apply, method="network"))
  return arrays, draw_images(), functools.partial(network, variables)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_golden_features(full, size):
  arrays, images, network = full
  if f"images{size}" in arrays:
    np.testing.assert_array_equal(images[size], arrays[f"images{size}"])
  output = network(jax.jit(preprocess)(images[size]))
  assert output.pool3.shape == (2, 2048)
  assert {leaf.dtype for leaf in output} == {np.dtype(np.float32)}
  for name in ("pool3", "logits_unbiased", "logits_biased"):
    key = f"{name}_{size}"
    if key in arrays:
      assert_close(getattr(output, name), arrays[key], 2e-6, key)
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

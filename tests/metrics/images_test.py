import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from drift_jax.data.readers import pixel_grid
from drift_jax.metrics.images import (
  image_grid,
  real_pixels,
  save_image,
  to_rgb,
  to_uint8,
  unit_to_uint8,
)
from drift_jax.system.errors import EvaluationError


def test_golden_conversion(golden):
  arrays = golden("metrics")
  values, expected = arrays["to_uint8/in"], arrays["to_uint8/out"]
  for result in (unit_to_uint8(values), unit_to_uint8(jnp.asarray(values))):
    assert result.dtype == np.uint8
    assert np.array_equal(result, expected)
  symmetric = np.float32(2) * values - np.float32(1)
  # Only inputs that survive the change of range in float32 can be compared.
  back = (symmetric + np.float32(1)) / np.float32(2)
  same = (back == values) | ~np.isfinite(values)
  assert same.sum() >= 9
  assert np.array_equal(to_uint8(symmetric)[same], expected[same])


def test_range_ends_truncation_and_non_finite():
  values = np.array([-1, 1, 0, -2, 2, np.nan, np.inf, -np.inf], np.float32)
  expected = [0, 255, 127, 0, 255, 0, 255, 0]
  assert to_uint8(values).tolist() == expected
  assert to_uint8(jnp.asarray(values, jnp.bfloat16)).tolist() == expected
  levels = np.arange(256)
  middle = ((levels + 0.5) / 127.5 - 1.0).astype(np.float32)
  assert np.array_equal(to_uint8(middle)[:255], levels[:255])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 4])
def test_grid_places_every_pixel(channels, padding):
  random = np.random.default_rng(0)
  images = random.uniform(-1, 1, (5, 2, 3, channels)).astype(np.float32)
  height, width = 6 + padding, 9 + padding
  shape = 3 * height + padding, 2 * width + padding, 3
  expected = np.full(shape, 255, np.uint8)
  for i, image in enumerate(to_uint8(images).repeat(3, axis=1).repeat(3, 2)):
    top, left = padding + i // 2 * height, padding + i % 2 * width
    expected[top : top + 6, left : left + 9] = image
  grid = image_grid(images, columns=2, padding=padding, scale=3)
  assert grid.dtype == np.uint8 and np.array_equal(grid, expected)


def test_save_image(tmp_path):
  images = np.zeros((3, 2, 2, 1), np.float32)
  images[1, 0, 0, 0] = np.nan
  with pytest.raises(EvaluationError, match="image 1 is not finite"):
    image_grid(images, columns=3, padding=0, scale=1)
  image = np.random.default_rng(1).integers(0, 256, (7, 5, 3), np.uint8)
  save_image(image, tmp_path / "folder" / "image.png")
  with Image.open(tmp_path / "folder" / "image.png") as opened:
    assert opened.format == "PNG"
    assert np.array_equal(np.asarray(opened), image)
  assert len(list((tmp_path / "folder").iterdir())) == 1
  with pytest.raises(ValueError, match="16390 x 5 px .*: write a .png"):
    save_image(np.zeros((5, 16390, 3), np.uint8), tmp_path / "wide.webp")


@pytest.mark.parametrize("channels", [1, 3])
def test_to_rgb_is_to_uint8_on_the_device(channels):
  images = np.random.default_rng(0).uniform(-1.3, 1.3, (2, 50, 40, channels))
  images = images.astype(np.float32)
  images[0, 0, :4, 0] = [np.nan, np.inf, -np.inf, 1.0]
  pixels = np.asarray(to_rgb(images))
  assert pixels.shape == (2, 50, 40, 3) and pixels.dtype == np.uint8
  np.testing.assert_array_equal(
    pixels, np.broadcast_to(to_uint8(images), pixels.shape)
  )
  for latents in (np.zeros((2, 4, 4, 4)), np.zeros((2, 4, 4))):
    with pytest.raises(EvaluationError, match="latents need their autoencoder"):
      to_rgb(latents.astype(np.float32))


def test_rounding_takes_the_nearest_level():
  random = np.random.default_rng(0)
  images = random.uniform(-1.1, 1.1, (3, 40, 40, 3)).astype(np.float32)
  images[0, 0, :2, 0] = [np.nan, np.inf]
  wide = np.nan_to_num(images.astype(np.float64), nan=-1, posinf=1)
  exact = np.clip((wide + 1) * 127.5, 0, 255)
  pixels = np.asarray(to_rgb(images, "round")).astype(np.float64)
  assert np.abs(pixels - exact).max() <= 0.5 + 1e-4
  # Half of the levels are one higher than truncated ones.
  assert np.mean(pixels > to_uint8(images)) == pytest.approx(0.45, abs=0.03)
  levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  stored = np.asarray(to_rgb(pixel_grid()[levels], "round"))
  np.testing.assert_array_equal(stored, levels.repeat(3, axis=-1))


def test_real_pixels_are_those_of_the_file():
  """What truncation, which generated images get, would not give."""
  levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  images = pixel_grid()[levels]
  pixels = real_pixels(images)
  np.testing.assert_array_equal(pixels, levels.repeat(3, axis=-1))
  assert (to_uint8(images) != levels).any()

"""Crops against slow oracles; the sampling of boxes."""

import math

import numpy as np
import pytest
from PIL import Image

from drift_jax.data import transforms


def box_filter(x):
  return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def bicubic_filter(x):  # Keys, a = -1/2
  x = np.abs(x)
  near = (1.5 * x - 2.5) * x * x + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def matrix(size_in: int, size_out: int, kernel, support: float) -> np.ndarray:
  """[out, in] weights of a resampling with an antialiasing kernel."""
  scale = size_in / size_out
  stretch = max(scale, 1.0)
  out = np.zeros((size_out, size_in))
  for row in range(size_out):
    centre = (row + 0.5) * scale
    first = max(int(centre - support * stretch + 0.5), 0)
    last = min(int(centre + support * stretch + 0.5), size_in)
    columns = np.arange(first, last)
    weights = kernel((columns + 0.5 - centre) / stretch)
    out[row, first:last] = weights / weights.sum()
  return out


def to_bytes(x):
  return np.clip(np.floor(x + 0.5), 0, 255)


def resize(pixels, height, width, kernel, support):
  """Rows first, rounded to 8 bits, then columns: one dense product each."""
  rows = matrix(pixels.shape[1], width, kernel, support)
  columns = matrix(pixels.shape[0], height, kernel, support)
  if width != pixels.shape[1]:
    pixels = to_bytes(np.einsum("oi,hic->hoc", rows, pixels))
  if height != pixels.shape[0]:
    pixels = to_bytes(np.einsum("oi,iwc->owc", columns, pixels))
  return pixels


def adm_crop(pixels: np.ndarray, size: int) -> np.ndarray:
  """The whole image resized in float64, then cut."""
  pixels = pixels.astype(np.float64)
  while min(pixels.shape[:2]) >= 2 * size:
    height, width = pixels.shape[:2]
    pixels = resize(pixels, height // 2, width // 2, box_filter, 0.5)
  scale = size / min(pixels.shape[:2])
  height, width = (round(side * scale) for side in pixels.shape[:2])
  pixels = resize(pixels, height, width, bicubic_filter, 2.0)
  top, left = (height - size) // 2, (width - size) // 2
  return pixels[top : top + size, left : left + size]


def photo(width: int, height: int) -> np.ndarray:
  """Smooth shades and noise, so that no filter is hidden."""
  rng = np.random.default_rng(width * 1000 + height)
  y, x = np.mgrid[:height, :width]
  shade = np.sin(x / 5)[..., None] * np.cos(y[..., None] / 7 + np.arange(3))
  pixels = 128 + 90 * shade + rng.normal(0, 25, (height, width, 3))
  return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
  ("width", "height"),
  [
    (50, 38),  # wide
    (37, 53),  # tall, odd
    (63, 63),  # just short of halving
    (64, 64),  # exactly twice: halved to the size
    (65, 131),  # halved once, odd sides
    (150, 303),  # halved twice; Pillow 13 alone would take columns first
    (33, 32),  # one column too many
    (32, 32),  # as it is
    (20, 27),  # smaller than the crop: enlarged
    (200, 33),  # a banner
    (11, 90),
  ],
)
def test_center_crop_is_adms(width, height):
  pixels = photo(width, height)
  got = np.asarray(transforms.center_crop(Image.fromarray(pixels), 32))
  want = adm_crop(pixels, 32)
  assert got.shape == (32, 32, 3)
  np.testing.assert_array_equal(got, want)


def torchvision_rule(width, height, uniform, integers, scale, ratio):
  """RandomResizedCrop.get_params, written out from its documentation."""
  for _ in range(10):
    target = height * width * uniform(*scale)
    aspect = math.exp(uniform(math.log(ratio[0]), math.log(ratio[1])))
    w = int(round(math.sqrt(target * aspect)))
    h = int(round(math.sqrt(target / aspect)))
    if 0 < w <= width and 0 < h <= height:
      i = integers(0, height - h + 1)
      j = integers(0, width - w + 1)
      return (j, i, j + w, i + h)
  if width / height < min(ratio):
    w, h = width, int(round(width / min(ratio)))
  elif width / height > max(ratio):
    h, w = height, int(round(height * max(ratio)))
  else:
    w, h = width, height
  i, j = (height - h) // 2, (width - w) // 2
  return (j, i, j + w, i + h)


@pytest.mark.parametrize(
  ("width", "height"), [(50, 38), (31, 64), (400, 20), (9, 300), (2, 2)]
)
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.9, 1.0)])
def test_boxes_follow_torchvision(width, height, scale):
  ratio = (3 / 4, 4 / 3)
  for seed in range(50):
    a, b = np.random.default_rng(seed), np.random.default_rng(seed)
    box = transforms.sample_crop(width, height, a, scale)
    want = torchvision_rule(width, height, b.uniform, b.integers, scale, ratio)
    assert box == want
    assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height


def test_random_resized_crop_resizes_the_box():
  pixels = photo(61, 47)
  image = Image.fromarray(pixels)
  for seed in range(5):
    rng = np.random.default_rng(seed)
    left, top, right, bottom = transforms.sample_crop(
      61, 47, np.random.default_rng(seed), (0.2, 1.0)
    )
    got = np.asarray(
      transforms.random_resized_crop(image, 24, rng, (0.2, 1.0)), np.float64
    )
    # Inside, where no edge is near, the crop alone gives the same.
    alone = resize(
      pixels[top:bottom, left:right].astype(np.float64),
      24,
      24,
      bicubic_filter,
      2.0,
    )
    inside = (slice(3, -3), slice(3, -3))
    assert np.abs(got[inside] - alone[inside]).max() <= 1
    again = transforms.random_resized_crop(
      image, 24, np.random.default_rng(seed), (0.2, 1.0)
    )
    np.testing.assert_array_equal(got, np.asarray(again))


def test_pad_centres_on_black():
  image = Image.fromarray(np.full((28, 27), 200, np.uint8))
  padded = np.asarray(transforms.pad(image, 32))
  assert padded.shape == (32, 32)
  assert (padded[2:30, 2:29] == 200).all()
  assert padded.sum() == 28 * 27 * 200

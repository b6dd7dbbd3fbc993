"""Crops and flips of PIL images; pure, seeded by the caller's generator."""

import math

import numpy as np
from PIL import Image

_ATTEMPTS = 10
# Bounds of a random crop's width / height.
_RATIO = (3 / 4, 4 / 3)


def _resize(
  image: Image.Image, width: int, height: int, resample: Image.Resampling
) -> Image.Image:
  """Resized by rows, rounded to 8 bits, then by columns.

  Up to Pillow 12 that was its order, in which the reference statistics were
  made. Pillow 13 alone takes the columns first if an image is more than
  twice as tall as wide, which moves one pixel in eight by a grey level.
  """
  image = image.resize((width, image.height), resample)
  return image.resize((width, height), resample)


def center_crop(image: Image.Image, size: int) -> Image.Image:
  """ADM's centre crop, [h, w] -> [size, size]; the reference statistics' own.

  Halves the image with a box filter while its shorter side is at least
  2 * size, resizes the shorter side to `size` with a bicubic filter, and
  cuts the middle out. An image of size x size passes unchanged; a smaller
  one is enlarged.
  """
  if image.size == (size, size):
    return image
  while min(image.size) >= 2 * size:
    width, height = image.width // 2, image.height // 2
    image = _resize(image, width, height, Image.Resampling.BOX)
  scale = size / min(image.size)
  width, height = round(image.width * scale), round(image.height * scale)
  left, top = (width - size) // 2, (height - size) // 2
  # As _resize does, but columns that the crop drops need no second pass.
  image = image.resize((width, image.height), Image.Resampling.BICUBIC)
  image = image.crop((left, 0, left + size, image.height))
  image = image.resize((size, height), Image.Resampling.BICUBIC)
  return image.crop((0, top, size, top + size))


def sample_crop(
  width: int, height: int, rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
  """A random box (left, top, right, bottom) by torchvision's rule.

  Ten times: area ~ U(scale) of the image's, log(width / height) ~
  U(log 3/4, log 4/3), both sides rounded; the first that fits is placed
  uniformly. If none fits: the largest centred box whose ratio lies within
  these bounds.
  """
  for _ in range(_ATTEMPTS):
    area = width * height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(height - h + 1))
      left = int(rng.integers(width - w + 1))
      return left, top, left + w, top + h
  aspect = min(max(width / height, _RATIO[0]), _RATIO[1])
  w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_resized_crop(
  image: Image.Image,
  size: int,
  rng: np.random.Generator,
  scale: tuple[float, float],
) -> Image.Image:
  """A random part of the image, resized to [size, size] with bicubic.

  It is filtered in one pass with what lies around the box; cropping first
  would repeat the box's edge.

  Args:
    image: of any size.
    size: side of the result.
    rng: draws the box (see `sample_crop`).
    scale: bounds of the box's share of the image's area.
  """
  box = sample_crop(image.width, image.height, rng, scale)
  return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def pad(image: Image.Image, size: int) -> Image.Image:
  """The image in the middle of a black square: 28 x 28 digits -> 32 x 32."""
  out = Image.new(image.mode, (size, size))
  out.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
  return out


def flip(image: Image.Image) -> Image.Image:
  """Left becomes right."""
  return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

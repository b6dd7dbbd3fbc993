"""Generated samples as 8-bit images."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from drift_jax.metrics import files
from drift_jax.system import options, paths
from drift_jax.system.errors import EvaluationError

Images = np.ndarray | jax.Array


# Pillow's options of a format, and the most pixels of a side. JPEG without
# chroma subsampling: grids have sharp edges.
_JPEG = {"quality": 95, "subsampling": 0}, 65535
_FORMATS: dict[str, tuple[dict[str, Any], int]] = {
  ".png": ({}, 2**31 - 1),
  ".jpg": _JPEG,
  ".jpeg": _JPEG,
  ".webp": ({"lossless": True}, 16383),
}


def unit_to_uint8(images: Images) -> np.ndarray:
  """uint8(255 x) for x in [0, 1], any shape: truncated, not rounded.

  What is below 0 and NaN become 0, what is above 1 becomes 255. Truncation is
  what the published FIDs were measured with (arXiv:2602.04770, section 5.2); it
  is computed in float32.
  """
  unit = np.asarray(jax.device_get(images)).astype(np.float32)
  unit = np.where(np.isnan(unit), np.float32(0), unit)
  return (np.clip(unit, 0.0, 1.0) * np.float32(255)).astype(np.uint8)


def to_uint8(images: Images) -> np.ndarray:
  """uint8(255 (x + 1) / 2) for x in [-1, 1], any shape.

  -1 becomes 0 and 1 becomes 255; out-of-range and non-finite values are treated
  as in `unit_to_uint8`.
  """
  images = np.asarray(jax.device_get(images)).astype(np.float32)
  return unit_to_uint8((images + np.float32(1)) / np.float32(2))


@functools.partial(jax.jit, static_argnames="pixels")
def to_rgb(images: jax.Array, pixels: options.Pixels = "truncate") -> jax.Array:
  """8-bit RGB on the device: [B, H, W, 1 or 3] -> [B, H, W, 3].

  Grey becomes three equal channels, as evaluation networks take it. 'truncate'
  is `to_uint8`; 'round' takes the nearest of the 256 levels, an even one where
  two are as near.

  Raises:
    EvaluationError: another number of channels.
  """
  if images.ndim != 4 or images.shape[-1] not in (1, 3):
    raise EvaluationError(
      "an evaluation network looks at images [B, H, W, 1 or 3], got shape"
      f" {images.shape}: latents need their autoencoder (vae.path)"
    )
  unit = (images.astype(jnp.float32) + 1) / 2
  unit = jnp.clip(jnp.where(jnp.isnan(unit), 0, unit), 0, 1)
  levels = jnp.rint(unit * 255) if pixels == "round" else unit * 255
  return jnp.broadcast_to(levels.astype(jnp.uint8), (*levels.shape[:3], 3))


def as_shown(images: jax.Array) -> jax.Array:
  """Images in [-1, 1]: what lies beyond is black or white, as on a screen.

  Any shape. What is not finite stays so, for those who check it.
  """
  return jnp.where(jnp.isfinite(images), jnp.clip(images, -1, 1), images)


def real_pixels(images: np.ndarray) -> np.ndarray:
  """Real images [n, H, W, 1 or 3] in [-1, 1] -> uint8 [n, H, W, 3], rounded.

  The inverse of pixel p -> p / 127.5 - 1, which truncation is not: what real
  images are compared by must be the pixels of their files.
  """
  pixels = np.rint((np.asarray(images, np.float32) + 1) * np.float32(127.5))
  pixels = np.clip(pixels, 0, 255).astype(np.uint8)
  return np.broadcast_to(pixels, (*pixels.shape[:3], 3))


def require_finite(images: Images, labels: np.ndarray | None = None) -> None:
  """Raises EvaluationError if an image [N, ...] holds NaN or infinity.

  Eight bits have neither: such an image would become a black one.

  Args:
    images: floating-point numbers.
    labels: [N], named in the message; None if unknown.
  """
  flat = np.asarray(jax.device_get(images)).reshape(len(images), -1)
  bad = np.flatnonzero(~np.isfinite(flat.astype(np.float32)).all(axis=1))
  if len(bad):
    label = "" if labels is None else f" (label {labels[bad[0]]})"
    raise EvaluationError(
      f"image {bad[0]}{label} is not finite, and {len(bad)} of {len(flat)} are"
      " not: the weights or their inputs are out of range"
    )


def image_grid(
  images: Images, *, columns: int, padding: int, scale: int
) -> np.ndarray:
  """Lays images out in rows, left to right and top to bottom.

  Args:
    images: [N, H, W, C] in [-1, 1], C = 1 (grey) or 3 (RGB), N >= 1.
    columns: images in a row; the last row may be shorter.
    padding: white pixels between images and around them, >= 0.
    scale: each pixel becomes scale x scale equal ones, >= 1.

  Returns:
    uint8 [rows (scale H + padding) + padding, columns (...) + padding, 3].

  Raises:
    EvaluationError: images that are not finite, or of other channels.
  """
  if images.shape[-1] not in (1, 3):
    raise EvaluationError(
      f"a picture shows images [N, H, W, 1 or 3], got shape {images.shape}: "
      "latents need their autoencoder (vae.path), and arrays of another "
      "encoder have no picture"
    )
  require_finite(images)
  pixels = to_uint8(images).repeat(scale, axis=1).repeat(scale, axis=2)
  count, height, width, _ = pixels.shape
  rows = -(-count // columns)
  # Each image with the padding below it and to its right.
  shape = rows * columns, height + padding, width + padding, 3
  cells = np.full(shape, 255, np.uint8)
  cells[:count, :height, :width] = pixels
  cells = cells.reshape(rows, columns, *shape[1:]).swapaxes(1, 2)
  grid = cells.reshape(rows * shape[1], columns * shape[2], 3)
  return np.pad(grid, ((padding, 0), (padding, 0), (0, 0)), constant_values=255)


def save_image(image: np.ndarray, path: files.PathLike) -> None:
  """Writes uint8 [H, W, 3] to a file; it appears whole or not at all.

  Args:
    image: RGB.
    path: .png, .jpg, .jpeg or .webp.

  Raises:
    ValueError: another suffix, or more pixels than the format can hold.
  """
  suffix = paths.check_suffix(path, options.PICTURES)
  written, limit = _FORMATS[suffix]
  if max(image.shape) > limit:
    raise ValueError(
      f"{os.fspath(path)}: {image.shape[1]} x {image.shape[0]} px (width x"
      f" height) are more than the {limit} px a side of a {suffix}: write a"
      " .png"
    )
  name = Image.registered_extensions()[suffix]
  with files.replacing(path) as temporary:
    Image.fromarray(image).save(temporary, format=name, **written)

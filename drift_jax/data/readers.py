"""Readers: training records of one shape from a source, seeded by record."""

import itertools
from collections.abc import Sequence
from concurrent import futures
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from PIL import Image

from drift_jax.data import sources, transforms
from drift_jax.data.errors import DataError

CROPS = ("center", "random", "pad", "none")
WIRES = ("uint8", "float32", "float16", "bfloat16")
IMAGE_WIRES = ("uint8", "float32")
# Of one read: four images of 256 px.
_PIXELS_AT_ONCE = 2**18
_IMAGES_AT_ONCE = 64


class Reader(Protocol):
  """Records [H, W, C] of one shape, by index.

  Attributes:
    class_names: one name for each label.
    labels: [N] int32.
    sample_shape: (H, W, C) of one record.
    dtype: of `read`'s records, as they travel to the device: uint8 (pixel p
      means p / 127.5 - 1), float32, float16 or bfloat16.
    grid: ascending float32, the values that `fixed` can take; None where they
      are continuous.
    chunk: records that one call should take for speed.
  """

  @property
  def class_names(self) -> tuple[str, ...]: ...

  @property
  def labels(self) -> np.ndarray: ...

  @property
  def sample_shape(self) -> tuple[int, int, int]: ...

  @property
  def dtype(self) -> np.dtype: ...

  @property
  def grid(self) -> np.ndarray | None: ...

  @property
  def chunk(self) -> int: ...

  def __len__(self) -> int: ...

  def read(
    self, indices: np.ndarray, rngs: Sequence[np.random.Generator]
  ) -> np.ndarray:
    """[c, H, W, C] of `dtype`: record i augmented by rngs[i] alone."""
    ...

  def fixed(self, indices: np.ndarray) -> np.ndarray:
    """[c, H, W, C] float32 in [-1, 1], never augmented, for evaluation."""
    ...


def pixel_grid() -> np.ndarray:
  """[256] float32: what the 8-bit pixels 0..255 mean, p / 127.5 - 1."""
  return np.arange(256, dtype=np.float32) / np.float32(127.5) - 1


class ArrayReader:
  """Images of one size in memory, unaugmented.

  Attributes:
    class_names: one name for each label.
    labels: [N] int32.
    sample_shape: (H, W, C) of one image.
    dtype: of `read`'s images.
    grid: the values that a pixel can take.
    chunk: 1024; there is nothing to decode.
  """

  chunk = 1024

  def __init__(self, source: sources.ArraySource, *, wire: str):
    """Checks that the images survive the way to the device.

    Args:
      source: the images.
      wire: 'float32', 'float16' or 'bfloat16'; the values must be exact in it.

    Raises:
      ValueError: they are not, as for uint8, which holds p / 127.5 - 1.
    """
    if wire not in WIRES:
      raise ValueError(f"data.wire={wire!r}: valid options are {list(WIRES)}")
    exact = [
      name
      for name in WIRES[1:]
      if np.array_equal(
        source.grid.astype(jnp.dtype(name)).astype(np.float32), source.grid
      )
    ]
    if wire not in exact:
      raise ValueError(
        f"data.wire={wire!r} can't hold this data set's {len(source.grid)} "
        f"values of a pixel exactly: valid options are {exact}"
      )
    self.class_names = source.class_names
    self.labels = source.labels
    self.sample_shape = source.sample_shape
    self.dtype = jnp.dtype(wire)
    self.grid = source.grid
    self._images = source.images

  def __len__(self) -> int:
    return len(self._images)

  def read(
    self, indices: np.ndarray, rngs: Sequence[np.random.Generator]
  ) -> np.ndarray:
    """[c, H, W, C] of `dtype`; draws nothing."""
    del rngs
    return self._images[indices].astype(self.dtype, copy=False)

  def fixed(self, indices: np.ndarray) -> np.ndarray:
    """[c, H, W, C] float32 in [-1, 1]."""
    return self._images[indices]


class ImageReader:
  """Crops of a source's images, flipped by chance.

  Attributes:
    class_names: one name for each label.
    labels: [N] int32; the first use may take long (see the source).
    sample_shape: (size, size, channels).
    dtype: of `read`'s images.
    grid: `pixel_grid()`.
    chunk: 4 of 256 px, up to 64 of smaller images: a read costs 0.1 ms by
      itself, what decoding one of 32 px takes.
  """

  def __init__(
    self,
    source: sources.Source,
    *,
    size: int,
    channels: int,
    crop: str,
    crop_scale: tuple[float, float],
    flip: bool,
    wire: str,
    num_threads: int = 1,
  ):
    """Reads nothing yet.

    Args:
      source: uint8 RGB images of any size.
      size: height and width of a record, pixels.
      channels: 3: RGB; 1: grey, 0.299 R + 0.587 G + 0.114 B, which gives
        images that were stored as greyscale back unchanged.
      crop: 'center': ADM's centre crop; 'random': random resized crop, and
        the centre crop in `fixed`; 'pad': the whole image within a black
        border; 'none': the images have the size already.
      crop_scale: 'random' only: bounds of the crop's share of the area.
      flip: mirror half of the images that `read` gives.
      wire: 'uint8', or 'float32' for four times the bytes.
      num_threads: that decode at the same time in `fixed`; whoever calls
        `read` has threads of its own.

    Raises:
      ValueError: a value that is not among the options.
    """
    if size < 1:
      raise ValueError(f"data.image_size={size} must be at least 1")
    if channels not in (1, 3):
      raise ValueError(f"data.channels={channels}: valid options are [1, 3]")
    if crop not in CROPS:
      raise ValueError(f"data.crop={crop!r}: valid options are {list(CROPS)}")
    low, high = crop_scale
    if not 0 < low <= high <= 1:
      raise ValueError(
        f"data.crop_scale={tuple(crop_scale)}: want 0 < low <= high <= 1"
      )
    if wire not in IMAGE_WIRES:
      raise ValueError(
        f"data.wire={wire!r}: valid options for images are {list(IMAGE_WIRES)}"
      )
    self._source = source
    self._crop = crop
    self._crop_scale = (float(low), float(high))
    self._flip = flip
    self._num_threads = num_threads
    self.chunk = min(_IMAGES_AT_ONCE, max(1, _PIXELS_AT_ONCE // size**2))
    self.class_names = source.class_names
    self.sample_shape = (size, size, channels)
    self.dtype = np.dtype(wire)
    self.grid = pixel_grid()

  @property
  def labels(self) -> np.ndarray:
    """[N] int32."""
    return self._source.labels

  def __len__(self) -> int:
    return len(self._source)

  def _record(
    self, index: int, rng: np.random.Generator | None
  ) -> Image.Image | np.ndarray:
    """One record; the crop is drawn first, then the flip."""
    size, _, channels = self.sample_shape
    image = sources.image_of(self._source, index)
    if self._crop == "random" and rng is not None:
      image = transforms.random_resized_crop(image, size, rng, self._crop_scale)
    elif self._crop in ("center", "random"):
      image = transforms.center_crop(image, size)
    elif self._crop == "pad" and max(image.size) <= size:
      image = transforms.pad(image, size)
    if image.size != (size, size):
      wanted = "at most " if self._crop == "pad" else ""
      raise DataError(
        f"{sources.path_of(self._source, index)} is {image.width} x "
        f"{image.height} (width x height), but data.crop={self._crop!r} wants "
        f"every image to be {wanted}{size} x {size}: use data.crop='center'"
      )
    if channels == 1:
      image = image.convert("L")
    if self._flip and rng is not None and rng.random() < 0.5:
      image = transforms.flip(image)
    return image

  def _fill(
    self, row: np.ndarray, index: int, rng: np.random.Generator | None
  ) -> None:
    # Grey images are [H, W].
    row[...] = np.asarray(self._record(index, rng)).reshape(row.shape)

  def read(
    self, indices: np.ndarray, rngs: Sequence[np.random.Generator]
  ) -> np.ndarray:
    """[c, size, size, channels] of `dtype`; float32 in [-1, 1].

    Raises:
      DataError: an image that doesn't fit 'none' or 'pad', by path; what the
        source raises.
      OSError: what the source raises.
    """
    out = np.empty((len(indices), *self.sample_shape), np.uint8)
    for row, index, rng in zip(out, indices.tolist(), rngs, strict=True):
      self._fill(row, index, rng)
    return out if self.dtype == np.uint8 else self.grid[out]

  def fixed(self, indices: np.ndarray) -> np.ndarray:
    """[c, size, size, channels] float32 in [-1, 1]: no chance in it.

    Raises:
      DataError, OSError: as `read`.
    """
    return self.grid[self.pixels(indices)]

  def pixels(self, indices: np.ndarray) -> np.ndarray:
    """What `fixed` gives, as uint8."""
    out = np.empty((len(indices), *self.sample_shape), np.uint8)
    with futures.ThreadPoolExecutor(self._num_threads) as pool:
      # Raises what a thread raised, and drops what none has begun.
      list(pool.map(self._fill, out, indices.tolist(), itertools.repeat(None)))
    return out

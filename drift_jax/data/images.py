"""Readers of images that are decoded when they are read, or once for all."""

import functools
import itertools
from concurrent import futures

import numpy as np
from numpy.random import Generator

from drift_jax.data import transforms
from drift_jax.data.readers import Generators, Reader, pixel_grid
from drift_jax.data.sources import Source
from drift_jax.system.errors import DataError
from drift_jax.system.options import check_choice

CROPS = ("center", "random", "pad", "none")
IMAGE_WIRES = ("uint8", "float32")
# Of one read: four images of 256 px.
_PIXELS_AT_ONCE = 2**18
_IMAGES_AT_ONCE = 64


class ImageReader(Reader):
  """Crops of a source's images, flipped by chance.

  Attributes:
    grid: `pixel_grid()`.
    chunk: 4 of 256 px, up to 64 of smaller images: a read costs 0.1 ms by
      itself, what decoding one of 32 px takes.
  """

  def __init__(
    self,
    source: Source,
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
    check_choice("data.channels", channels, (1, 3))
    check_choice("data.crop", crop, CROPS)
    check_choice("data.wire", wire, IMAGE_WIRES)
    low, high = crop_scale
    if size < 1 or not 0 < low <= high <= 1:
      raise ValueError(
        f"data.image_size={size}, data.crop_scale={tuple(crop_scale)}: want "
        "size >= 1, 0 < low <= high <= 1"
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

  @functools.cached_property
  def labels(self) -> np.ndarray:
    return self._source.labels

  def __len__(self) -> int:
    return len(self._source)

  def _fill(self, row: np.ndarray, index: int, rng: Generator | None) -> None:
    """Reads one record; the crop is drawn first, then the flip."""
    size, _, channels = self.sample_shape
    image = self._source.image(index)
    if self._crop == "random" and rng is not None:
      image = transforms.random_resized_crop(image, size, rng, self._crop_scale)
    elif self._crop in ("center", "random"):
      image = transforms.center_crop(image, size)
    elif self._crop == "pad" and max(image.size) <= size:
      image = transforms.pad(image, size)
    if image.size != (size, size):
      most = "at most " if self._crop == "pad" else ""
      raise DataError(
        f"{self._source.path(index)} is {image.width} x {image.height} (width "
        f"x height), but data.crop={self._crop!r} wants every image to be "
        f"{most}{size} x {size}: use data.crop='center'"
      )
    if channels == 1:
      image = image.convert("L")
    if self._flip and rng is not None and rng.random() < 0.5:
      image = transforms.flip(image)
    # Grey images are [H, W].
    row[...] = np.asarray(image).reshape(row.shape)

  def read(self, indices: np.ndarray, rngs: Generators) -> np.ndarray:
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
    """The images of `fixed` as uint8."""
    out = np.empty((len(indices), *self.sample_shape), np.uint8)
    with futures.ThreadPoolExecutor(self._num_threads) as pool:
      # Raises what a thread raised, and drops what none has begun.
      list(pool.map(self._fill, out, indices.tolist(), itertools.repeat(None)))
    return out


class MemorySource(Source):
  """A source's images, decoded when this is made.

  Attributes:
    class_names: one name for each label.
    labels: [N] int32.
  """

  def __init__(self, source: Source, *, num_threads: int):
    """Decodes every image.

    Args:
      source: uint8 [h, w, 3] images.
      num_threads: that decode at the same time.

    Raises:
      OSError, CorruptImageError: what the source raises.
    """
    self.class_names = source.class_names
    self.labels = source.labels
    self._source = source
    with futures.ThreadPoolExecutor(num_threads) as pool:
      images = list(pool.map(source.__getitem__, range(len(source))))
    self._images: np.ndarray | list[np.ndarray] = images
    if len({image.shape for image in images}) == 1:
      # One array: a few bytes less for each image, and quicker to send.
      self._images = np.stack(images)

  def __getitem__(self, index: int) -> np.ndarray:
    """uint8 [h, w, 3]."""
    return self._images[index]

  def path(self, index: int) -> str:
    """Where the record came from."""
    return self._source.path(index)


class MemoryReader(Reader):
  """A reader's crops, if these leave nothing to chance but the flip.

  Gives what the reader gives, at the speed of a copy.
  """

  def __init__(self, reader: ImageReader, *, flip: bool):
    """Decodes and crops every image.

    Args:
      reader: any but one of random crops.
      flip: mirror half of the images that `read` gives.

    Raises:
      DataError, OSError: as ImageReader.read.
    """
    self.class_names = reader.class_names
    self.labels = reader.labels
    self.sample_shape = reader.sample_shape
    self.dtype = reader.dtype
    self.grid = reader.grid
    self._flip = flip
    self._pixels = reader.pixels(np.arange(len(reader)))

  def read(self, indices: np.ndarray, rngs: Generators) -> np.ndarray:
    """[c, size, size, channels] of `dtype`; float32 in [-1, 1]."""
    out = self._pixels[indices]
    if self._flip:
      mirrored = np.array([rng.random() < 0.5 for rng in rngs], bool)
      out[mirrored] = out[mirrored, :, ::-1]
    return out if self.dtype == np.uint8 else self.grid[out]

  def fixed(self, indices: np.ndarray) -> np.ndarray:
    """[c, size, size, channels] float32 in [-1, 1], not flipped."""
    return self.grid[self._pixels[indices]]

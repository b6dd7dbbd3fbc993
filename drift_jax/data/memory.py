"""Images that are decoded once: for sets that fit in memory."""

from concurrent import futures

import numpy as np

from drift_jax.data.base import Generators, Reader, Source
from drift_jax.data.readers import ImageReader


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

"""All images of a source, decoded once: for sets that fit in memory."""

from concurrent import futures

import numpy as np

from drift_jax.data.sources import Source


class MemorySource:
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
    with futures.ThreadPoolExecutor(num_threads) as pool:
      images = list(pool.map(source.__getitem__, range(len(source))))
    self._images: np.ndarray | list[np.ndarray] = images
    if len({image.shape for image in images}) == 1:
      # One array: a few bytes less for each image, and quicker to send.
      self._images = np.stack(images)

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> np.ndarray:
    """uint8 [h, w, 3]."""
    return self._images[index]

"""Sources of encoded images: decoding and damaged files."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from drift_jax.data import decode
from drift_jax.data.sources import Reopening, Source
from drift_jax.system import console
from drift_jax.system.errors import DataError

_LISTED = 10  # paths that an error shows


class CorruptImageError(DataError):
  """More images than allowed can't be decoded."""


class EncodedSource(Reopening, Source):
  """Images stored as JPEG, PNG or WebP, decoded on access.

  An image that can't be decoded is reported by path, counted, and replaced
  by the next image of its class (in index order, round to the first) that
  can: the replacement depends on the index and the files alone, so batches
  stay the same for any number of threads, processes and resumes. With more
  than `max_corrupt` of them reading raises. Each process counts those that
  it meets. Failing to read at all (a missing file, a disk error) always
  raises: it may pass, and what came instead would depend on when.

  Safe to read from several threads, and may be sent to a worker process.

  Attributes:
    class_names: one name for each label.
    corrupt: {path: why} of the undecodable images that this process has met.
  """

  _UNSENT = ("_lock", "corrupt")

  def __init__(
    self,
    class_names: Sequence[str],
    max_corrupt: int,
    decoder: str,
    exif: bool = False,
  ):
    decode.check_decoder(decoder)
    self.class_names = tuple(class_names)
    self._max_corrupt = max_corrupt
    self._decoder = decoder
    self._exif = exif
    self._open()

  def _open(self) -> None:
    self.corrupt: dict[str, str] = {}
    self._lock = threading.Lock()

  def read_bytes(self, index: int) -> bytes:
    """The encoded image; 0 <= index < N."""
    raise NotImplementedError

  def _count_corrupt(self, index: int, error: decode.DecodeError) -> None:
    path = self.path(index)
    with self._lock:
      if path not in self.corrupt:
        self.corrupt[path] = str(error)
        console.logger.warning("corrupt: %s: %s", path, error)
      listed = [f"{path}: {why}" for path, why in self.corrupt.items()]
    if len(listed) > self._max_corrupt:
      raise CorruptImageError(
        f"{len(listed)} corrupt images, data.max_corrupt={self._max_corrupt} "
        "allows no more; mend or remove them, or raise it:\n  "
        + "\n  ".join(listed[:_LISTED])
      ) from error

  def _candidates(self, index: int) -> Iterator[int]:
    """The image itself, then the others of its class that may replace it."""
    yield index
    same = np.flatnonzero(self.labels == self.labels[index])
    yield from np.roll(same, -int(np.searchsorted(same, index)))[1:].tolist()

  def image(self, index: int) -> Image.Image:
    """The image as a PIL image of mode RGB, a copy spared.

    Raises:
      CorruptImageError: more images than `max_corrupt` can't be decoded.
      LimitError: an image too large to be read, which is no damage.
      OSError: the image can't be read.
    """
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} of {len(self)} images")
    for candidate in self._candidates(index):
      try:
        return decode.decode_image(
          self.read_bytes(candidate), self._decoder, self._exif
        )
      except decode.LimitError as error:
        raise decode.LimitError(f"{self.path(candidate)}: {error}") from error
      except decode.DecodeError as error:
        self._count_corrupt(candidate, error)
    label = int(self.labels[index])
    raise CorruptImageError(
      f"class {label} ({self.class_names[label]!r}): none of its "
      f"{(self.labels == label).sum()} images can be decoded, such as "
      f"{self.path(index)}"
    )

  def __getitem__(self, index: int) -> np.ndarray:
    """uint8 [h, w, 3] RGB, not to write to; raises what `image` does."""
    return np.asarray(self.image(index))

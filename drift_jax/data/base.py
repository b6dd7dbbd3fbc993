"""Bases of sources, of readers, and of objects that workers are sent."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

Generators = Sequence[np.random.Generator]


class Labelled:
  """Records with labels, by index.

  Attributes:
    class_names: one name for each label.
    labels: [N] int32; may take long on first use, and are kept then.
  """

  class_names: tuple[str, ...]
  labels: Any

  def __len__(self) -> int:
    return len(self.labels)


class Source(Labelled):
  """Labelled images by index; thread-safe, may be sent to a worker process."""

  def __getitem__(self, index: int) -> np.ndarray:
    """[h, w, C]: uint8 RGB of any size, or float32 of one size in [-1, 1]."""
    raise NotImplementedError

  def image(self, index: int) -> Image.Image:
    """The record of uint8 RGB as a PIL image; files spare a copy."""
    return Image.fromarray(self[index])

  def path(self, index: int) -> str:
    """Where the record is stored, for messages."""
    return f"image {index}"

  def names_sha256(self) -> str:
    """Checksum of the records' names in order, not of their place; '': none."""
    return ""


class Reader(Labelled):
  """Records [H, W, C] of one shape, by index.

  Attributes:
    class_names: one name for each label.
    sample_shape: (H, W, C) of one record.
    dtype: of `read`'s records, as they travel to the device: uint8 (pixel p
      means p / 127.5 - 1), float32, float16 or bfloat16.
    grid: ascending float32, the values that `fixed` can take; None if they
      are continuous.
    chunk: records that one call should take for speed.
  """

  sample_shape: tuple[int, int, int]
  dtype: np.dtype
  grid: Any = None
  chunk = 1024

  def read(self, indices: np.ndarray, rngs: Generators) -> np.ndarray:
    """[c, H, W, C] of `dtype`: record i augmented by rngs[i] alone."""
    raise NotImplementedError

  def fixed(self, indices: np.ndarray) -> np.ndarray:
    """[c, H, W, C] float32 in [-1, 1], never augmented, for evaluation."""
    raise NotImplementedError


class Reopening:
  """Base of objects that may be sent to another process.

  Attributes named in `_UNSENT` are not sent; `_open` makes them in each one.
  """

  _UNSENT: ClassVar[tuple[str, ...]] = ()

  def _open(self) -> None:
    raise NotImplementedError

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in vars(self).items() if k not in self._UNSENT}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._open()

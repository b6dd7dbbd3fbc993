"""Readers: training records of one shape from a source, seeded by record."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from drift_jax.data import sources

Generators = Sequence[np.random.Generator]
WIRES = ("uint8", "float32", "float16", "bfloat16")


class Reader(sources.Labelled):
  """Records [H, W, C] of one shape, by index.

  Attributes:
    class_names: one name for each label.
    sample_shape: (H, W, C) of one record.
    dtype: of `read`'s records, as they travel to the device: uint8 (pixel p
      means p / 127.5 - 1), float32, float16 or bfloat16.
    grid: ascending float32, the values that `fixed` can take; None if they
      are continuous.
    chunk: records that one call should take for speed.
    conditions: [N, D] or [N, T, D] of the records, float16 or float32; None if
      they have none (data/conditions.py).
  """

  sample_shape: tuple[int, int, int]
  dtype: np.dtype
  grid: Any = None
  chunk = 1024
  conditions: Any = None

  def read(self, indices: np.ndarray, rngs: Generators) -> np.ndarray:
    """[c, H, W, C] of `dtype`: record i augmented by rngs[i] alone."""
    raise NotImplementedError

  def fixed(self, indices: np.ndarray) -> np.ndarray:
    """[c, H, W, C] float32 in [-1, 1], never augmented, for evaluation."""
    raise NotImplementedError


def pixel_grid() -> np.ndarray:
  """[256] float32: what the 8-bit pixels 0..255 mean, p / 127.5 - 1."""
  return np.arange(256, dtype=np.float32) / np.float32(127.5) - 1


class ArrayReader(Reader):
  """Images of one size in memory, unaugmented."""

  def __init__(self, source: sources.ArraySource, *, wire: str):
    """Checks that the images survive the way to the device.

    Args:
      source: the images.
      wire: 'float32', 'float16' or 'bfloat16'; the values must be exact in it.

    Raises:
      ValueError: they are not, as for uint8, which holds p / 127.5 - 1.
    """
    grid = source.grid
    exact = [
      name
      for name in WIRES[1:]
      if np.array_equal(grid.astype(jnp.dtype(name)).astype(np.float32), grid)
    ]
    if wire not in exact:
      raise ValueError(
        f"data.wire={wire!r} can't hold this data set's {len(grid)} values of "
        f"a pixel exactly: valid options are {exact}"
      )
    self.class_names = source.class_names
    self.labels = source.labels
    self.sample_shape = source.sample_shape
    self.dtype = jnp.dtype(wire)
    self.grid = source.grid
    self._images = source.images

  def read(self, indices: np.ndarray, rngs: Generators) -> np.ndarray:
    """[c, H, W, C] of `dtype`; draws nothing."""
    del rngs
    return self._images[indices].astype(self.dtype, copy=False)

  def fixed(self, indices: np.ndarray) -> np.ndarray:
    """[c, H, W, C] float32 in [-1, 1]."""
    return self._images[indices]

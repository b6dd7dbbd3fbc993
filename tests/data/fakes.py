"""Readers in memory, for tests of everything behind a reader."""

import numpy as np


class Numbers:
  """Record i: every value i, plus 1/4 of a noise in [0, 1) if asked for.

  Labels are i mod classes, or as given.
  """

  def __init__(
    self,
    count=30,
    *,
    classes=3,
    labels=None,
    shape=(2, 2, 1),
    dtype=np.float32,
    chunk=1,
    noise=False,
    fails_at=None,
  ):
    if labels is None:
      labels = np.arange(count) % classes
    self.labels = np.asarray(labels, np.int32)
    self.class_names = tuple(f"class{c}" for c in range(classes))
    self.sample_shape = shape
    self.dtype = np.dtype(dtype)
    self.grid = None
    self.chunk = chunk
    self._noise = noise
    self._fails_at = fails_at

  def __len__(self):
    return len(self.labels)

  def read(self, indices, rngs):
    assert len(indices) == len(rngs) > 0
    if self._fails_at in indices:
      raise OSError(f"record {self._fails_at} of shard-7 can't be read")
    out = np.empty((len(indices), *self.sample_shape), np.float64)
    for row, index, rng in zip(out, indices, rngs, strict=True):
      row[...] = index
      if self._noise:
        row += rng.random(self.sample_shape) / 4
    return out.astype(self.dtype)


def values(images):
  """What record each image is: [..., H, W, C] -> [...]."""
  return images[..., 0, 0, 0]

"""Batches on a mesh and the rows of them that belong to a process."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax
import numpy as np

from drift_jax.metrics.images import Images
from drift_jax.system import sharding

_Item = TypeVar("_Item")
# Samples [B, H, W, C] -> 8-bit RGB images [B, h, w, 3], both on the mesh.
PixelsFn = Callable[[Images], jax.Array]


def local_batches(
  count: int, batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
  """Cuts `count` samples into batches of one size, shared by the processes.

  Process p of P takes the p-th of P equal parts of each batch. The last batch
  is filled up with the last sample.

  Args:
    count: samples of all processes, >= 1.
    batch_size: of all processes; a multiple of P.

  Yields:
    (numbers [batch_size / P] int32 of this process' samples, how many of them
    count: the first ones; 0 is possible).

  Raises:
    ValueError: a batch_size that the processes can't share.
  """
  processes = jax.process_count()
  if batch_size < 1 or batch_size % processes:
    raise ValueError(
      f"batch_size must be at least 1, and a multiple of the {processes}"
      f" processes, got {batch_size}"
    )
  size = batch_size // processes
  first = jax.process_index() * size
  for start in range(0, count, batch_size):
    numbers = np.arange(start + first, start + first + size, dtype=np.int32)
    valid = min(max(count - start - first, 0), size)
    yield np.minimum(numbers, np.int32(count - 1)), valid


def one_late(items: Iterable[_Item]) -> Iterator[_Item]:
  """Yields each item when the next one is there, or none is left.

  If items are made on the device, it has the next one while the host works.
  """
  held: list[_Item] = []
  for item in items:
    yield from held
    held = [item]
  yield from held


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
  """Samples on the mesh, those of a filled-up batch that don't count included.

  Attributes:
    samples: [B, H, W, C] in [-1, 1], or latents; of all processes.
    index: [b] int32, numbers of this process' samples that count.
    labels: [b] int32, theirs.
    to_pixels: makes `pixels` of `samples`.
  """

  samples: Images
  index: np.ndarray
  labels: np.ndarray
  to_pixels: PixelsFn

  @functools.cached_property
  def pixels(self) -> jax.Array:
    """[B, h, w, 3] uint8 on the mesh, computed once for all who ask."""
    return self.to_pixels(self.samples)

  @functools.cached_property
  def images(self) -> np.ndarray:
    """[b, H, W, C] float32: this process' samples that count, on the host."""
    return self.rows(self.samples).astype(np.float32)

  def rows(self, values: Images) -> np.ndarray:
    """[b, ...] on the host: those of this process of something [B, ...]."""
    return sharding.local_rows(values)[: len(self.index)]


class OneLate:
  """Fetches what the device computes one batch late.

  While the host works on a batch, the device has the next one.
  """

  def __init__(self, take: Callable[[Batch, tuple[np.ndarray, ...]], None]):
    """Args:
    take: called with each batch, and this process' rows of what was computed
      of it. There may be none, but their shape and dtype are known: processes
      that got no sample join the others' sums with those.
    """
    self._take = take
    self._held: tuple[Batch, tuple[Images, ...]] | None = None

  def push(self, batch: Batch, *values: Images) -> None:
    """Takes what is held, and holds arrays [B, ...] on the mesh instead."""
    self.flush()
    self._held = batch, values

  def flush(self) -> None:
    """Takes what is held."""
    if self._held is not None:
      (batch, values), self._held = self._held, None
      self._take(batch, tuple(batch.rows(array) for array in values))

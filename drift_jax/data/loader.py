"""Seeded Grain pipeline: the same global batches for any process count."""

from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np


class RandomAccess(Protocol):
  """What a source must offer: a length and records by index."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Any: ...


class Loader:
  """Endless shuffled batches of a source, resumable at any batch in O(1).

  Batch number b holds the same records whenever it is read: its content
  depends on (source, seed, b) alone. With several processes, process p holds
  every process_count-th record of the global batch, starting at p.

  Attributes:
    position: number of the next batch.
  """

  def __init__(
    self,
    source: RandomAccess,
    *,
    batch_size: int,
    seed: int,
    num_threads: int = 1,
    process_index: int = 0,
    process_count: int = 1,
  ):
    if batch_size < 1 or batch_size % process_count:
      raise ValueError(
        f"global batch size {batch_size} must be a positive multiple of the "
        f"{process_count} processes"
      )
    self._dataset = (
      grain.MapDataset.source(source)
      .seed(seed)
      .shuffle()
      .repeat(None)[process_index::process_count]
      .batch(batch_size // process_count, drop_remainder=True)
    )
    self._read_options = grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=2 * num_threads
    )
    self.position = 0
    self._iterator = self._iterate()

  def _iterate(self) -> grain.DatasetIterator:
    dataset = self._dataset[self.position :]
    return iter(dataset.to_iter_dataset(self._read_options))

  def seek(self, position: int) -> None:
    """Makes batch number `position` the next one."""
    # Its reader threads would otherwise live on with what they prefetched.
    self._iterator.close()
    self.position = position
    self._iterator = self._iterate()

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    batch = next(self._iterator)
    self.position += 1
    return batch

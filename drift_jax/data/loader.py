"""Batches of a reader's records, read ahead by threads or worker processes.

Global batches are the same, record by record and bit by bit, for any number
of processes, workers and threads: which records a batch holds is the order's
choice (order.py), and what becomes of a record (crop, flip, latent noise)
depends on (seed, the record's number in the run) alone.
"""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, Self

import grain
import numpy as np

from drift_jax.data import order as order_lib
from drift_jax.data.readers import Reader
from drift_jax.system import console

Batch = dict[str, np.ndarray]

# Handing something over from a worker takes about a millisecond, a third of
# what decoding an image takes: workers hand over so many at once, or more.
_WORKER_CHUNK = 16


def share(name: str, size: int, process: int, count: int) -> range:
  """The contiguous part of range(size) that one process holds.

  Raises:
    ValueError: if `size`, which the message calls `name`, can't be split.
  """
  if size < 1 or size % count:
    raise ValueError(
      f"{name}={size} must be a positive multiple of the {count} processes"
    )
  part = size // count
  return range(process * part, (process + 1) * part)


def _pieces(part: range, chunk: int) -> list[range]:
  """Near-equal pieces of at most `chunk` that make up `part`."""
  count, size = -(-len(part) // chunk), len(part)
  ends = [number * size // count for number in range(count + 1)] if size else []
  return [part[first:last] for first, last in itertools.pairwise(ends)]


@dataclasses.dataclass
class _Jobs:
  """Reads as a random-access source: element j is one read of one batch."""

  reader: Reader
  order: order_lib.Order
  pieces: Sequence[range]
  seed: int
  shift: int = 0

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    batch, number = divmod(index, len(self.pieces))
    piece = self.pieces[number]
    first, last = piece.start + self.shift, piece.stop + self.shift
    indices = self.order.records(batch, first, last)
    numbers = batch * self.order.size + np.arange(first, last)
    rngs = order_lib.record_generators(self.seed, numbers)
    return indices, self.reader.read(indices, rngs)


def _start_worker(number: int, count: int) -> None:
  """Leave the end of this worker to the process that it reads for.

  Ctrl-C and a scheduler's SIGTERM reach both, but that process stops its
  workers in order, after it has saved the batches that they have read. If it
  was killed it can't: its workers, which would wait for ever, end by
  themselves.
  """
  del number, count
  console.setup()
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None  # a worker has one

  # Block SIGTERM so that sigwaitinfo can see who sent it. The handler does
  # nothing, for threads in which it is not blocked.
  signal.signal(signal.SIGTERM, lambda number, frame: None)
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

  def wait_for_end() -> None:
    parent.join()
    os._exit(1)

  def wait_for_order() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
      pass
    os._exit(1)

  for wait in (wait_for_end, wait_for_order):
    threading.Thread(target=wait, name="end-of-worker", daemon=True).start()


class NumberedFeed:
  """A feed whose future follows from the number of its next batch.

  Attributes:
    position: number of the next batch.
  """

  position: int = 0

  def start(self) -> None:
    """Nothing to prepare: any batch can come first."""

  def close(self) -> None:
    """Nothing to stop."""

  def seek(self, position: int) -> None:
    """Makes batch number `position` the next one."""
    self.position = position

  def state(self) -> dict[str, Any]:
    """The next batch's number, the same on every process."""
    return {"position": np.asarray(self.position, np.int64)}

  def abstract(self, saved: Any) -> dict[str, Any]:
    """Shapes of `state()`, to restore into; they are the same in every run."""
    del saved
    return self.state()

  def restore(self, state: dict[str, Any]) -> None:
    """Continues where `state` was taken, by however many processes."""
    self.seek(int(state["position"]))


class IndexedFeed(NumberedFeed):
  """One process' part of the batches of an order, resumable in O(1).

  Up to one batch is read ahead. With worker processes, each of them also
  holds up to two reads in shared memory. The whole future of the feed follows
  from the number of the next batch.

  Attributes:
    position: number of the next batch.
    rows: of the order's, what this process holds.
    process_index, process_count: whose part this is.
  """

  def __init__(
    self,
    reader: Reader,
    order: order_lib.Order,
    *,
    seed: int,
    num_threads: int = 1,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Starts nothing: threads and workers start with the first batch.

    Args:
      reader: of the records; picklable if num_workers > 0.
      order: which records a batch holds; picklable as well.
      seed: of the augmentation.
      num_threads: that read at the same time (in each worker, if there are
        any); 0 reads only when asked.
      num_workers: processes that read; 0 reads in this one.
      process_index, process_count: whose part to read.

    Raises:
      ValueError: rows that the processes can't share.
    """
    self.process_index = process_index
    self.process_count = process_count
    self.rows = share(*order.rows, process_index, process_count)
    chunk = max(reader.chunk, _WORKER_CHUNK if num_workers else 1)
    parts = order.parts(self.rows)
    pieces = [piece for part in parts for piece in _pieces(part, chunk)]
    self._jobs = _Jobs(reader, order, pieces, seed)
    ahead = -(-len(pieces) // max(1, num_workers))
    self._read_options = grain.ReadOptions(
      num_threads=num_threads,
      prefetch_buffer_size=max(2 * num_threads, ahead) if num_threads else 0,
    )
    self._workers = grain.MultiprocessingOptions(
      num_workers=num_workers, per_worker_buffer_size=2
    )
    self.position = 0
    self._iterator: grain.DatasetIterator | None = None

  def _iterate(self) -> grain.DatasetIterator:
    dataset = grain.MapDataset.source(self._jobs)
    dataset = dataset[self.position * len(self._jobs.pieces) :]
    reads = dataset.to_iter_dataset(self._read_options)
    if self._workers.num_workers:
      reads = reads.mp_prefetch(self._workers, worker_init_fn=_start_worker)
    return iter(reads)

  def seek(self, position: int, shift: int = 0) -> None:
    """Makes batch number `position` the next one.

    Args:
      position: of the batch.
      shift: records by which this and all later batches start later. Only an
        order whose batches follow each other without seams allows it.
    """
    self.close()
    self.position = position
    self._jobs = dataclasses.replace(self._jobs, shift=shift)

  def close(self) -> None:
    """Stops threads and workers; the next batch would start them again."""
    if self._iterator is not None:
      # Readers would otherwise live on with what they read ahead.
      self._iterator.close()
      self._iterator = None

  def __iter__(self) -> Self:
    return self

  def _read(self) -> tuple[np.ndarray, np.ndarray]:
    """The next batch's (indices [n], records [n, H, W, C]), part by part.

    What a reader raises arrives here; asked again, the same batch is read.
    """
    self._iterator = self._iterator or self._iterate()
    reader, count = self._jobs.reader, sum(map(len, self._jobs.pieces))
    indices = np.empty(count, np.int64)
    images = np.empty((count, *reader.sample_shape), reader.dtype)
    start = 0
    try:
      for piece in self._jobs.pieces:
        rows = slice(start, start + len(piece))
        # Copied: what a worker sends lies in shared memory, which is scarce.
        indices[rows], images[rows] = next(self._iterator)
        start = rows.stop
    except BaseException:
      # Within a batch there is no position to go on from.
      self.close()
      raise
    self.position += 1
    return indices, images


class Loader(IndexedFeed):
  """Endless shuffled batches of a reader, resumable at any batch in O(1).

  Batches are {'image': [b, H, W, C] of the reader's dtype, 'label': [b]
  int32}. Process p of P holds the contiguous part [p B / P, (p + 1) B / P) of
  each global batch of B records.

  Attributes:
    reader: of the records.
    batch_size: records of a global batch.
    process_index, process_count: whose part this is.
    position: number of the next batch.
  """

  def __init__(self, reader: Reader, *, batch_size: int, seed: int, **how: int):
    """Starts nothing: threads and workers start with the first batch.

    Args:
      reader: of the records; picklable if num_workers > 0.
      batch_size: records of a global batch.
      seed: of the order and the augmentation.
      **how: num_threads=1, num_workers=0, process_index=0,
        process_count=1: see IndexedFeed.

    Raises:
      ValueError: a batch size that the processes can't share; a label out of
        range.
    """
    order_lib.check_labels(reader.labels, reader.class_names)
    order = order_lib.Shuffled(len(reader.labels), size=batch_size, seed=seed)
    super().__init__(reader, order, seed=seed, **how)
    self.reader = reader
    self.batch_size = batch_size

  @property
  def records(self) -> int:
    """Records of all batches so far: the number of the next record."""
    return self.position * self.batch_size + self._jobs.shift

  def seek_record(self, number: int) -> None:
    """Makes record `number` of the run the first of the next batch.

    Batches of any size thus go on where those of another size have ended.
    """
    self.seek(*divmod(number, self.batch_size))

  def __next__(self) -> Batch:
    indices, images = self._read()
    labels = self.reader.labels[indices].astype(np.int32)
    return {"image": images, "label": labels}

"""Feeds: what the training loop draws a step's batch from.

A feed is an iterator over host batches whose whole future follows from
`state()`: save that, `restore` it, and the same batches come again. Images
come in the reader's dtype, as they travel to the device.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from drift_jax.data import bank as bank_lib
from drift_jax.data.loader import (
  Batch,
  IndexedFeed,
  Loader,
  NumberedFeed,
  share,
)
from drift_jax.data.order import ClassGrouped, DistinctStream, check_queue
from drift_jax.data.readers import Reader
from drift_jax.system import console, streams


class GroupedFeed(IndexedFeed):
  """Positives and unconditional reals of each label, read by index
  without a queue.

  Batches are {'labels': [l], 'positives': [l, N_pos, H, W, C],
  'unconditional': [l, N_unc, H, W, C]}, as ClassGrouped chooses them: no
  queue, nothing to fill or to save but the position. Process p of P holds the
  contiguous part [p N_c / P, (p + 1) N_c / P) of the labels.
  """

  def __init__(
    self,
    reader: Reader,
    *,
    seed: int,
    num_labels: int,
    num_positives: int,
    num_unconditional: int,
    **reading: int,
  ):
    """Starts nothing: threads and workers start with the first batch.

    Args:
      reader: of the records; picklable if num_workers > 0.
      seed: of the draws and the augmentation.
      num_labels: N_c, labels of a step over all processes.
      num_positives: N_pos of each label.
      num_unconditional: N_unc for each label.
      **reading: see IndexedFeed.

    Raises:
      ValueError: labels that the processes can't share, or a class with too
        few images.
    """
    self._each = (num_positives, num_unconditional)
    self._order = self._ordered(reader, seed, num_labels, *self._each)
    super().__init__(reader, self._order, seed=seed, **reading)

  def _ordered(self, reader: Reader, *sizes: int) -> ClassGrouped:
    """The order of a reader's records: by (seed, N_c, N_pos, N_unc)."""
    return ClassGrouped(reader.labels, reader.class_names, *sizes)

  def __next__(self) -> Batch:
    labels = self._order.labels(self.position)[list(self.rows)]
    _, images = self._read()
    groups = np.split(images, [len(labels) * self._each[0]])
    positives, unconditional = (
      group.reshape(len(labels), each, *images.shape[1:])
      for group, each in zip(groups, self._each, strict=True)
    )
    return dict(labels=labels, positives=positives, unconditional=unconditional)


class LabelFeed(NumberedFeed):
  """Labels alone, as often as the data have them.

  Batches are {'labels': [l] int32}, those of the images of consecutive blocks
  of a stream of permutations: a pure function of (seed, position). Process p of
  P holds the contiguous part [p N_c / P, (p + 1) N_c / P).

  Attributes:
    position: number of the next batch.
  """

  def __init__(
    self,
    labels: np.ndarray,
    *,
    seed: int,
    num_labels: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Raises ValueError for labels that the processes can't share.

    Args:
      labels: [N] of the images.
      seed: seed of the order.
      num_labels: N_c, of a step over all processes.
      process_index, process_count: whose part to give.
    """
    name = "batch.labels"
    self._rows = share(name, num_labels, process_index, process_count)
    self._labels, self._count = np.asarray(labels, np.int32), num_labels
    self._stream = DistinctStream(len(labels), 1, 1, seed, "fd_labels")

  def __next__(self) -> Batch:
    first = self.position * self._count
    chosen = self._stream.take(first, first + self._count)[list(self._rows)]
    self.position += 1
    return {"labels": self._labels[chosen]}


def _host_device() -> Any:
  """This process' CPU.

  Raises:
    RuntimeError: if JAX was told to leave the CPU out.
  """
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError as error:
    raise RuntimeError(
      f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: the sample queue is "
      "the host's, add cpu after the accelerator, e.g. JAX_PLATFORMS=cuda,cpu"
    ) from error


def _hosts_sharding(process_count: int, groups: int) -> NamedSharding:
  """Axis 0 over the processes, each part on its process' CPU.

  Args:
    process_count: P.
    groups: parts of axis 0; each P / groups successive processes share one.
  """
  devices: dict[int, Any] = {}
  for device in jax.devices("cpu"):
    devices.setdefault(device.process_index, device)
  hosts = np.array([devices[process] for process in range(process_count)])
  mesh = Mesh(hosts.reshape(groups, -1), ("group", "copy"))
  return NamedSharding(mesh, PartitionSpec("group"))


def _aligned_copy(array: np.ndarray) -> np.ndarray:
  """A copy that JAX's CPU takes over as it is: at a multiple of 64 bytes.

  It would copy others once more, and `jax.device_put` shares an aligned array
  with its caller even if told not to.
  """
  buffer = np.empty(array.nbytes + 64, np.uint8)
  start = -buffer.ctypes.data % 64
  copy = buffer[start : start + array.nbytes].view(array.dtype)
  copy = copy.reshape(array.shape)
  copy[...] = array
  return copy


@functools.partial(jax.jit, static_argnames="process")
def _step_keys(root: jax.Array, step: int, process: int | None) -> jax.Array:
  """Keys [2] of a step's labels and of its samples."""
  key = jax.random.fold_in(root, step)
  if process is not None:
    key = jax.random.fold_in(key, process)
  return jax.random.split(key)


class QueueFeed:
  """Positives and unconditional reals through the sample queue (A.8).

  Each step pushes one loader batch, draws its labels from it, and samples
  from the queue. The queue lives in host memory, whatever the accelerator.

  Records come in random order, so that after any number of them a class may
  have fewer in the queue than a label draws, however many images it has: then
  they repeat (see bank.draw_slots), and `start` says of how many classes.
  Labels come from what has just been pushed, so none of them has no sample.

  With several processes each has its own queue, fed by its own part of the
  loader's batches, and draws its own part of the step's labels with its own
  random numbers: what a run draws depends on the number of processes.

  A checkpoint of P processes restores on any number P' of them. Where P' = P
  each gets its own queue back, and all that follows is bit-equal to a run that
  was never interrupted. Otherwise reading continues at the same record, none
  twice and none left out, with push_per_step * P' records a step. Processes
  form G = gcd(P, P') groups: each group merges its P / G old queues, and each
  of its P' / G processes starts with the newest samples of each class among
  them. With P' a multiple of P that is a copy of one queue; with P a multiple
  of P' no sample goes to two processes. A host reads P / G queues, and holds
  them beside its own while it merges them.
  """

  def __init__(
    self,
    loader: Loader,
    *,
    seed: int,
    class_size: int,
    unconditional_size: int,
    push_per_step: int,
    prefill: int,
    with_replacement: bool,
    num_labels: int,
    num_positives: int,
    num_unconditional: int,
  ):
    """Creates an empty queue; `start` or `restore` comes before the first step.

    Args:
      loader: its global batches hold push_per_step records for each process.
      seed: of every draw of labels and samples.
      class_size: slots for each class.
      unconditional_size: slots of the unconditional ring.
      push_per_step: reals that each process pushes each step.
      prefill: reals that each process pushes in `start`, rounded up to whole
        batches.
      with_replacement: whether a class may have fewer images in the data than
        a label draws, whose samples would repeat for ever.
      num_labels: labels of a step over all processes.
      num_positives: positives of each label.
      num_unconditional: unconditional reals of each label.

    Raises:
      ValueError: labels that the processes can't share, more labels for a
        process than it pushes, or, without replacement, too few images of a
        class or in all.
    """
    processes, reader = loader.process_count, loader.reader
    rows = share("batch.labels", num_labels, loader.process_index, processes)
    if len(rows) > push_per_step:
      raise ValueError(
        f"batch.labels={num_labels} over {processes} processes takes "
        f"{len(rows)} labels from the newest queue.push_per_step="
        f"{push_per_step} samples: raise queue.push_per_step to {len(rows)}"
      )
    self._images = np.bincount(reader.labels, minlength=len(reader.class_names))
    if not with_replacement:
      check_queue(
        self._images, reader.class_names, num_positives, num_unconditional
      )
    self._loader = loader
    # One process folds nothing in: there is nothing to tell it from.
    self._process = loader.process_index if processes > 1 else None
    self._prefill_batches = math.ceil(prefill / push_per_step)
    self._steps = 0
    self._num_labels = len(rows)
    self._num_positives = num_positives
    self._num_unconditional = num_unconditional
    self._host = _host_device()
    with jax.default_device(self._host):
      self._root = streams.stream(seed, "queue")
    self._bank = bank_lib.create(
      num_classes=len(reader.class_names),
      class_size=class_size,
      unconditional_size=unconditional_size,
      sample_shape=reader.sample_shape,
      dtype=reader.dtype,
    )

  def _push(self) -> np.ndarray:
    """Queues the loader's next batch; returns its labels."""
    reals = next(self._loader)
    bank_lib.push(self._bank, reals["image"], reals["label"])
    return reals["label"]

  def start(self) -> None:
    """Fills the queue of a new run, and says where it is short."""
    for _ in range(self._prefill_batches):
      self._push()
    count = self._bank.count[self._images > 0]
    short = count < self._num_positives
    if short.any():
      console.logger.info(
        f"queue: {short.sum()} of {len(count)} classes hold fewer than "
        f"batch.positives={self._num_positives} samples (the fewest "
        f"{count.min()}): these repeat until there are more; a larger "
        "queue.prefill starts with more."
      )

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    newest = self._push()
    step, self._steps = self._steps, self._steps + 1
    with jax.default_device(self._host):
      label_key, sample_key = _step_keys(self._root, step, self._process)
      labels = bank_lib.draw_labels(label_key, newest, self._num_labels)
      labels = np.asarray(labels)
      positives, unconditional = bank_lib.sample(
        self._bank,
        sample_key,
        labels,
        num_positives=self._num_positives,
        num_unconditional=self._num_unconditional,
      )
    return dict(labels=labels, positives=positives, unconditional=unconditional)

  def _state(self, saved: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    return {
      "records": np.asarray(self._loader.records, np.int64),
      "steps": np.asarray(self._steps, np.int64),
      "bank": {name: saved(x) for name, x in self._bank.arrays().items()},
    }

  def state(self) -> dict[str, Any]:
    """Records and steps so far, a copy of the queue, [P, ...] over processes.

    The copy takes the queue's memory once more until it has been saved.
    """
    processes = self._loader.process_count
    sharding = _hosts_sharding(processes, processes)

    def copied(array: np.ndarray) -> jax.Array:
      local = jax.device_put(_aligned_copy(array)[None], self._host)
      return jax.make_array_from_single_device_arrays(
        (processes, *array.shape), sharding, [local]
      )

    return self._state(copied)

  def abstract(self, saved: Any) -> dict[str, Any]:
    """Shapes to restore into, given those of the saved arrays."""
    processes = self._loader.process_count
    queues = saved["bank"]["count"].shape[0]
    sharding = _hosts_sharding(processes, math.gcd(queues, processes))
    stacked = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    return self._state(lambda x: stacked((queues, *x.shape), x.dtype))

  def restore(self, state: dict[str, Any]) -> None:
    """Continues where `state` was taken; the queue is not refilled."""
    self._loader.seek_record(int(state["records"]))
    self._steps = int(state["steps"])
    rings = {
      name: np.asarray(array.addressable_shards[0].data)
      for name, array in state["bank"].items()
    }
    bank_lib.refill(self._bank, rings)

  def close(self) -> None:
    """Stops the loader's threads and workers."""
    self._loader.close()

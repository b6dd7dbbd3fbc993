"""Latents: the cache, the class-grouped loader, the queue, the device."""

import pathlib
import time
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
import ml_dtypes
import numpy as np

from benchmarks import plain
from benchmarks.images import SIZE, loading
from benchmarks.timing import Case, Report, resident
from drift_jax.data import bank, latent_format, latent_writer, order
from drift_jax.data.feed import GroupedFeed
from drift_jax.data.latents import LatentReader
from drift_jax.data.prefetch import Prefetcher
from drift_jax.data.sources import labels_sha256
from drift_jax.system import sharding

SHAPE = (32, 32, 4)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SPLIT = "train"


class Cache:
  """A latent cache of random moments: how fast it reads is not up to them.

  Attributes:
    reader: ours.
    plain: the plain way to read it.
    members: by class, the indices of its images.
  """

  def __init__(self, directory: pathlib.Path, *, images: int, classes: int):
    """Writes it."""
    labels = np.arange(images, dtype=np.int32) % classes
    settings = latent_format.Settings(
      source="random",
      split=SPLIT,
      num_images=images,
      labels_sha256=labels_sha256(labels),
      class_names=tuple(str(c) for c in range(classes)),
      image_size=8 * SHAPE[0],
      vae_sha256="0" * 64,
      scaling_factor=0.18215,
      downsampling=8,
      latent_channels=SHAPE[-1],
      dtype="float16",
      compute_dtype="float32",
      images_per_shard=-(-images // 8),
    )
    folder = latent_writer.prepare(directory, settings)
    rng = np.random.default_rng(0)
    moments = (2, *SHAPE[:2], 2 * SHAPE[2])
    for shard in range(settings.num_shards):
      with latent_writer.ShardWriter(folder, settings, shard) as writer:
        for index in settings.images(shard):
          writer.add(index, rng.standard_normal(moments, np.float32))
        writer.finish()
    latent_writer.write_manifest(folder, settings, labels)
    self.reader = LatentReader(directory, SPLIT, dtype="bfloat16")
    self.plain = plain.Latents(folder, SHAPE, settings.scaling_factor)
    self.members = [np.flatnonzero(labels == c) for c in range(classes)]

  def read(self, indices: np.ndarray) -> np.ndarray:
    """By our reader."""
    return self.reader.read(indices, order.record_generators(0, indices))

  def read_plain(self, indices: np.ndarray) -> np.ndarray:
    """The plain way."""
    return np.stack([self.plain[i] for i in indices.tolist()])


def cache_rows(
  report: Report, cache: Cache, pool: futures.ThreadPoolExecutor
) -> None:
  """Samples of the posteriors, out of the page cache."""
  count = min(4096, len(cache.reader))
  indices = np.random.default_rng(0).permutation(len(cache.reader))[:count]
  chunk = cache.reader.chunk
  blocks = np.split(indices, range(chunk, count, chunk))
  report.compare(
    "latents, 1 thread",
    "latents/s",
    count,
    Case(lambda: [cache.read_plain(block) for block in blocks]),
    {"LatentReader": Case(lambda: [cache.read(block) for block in blocks])},
    clock=time.thread_time,
  )
  ours = {
    "LatentReader": Case(lambda: list(pool.map(cache.read, blocks))),
    "Loader": loading(cache.reader, count // 4, 4),
  }
  report.compare(
    "latents, 2 threads",
    "latents/s",
    count,
    Case(lambda: list(pool.map(cache.read_plain, blocks))),
    ours,
    notes=dict.fromkeys(ours, "target 20000"),
  )
  report.memory("after these")


def grouped_rows(
  report: Report,
  cache: Cache,
  pool: futures.ThreadPoolExecutor,
  *,
  labels: int,
  positives: int,
  unconditional: int,
) -> None:
  """A step's reals by index."""
  feed = GroupedFeed(
    cache.reader,
    seed=0,
    num_labels=labels,
    num_positives=positives,
    num_unconditional=unconditional,
    num_threads=2,
  )
  start = feed.state()
  rng = np.random.default_rng(0)
  everything = len(cache.reader)

  def before() -> None:
    feed.restore(start)
    next(feed)

  def plainly() -> list[np.ndarray]:
    chosen = rng.choice(len(cache.members), labels, replace=False)
    rows = [
      rng.choice(cache.members[c], positives, replace=False) for c in chosen
    ]
    rows += np.split(
      rng.choice(everything, labels * unconditional, replace=False), labels
    )
    images = list(pool.map(cache.read_plain, rows))
    return [np.stack(images[:labels]), np.stack(images[labels:])]

  report.compare(
    "class-grouped loader, 2 threads",
    "ms",
    1,
    Case(plainly),
    {
      f"step of {labels} x ({positives} + {unconditional}) latents": Case(
        lambda: next(feed), before, feed.close
      )
    },
  )
  row = report.rows[-1]
  assert row.plain is not None
  rates = (1e3 / row.value, 1e3 / row.plain)
  report.add(row.section, "the same", "steps/s", *rates, row.times)
  report.memory("after this")


def full_bank(
  classes: int, slots: int, any_slots: int, shape: Sequence[int], dtype: Any
) -> bank.Bank:
  """A bank without an empty slot."""
  queue = bank.create(
    num_classes=classes,
    class_size=slots,
    unconditional_size=any_slots,
    sample_shape=tuple(shape),
    dtype=dtype,
  )
  samples = np.ones((classes, *shape), dtype)
  for _ in range(max(slots, -(-any_slots // classes))):
    bank.push(queue, samples, np.arange(classes, dtype=np.int32))
  return queue


def queue_rows(
  report: Report,
  *,
  classes: int,
  slots: int,
  any_slots: int,
  labels: int,
  positives: int,
  unconditional: int,
) -> None:
  """Push and sample of a full queue of latents, and its memory."""
  section = f"queue of {classes} x {slots} + {any_slots} latents, bfloat16"
  before = resident()
  queue = full_bank(classes, slots, any_slots, SHAPE, BFLOAT16)
  taken = (resident() - before) / 1e9
  size = (queue.samples.nbytes + queue.any_samples.nbytes) / 1e9
  note = f"{size:.3g} computed; plain: float32, computed"
  report.add(section, "memory", "GB", taken, 2 * size, 2.0, note)
  chosen = np.random.default_rng(0).permutation(classes)[:labels]
  chosen = chosen.astype(np.int32)
  samples = np.ones((labels, *SHAPE), BFLOAT16)
  plainly = plain.Queue(queue.samples, queue.any_samples)
  report.compare(
    section,
    "ms",
    1,
    Case(lambda: plainly.push(samples, chosen)),
    {f"push of {labels}": Case(lambda: bank.push(queue, samples, chosen))},
  )
  wanted = {"num_positives": positives, "num_unconditional": unconditional}
  name = f"sample of {labels} x ({positives} + {unconditional})"
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    key = jax.random.key(0)
    report.compare(
      section,
      "ms",
      1,
      Case(lambda: plainly.sample(chosen, positives, unconditional)),
      {name: Case(lambda: bank.sample(queue, key, chosen, **wanted))},
      notes={name: "target below 10"},
    )
  report.memory("with this queue")


def pixel_queue_rows(
  report: Report, *, classes: int, slots: int, any_slots: int, measured: int
) -> None:
  """Memory of a queue of 256-px images, measured with fewer classes."""
  shape = (SIZE, SIZE, 3)
  before = resident()
  queue = full_bank(measured, slots, 1, shape, np.uint8)
  taken = (resident() - before) / 1e9
  size = (queue.samples.nbytes + queue.any_samples.nbytes) / 1e9
  section = "queue of 256-px images, uint8"
  name = f"memory of {measured} x {slots} + 1"
  note = f"{size:.3g} computed; plain: float32, computed"
  report.add(section, name, "GB", taken, 4 * size, 4.0, note)
  whole = (classes * slots + any_slots) * np.prod(shape) / 1e9
  name = f"memory of {classes} x {slots} + {any_slots}, computed"
  report.add(section, name, "GB", float(whole), float(4 * whole), 4.0)


class Ready:
  """A feed whose batches cost nothing."""

  def __init__(self, batch: dict[str, np.ndarray]):
    self._batch = batch

  def __next__(self) -> dict[str, np.ndarray]:
    return self._batch

  def state(self) -> dict[str, Any]:
    """Nothing to save."""
    return {}


def copy_rows(
  report: Report, *, labels: int, positives: int, unconditional: int
) -> None:
  """A step's reals from the host to the default device."""
  counts = {"positives": positives, "unconditional": unconditional}
  batch = {
    name: np.ones((labels, count, *SHAPE), BFLOAT16)
    for name, count in counts.items()
  }
  device = jax.devices()[0]
  mesh = sharding.make_mesh(devices=[device])
  steps = 10
  prefetchers: list[Prefetcher] = []

  def plainly() -> None:
    for _ in range(steps):
      jax.block_until_ready(jax.device_put(batch, device))

  def before() -> None:
    prefetchers.append(
      Prefetcher(
        Ready(batch),
        lambda host: sharding.put_batch(host, mesh),
        first_step=0,
        depth=2,
        pause_after=lambda step: False,
      )
    )
    next(prefetchers[0])

  def run() -> None:
    for _ in range(steps):
      next(prefetchers[0])

  size = sum(array.nbytes for array in batch.values())
  copied = ": a copy within memory" if device.platform == "cpu" else ""
  report.compare(
    "host to device",
    "GB/s",
    steps * size / 1e9,
    Case(plainly),
    {"Prefetcher": Case(run, before, lambda: prefetchers.pop().close())},
    notes={
      "Prefetcher": f"{size / 1e6:.3g} MB a step; {device.platform}{copied}; "
      "plain: device_put"
    },
  )
  report.memory("after this")

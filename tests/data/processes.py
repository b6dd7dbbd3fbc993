"""One of several processes that train on the same data: for feed_test.py.

  python tests/data/processes.py PROCESS COUNT PORT DIRECTORY

Writes what it holds of the first global batches, and what all hold together,
to DIRECTORY/PROCESS.npz, and tries a checkpoint of the sample queues. Stored
images come from DIRECTORY/data.
"""

import pathlib
import sys

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from drift_jax.data.feed import GroupedFeed, QueueFeed
from drift_jax.data.images import ImageReader
from drift_jax.data.latents import LatentReader
from drift_jax.data.loader import Loader
from drift_jax.system import sharding
from drift_jax.training import checkpoint
from tests.data.fakes import Numbers
from tests.data.pictures import opened

BATCHES = 3


def reader():
  return Numbers(48, classes=4, shape=(4, 4, 3), noise=True, chunk=2)


def images(spec, data):
  """Stored images, each cut and flipped in its own way."""
  return ImageReader(
    opened(spec, data_dir=str(data)),
    size=4,
    channels=3,
    crop="random",
    crop_scale=(0.2, 1.0),
    flip=True,
    wire="uint8",
  )


def image_feed(records, **options):
  return Loader(records, batch_size=8, seed=1, **options)


def grouped_feed(records, sizes=(8, 2, 3), **options):
  names = ("num_labels", "num_positives", "num_unconditional")
  sizes = dict(zip(names, sizes, strict=True))
  return GroupedFeed(records, seed=1, **sizes, **options)


def small_feed(records, **options):
  return grouped_feed(records, (4, 1, 1), **options)


def feeds(data, *, num_workers=0, **options):
  """{name: feed}; what comes when is the same for any reader, so that not
  every reader need meet every feed."""
  return {
    "image": image_feed(reader(), **options),
    "grouped": grouped_feed(reader(), **options),
    "workers": grouped_feed(reader(), num_workers=num_workers, **options),
    "folder": image_feed(images("folder:pictures", data), **options),
    "tar": small_feed(images("tar:pictures.tar", data), **options),
    "tfds": image_feed(images("tfds:tiny_pictures", data), **options),
    "latents": small_feed(LatentReader(data / "latents", "train"), **options),
  }


def queue_feed(process, count):
  """6 samples a step for each process, 2 of 8 / count labels."""
  loader = Loader(
    reader(),
    batch_size=6 * count,
    seed=1,
    process_index=process,
    process_count=count,
  )
  return QueueFeed(
    loader,
    seed=1,
    class_size=4,
    unconditional_size=9,
    push_per_step=6,
    prefill=18,
    with_replacement=True,
    num_labels=4,
    num_positives=2,
    num_unconditional=3,
  )


def batches(feed):
  out = [next(feed) for _ in range(BATCHES)]
  feed.close()
  return out


def flat(name, batch_list):
  """{'name/step/entry': array} of a list of batches."""
  return {
    f"{name}/{step}/{entry}": np.asarray(array)
    for step, batch in enumerate(batch_list)
    for entry, array in batch.items()
  }


def queue_batches(process, count, directory):
  """Steps of the queue; the last ones again from a checkpoint."""
  feed = queue_feed(process, count)
  feed.start()
  next(feed)
  checkpointer = checkpoint.Checkpointer(directory / "checkpoints")
  checkpointer.save(1, {"step": np.asarray(1)}, feed.state())
  saved = {f"saved/{n}": x.copy() for n, x in feed._bank.arrays().items()}
  expected = batches(feed)
  checkpointer.wait()
  other = queue_feed(process, count)
  restored = checkpointer.restore({"step": np.asarray(0)}, other.abstract)
  assert restored is not None
  other.restore(restored[1])
  resumed = flat("queue", batches(other))
  checkpointer.close()
  for name, array in flat("queue", expected).items():
    np.testing.assert_array_equal(resumed[name], array)
  return flat("queue", expected) | saved


def batches_from_one(process, count, directory):
  """What follows from the queue that one process saved, and that queue."""
  feed = queue_feed(process, count)
  checkpointer = checkpoint.Checkpointer(
    directory / "one_process", read_only=True
  )
  restored = checkpointer.restore({"step": np.asarray(0)}, feed.abstract)
  checkpointer.close()
  assert restored is not None
  feed.restore(restored[1])
  copy = {f"copy/{n}": x.copy() for n, x in feed._bank.arrays().items()}
  return flat("from_one", batches(feed)) | copy


def main(process, count, port, directory):
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 2)
  jax.distributed.initialize(f"127.0.0.1:{port}", count, process)
  mesh = sharding.make_mesh()
  options = {"process_index": process, "process_count": count}
  local, whole = {}, {}
  all_feeds = feeds(directory / "data", num_workers=2, **options)
  for name, feed in all_feeds.items():
    mine = batches(feed)
    local |= flat(name, mine)
    placed = [sharding.put_batch(batch, mesh) for batch in mine]
    whole |= flat(name, multihost_utils.process_allgather(placed, tiled=True))
  local |= queue_batches(process, count, directory)
  local |= batches_from_one(process, count, directory)
  np.savez(directory / f"local{process}.npz", **local)
  np.savez(directory / f"whole{process}.npz", **whole)


if __name__ == "__main__":
  flags.FLAGS(sys.argv[:1])
  main(
    int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4])
  )

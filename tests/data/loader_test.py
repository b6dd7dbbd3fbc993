"""Loader: coverage, resume, the same batches however they are read."""

import gc
import multiprocessing
import pathlib
import signal
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from drift_jax.data.loader import Loader
from tests import process
from tests.data.fakes import Numbers, values


def make_loader(reader=None, **changes):
  arguments = {"batch_size": 6, "seed": 0, "num_threads": 2} | changes
  return Loader(Numbers() if reader is None else reader, **arguments)


def first(loader, count):
  """The first batches; stops what the loader started."""
  batches = [next(loader) for _ in range(count)]
  loader.close()
  return batches


def numbers(batches):
  return [values(batch["image"]) for batch in batches]


def assert_same(batches, expected):
  for batch, other in zip(batches, expected, strict=True):
    assert batch.keys() == other.keys()
    for name in batch:
      assert batch[name].dtype == other[name].dtype
      assert_array_equal(batch[name], other[name])


def test_every_epoch_covers_every_record_once():
  """Augmented anew each epoch, each record differently."""
  batches = first(make_loader(Numbers(noise=True), batch_size=10), 9)
  drawn = np.concatenate(numbers(batches)).reshape(3, 30)
  for epoch in drawn:
    assert sorted(np.floor(epoch)) == list(range(30))
  assert len(np.unique(drawn % 1)) == 90
  assert len({tuple(np.floor(epoch)) for epoch in drawn}) == 3
  for batch in batches:
    assert_array_equal(batch["label"], np.floor(values(batch["image"])) % 3)
    assert batch["label"].dtype == np.int32
  (other,) = numbers(first(make_loader(batch_size=30, seed=1), 1))
  assert not np.array_equal(other, np.floor(drawn[0]))


def test_seek_is_where_reading_would_be():
  batches = first(make_loader(Numbers(noise=True), batch_size=7), 12)
  loader = make_loader(Numbers(noise=True), batch_size=7)
  for position in (9, 0, 5):
    loader.seek(position)
    assert loader.position == position
    assert_same([next(loader) for _ in range(3)], batches[position:][:3])
    assert loader.position == position + 3
    loader.close()  # which keeps the position


@pytest.mark.parametrize("number", [0, 7, 24, 61])
def test_seeks_a_record_across_batch_sizes(number):
  """Bit by bit what batches of one record would be."""
  ones = make_loader(Numbers(noise=True), batch_size=1)
  ones.seek(number)
  expected = np.concatenate([next(ones)["image"] for _ in range(14)])
  loader = make_loader(Numbers(noise=True), batch_size=7)
  loader.seek_record(number)
  assert loader.records == number
  images = np.concatenate([next(loader)["image"] for _ in range(2)])
  assert_array_equal(images, expected)
  assert loader.records == number + 14
  for each in (ones, loader):
    each.close()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_hold_contiguous_parts_of_the_global_batch(processes):
  reader, options = Numbers(noise=True), {"process_count": processes}
  parts = [
    first(make_loader(reader, process_index=p, **options), 7)
    for p in range(processes)
  ]
  for step, batch in enumerate(first(make_loader(reader), 7)):
    for name, want in batch.items():
      together = np.concatenate([part[step][name] for part in parts])
      assert_array_equal(together, want)


@pytest.mark.parametrize("chunk", [2, 4, 64])
@pytest.mark.parametrize("threads", [0, 3])
def test_chunks_and_threads_change_nothing(chunk, threads):
  whole = first(make_loader(Numbers(noise=True), batch_size=10), 7)
  reader = Numbers(noise=True, chunk=chunk)
  other = make_loader(reader, batch_size=10, num_threads=threads)
  assert_same(first(other, 7), whole)


@pytest.mark.parametrize("threads", [0, 2])
def test_after_an_error_the_same_batch_is_read(threads):
  """It fails within the batch; nothing of it is taken for the next."""
  batches = first(make_loader(batch_size=10), 4)
  reader = Numbers(fails_at=int(values(batches[1]["image"])[4]))
  loader = make_loader(reader, batch_size=10, num_threads=threads)
  assert_same([next(loader)], batches[:1])
  with pytest.raises(OSError, match="of shard-7 can't be read"):
    next(loader)
  reader._fails_at = None
  assert_same(first(loader, 3), batches[1:])


def test_seek_and_close_stop_threads():
  """Up to 4 may be yet to come, but not some more for each of 20 seeks."""
  before = threading.active_count()
  loader, held = make_loader(num_threads=4), []
  for position in range(20):
    loader.seek(position)
    next(loader)
    held.append(loader._iterator)  # not left to the garbage collector
  assert threading.active_count() <= before + 8
  loader.close()
  for thread in threading.enumerate():
    if thread.name.startswith("grain-prefetch"):
      thread.join(5)
  assert threading.active_count() <= before


def shared_memory(size):
  """Segments of so many bytes; those of other processes have other sizes."""
  return {
    path.name
    for path in pathlib.Path("/dev/shm").glob("psm_*")
    if path.exists() and path.stat().st_size == size
  }


@pytest.mark.system
def test_worker_processes():
  """The same batches; a reader's error arrives; nothing is left behind."""
  options = {"dtype": ml_dtypes.bfloat16, "noise": True, "chunk": 4}
  reader = Numbers(shape=(16, 16, 2), **options)
  whole = first(make_loader(reader), 5)
  bad = int(np.concatenate(numbers(first(make_loader(), 5)))[26])
  failing = Numbers(shape=(16, 16, 2), fails_at=bad, **options)
  size = whole[0]["image"].nbytes
  before = shared_memory(size)
  loader = make_loader(failing, num_threads=1, num_workers=2)
  assert_same([next(loader) for _ in range(4)], whole[:4])
  assert shared_memory(size) > before
  with pytest.raises(OSError, match=f"record {bad} of shard-7 can't be read"):
    next(loader)
  loader.close()
  gc.collect()
  assert not [
    process
    for process in multiprocessing.active_children()
    if process.name.startswith("grain")
  ]
  # Deleted by a thread.
  deadline = time.monotonic() + 20
  while shared_memory(size) - before and time.monotonic() < deadline:
    time.sleep(0.05)
  assert shared_memory(size) <= before


@pytest.mark.system
@pytest.mark.parametrize("code", [-signal.SIGKILL, 0])
def test_workers_end_with_their_process(code):
  """Killed, or at its end without having closed the loader; not before, by a
  SIGTERM that somebody sends to all."""
  program = f"""if True:
    import multiprocessing, os, signal, subprocess
    from absl import flags
    from tests.data.loader_test import make_loader

    flags.FLAGS.mark_as_parsed()
    if __name__ == "__main__":
      loader = make_loader(num_threads=1, num_workers=1)
      print(next(loader)["label"].shape)
      (worker,) = multiprocessing.active_children()
      subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
      worker.join(1)
      assert worker.is_alive()
      for _ in range(8):
        next(loader)
      if {code}:
        os.kill(os.getpid(), signal.SIGKILL)
  """
  # Returns when nobody holds stdout any more: the worker is gone as well.
  done = process.call("-u", "-c", program)
  assert done.returncode == code and done.stdout == "(6,)\n"

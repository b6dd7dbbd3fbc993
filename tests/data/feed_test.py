"""Sources, loader and feeds: determinism, resume, coverage, errors."""

import collections
import threading

import jax
import numpy as np
import pytest

from drift_jax import data


class Numbers:
  """Record i: image value i, label i mod 3."""

  def __init__(self, count=30):
    self.count = count

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    return {
      "image": np.full((2, 2, 1), index, np.float32),
      "label": np.int32(index % 3),
    }


def first(loader, count):
  return [next(loader)["image"][:, 0, 0, 0] for _ in range(count)]


def test_digits_split():
  train = data.make_source("digits", "train")
  test = data.make_source("digits", "test")
  assert (len(train), len(test)) == (1257, 540)
  assert np.bincount(test.labels).tolist() == [54] * 10
  assert train.sample_shape == (8, 8, 1)
  assert train.images.min() == -1.0 and train.images.max() == 1.0
  assert np.isin(train.images, train.grid).all()
  together = np.concatenate([train.images, test.images]).reshape(1797, -1)
  assert len(np.unique(together, axis=0)) == 1797


def test_source_errors():
  with pytest.raises(ValueError, match="'digit'.*digits"):
    data.make_source("digit", "train")
  with pytest.raises(ValueError, match="'val'.*train"):
    data.make_source("digits", "val")


def test_every_epoch_covers_every_record_once():
  loader = data.Loader(Numbers(), batch_size=10, seed=0)
  for _ in range(3):
    epoch = np.concatenate(first(loader, 3))
    assert sorted(epoch) == list(range(30))


def test_epochs_and_seeds_differ():
  loader = data.Loader(Numbers(), batch_size=30, seed=0)
  a, b = first(loader, 2)
  c = first(data.Loader(Numbers(), batch_size=30, seed=1), 1)[0]
  assert not np.array_equal(a, b) and not np.array_equal(a, c)
  assert np.array_equal(
    a, first(data.Loader(Numbers(), batch_size=30, seed=0), 1)[0]
  )


def test_seek_is_where_reading_would_be():
  loader = data.Loader(Numbers(), batch_size=7, seed=0)
  batches = first(loader, 12)
  loader.seek(9)
  assert loader.position == 9
  np.testing.assert_array_equal(first(loader, 3), batches[9:])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_global_batch(processes):
  whole = first(data.Loader(Numbers(), batch_size=6, seed=0), 7)
  parts = [
    first(
      data.Loader(
        Numbers(),
        batch_size=6,
        seed=0,
        process_index=p,
        process_count=processes,
      ),
      7,
    )
    for p in range(processes)
  ]
  for step, batch in enumerate(whole):
    together = np.concatenate([part[step] for part in parts])
    assert sorted(together) == sorted(batch)


def test_batch_size_must_divide():
  with pytest.raises(
    ValueError, match="7 must be a positive multiple of the 2"
  ):
    data.Loader(Numbers(), batch_size=7, seed=0, process_count=2)


def make_feed(source=None, **changes):
  arguments = {
    "num_classes": 3,
    "sample_shape": (2, 2, 1),
    "seed": 0,
    "class_size": 5,
    "unconditional_size": 12,
    "push_per_step": 6,
    "prefill": 24,
    "with_replacement": False,
    "num_labels": 4,
    "num_positives": 3,
    "num_unconditional": 5,
  } | changes
  loader = data.Loader(source or Numbers(), batch_size=6, seed=3)
  return data.QueueFeed(loader, **arguments)


def test_queue_feed_draws_the_right_class():
  feed = make_feed()
  feed.start()
  for _ in range(10):
    batch = next(feed)
    assert batch["positives"].shape == (4, 3, 2, 2, 1)
    assert batch["unconditional"].shape == (4, 5, 2, 2, 1)
    numbers = batch["positives"][:, :, 0, 0, 0]
    np.testing.assert_array_equal(
      numbers % 3, np.repeat(batch["labels"][:, None], 3, 1)
    )


def test_queue_feed_resumes_bit_equal():
  feed = make_feed()
  feed.start()
  for _ in range(4):
    next(feed)
  saved = jax.tree.map(np.array, feed.state())
  expected = [next(feed) for _ in range(5)]
  other = make_feed()
  other.restore(jax.tree.map(jax.numpy.asarray, saved))
  for batch in expected:
    resumed = next(other)
    for name in batch:
      np.testing.assert_array_equal(resumed[name], batch[name])


def test_abstract_has_the_shapes_of_the_state():
  feed = make_feed()
  shapes = [
    jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    for tree in (feed.abstract(), feed.state())
  ]
  assert shapes[0] == shapes[1]


def test_queue_feed_without_prefill_names_the_class():
  feed = make_feed(prefill=0)
  feed.start()
  with pytest.raises(ValueError, match=r"class \d has \d samples"):
    next(feed)


def test_queue_feed_with_replacement_starts_at_once():
  feed = make_feed(prefill=0, with_replacement=True)
  feed.start()
  batch = next(feed)
  numbers = batch["positives"][:, :, 0, 0, 0]
  np.testing.assert_array_equal(
    numbers % 3, np.repeat(batch["labels"][:, None], 3, 1)
  )


def test_queue_feed_refuses_labels_out_of_range():
  feed = make_feed(num_classes=2)
  with pytest.raises(ValueError, match=r"label 2, outside \[0, 2\)"):
    feed.start()


def test_labels_are_drawn_from_the_newest_push():
  """Each label no more often than it has just been pushed."""
  feed, loader = make_feed(), data.Loader(Numbers(), batch_size=6, seed=3)
  feed.start()
  loader.seek(4)  # past the prefill
  drawn = collections.Counter()
  for _ in range(12):
    pushed = collections.Counter(next(loader)["label"].tolist())
    labels = collections.Counter(next(feed)["labels"].tolist())
    assert labels <= pushed
    drawn += labels
  assert set(drawn) == {0, 1, 2}


def test_labels_of_the_newest_push_alone():
  """Ten classes in the queue, but a push holds two: only they are drawn."""

  class InOrder(Numbers):
    def __getitem__(self, index):
      return {
        "image": np.full((2, 2, 1), index, np.float32),
        "label": np.int32(index % 10),
      }

  feed = make_feed(
    InOrder(200), num_classes=10, prefill=180, num_labels=6, num_positives=1
  )
  feed.start()
  loader = data.Loader(InOrder(200), batch_size=6, seed=3)
  loader.seek(30)
  for _ in range(10):
    pushed = sorted(next(loader)["label"].tolist())
    assert sorted(next(feed)["labels"].tolist()) == pushed


def test_every_label_gets_its_own_unconditional_reals():
  """Rows differ, repeat nothing, and are the newest samples of any class."""
  feed = make_feed(Numbers(100), num_unconditional=8)
  loader = data.Loader(Numbers(100), batch_size=6, seed=3)
  newest = collections.deque(maxlen=12)
  feed.start()
  for _ in range(4):
    newest.extend(next(loader)["image"][:, 0, 0, 0])
  for _ in range(6):
    newest.extend(next(loader)["image"][:, 0, 0, 0])
    rows = next(feed)["unconditional"][:, :, 0, 0, 0]
    for row in rows:
      assert len(set(row)) == 8 and set(row) <= set(newest)
    # 12! / 4! orders of 8 of 12: a repeated row is no coincidence.
    assert len({tuple(sorted(row)) for row in rows}) > 1
    assert len({tuple(row) for row in rows}) == len(rows)


def test_image_feed_resumes_where_its_state_was_taken():
  def make():
    return data.ImageFeed(data.Loader(Numbers(), batch_size=7, seed=3))

  feed = make()
  feed.start()
  for _ in range(5):
    next(feed)
  saved = jax.tree.map(np.array, feed.state())
  expected = [next(feed) for _ in range(4)]
  other = make()
  other.restore(saved)
  for batch in expected:
    resumed = next(other)
    for name in ("image", "label"):
      np.testing.assert_array_equal(resumed[name], batch[name])
  assert not np.array_equal(next(make())["image"], expected[0]["image"])


def test_seek_stops_the_old_readers():
  """A loader starts its readers as it needs them: up to 4 may be yet to
  come, but not some more for each of 20 seeks."""
  loader = data.Loader(Numbers(), batch_size=2, seed=0, num_threads=4)
  next(loader)
  before, held = threading.active_count(), []
  for position in range(20):
    held.append(loader._iterator)  # not left to the garbage collector
    loader.seek(position)
    next(loader)
  assert threading.active_count() <= before + 4


def test_without_a_cpu_backend_says_what_to_set(monkeypatch):
  def local_devices(backend=None):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(jax, "local_devices", local_devices)
  with pytest.raises(RuntimeError, match="JAX_PLATFORMS=cuda,cpu"):
    make_feed()

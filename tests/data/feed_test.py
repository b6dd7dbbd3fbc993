"""Feeds: determinism, resume, draws of the right class, real processes."""

import collections
import contextlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from drift_jax.data.feed import GroupedFeed, LabelFeed, QueueFeed
from drift_jax.data.loader import Loader
from drift_jax.data.order import ClassGrouped
from drift_jax.system import streams
from drift_jax.training import checkpoint
from tests.data import latents_test, processes, tfds_test
from tests.data.fakes import Numbers, values
from tests.data.pictures import write
from tests.process import call_together, free_port


def make_loader(reader=None, process_count=1, **changes):
  arguments = {"batch_size": 6 * process_count, "seed": 3} | changes
  return Loader(reader or Numbers(), process_count=process_count, **arguments)


def make_image(reader=None):
  return make_loader(reader or Numbers(noise=True), batch_size=7)


def make_queue(reader=None, *, loader=None, **changes):
  arguments = {
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
  return QueueFeed(loader or make_loader(reader), **arguments)


def make_grouped(reader=None, **changes):
  arguments = {
    "seed": 3,
    "num_labels": 4,
    "num_positives": 3,
    "num_unconditional": 5,
  } | changes
  return GroupedFeed(reader or Numbers(noise=True), **arguments)


FEEDS = {"image": make_image, "queue": make_queue, "grouped": make_grouped}


@pytest.fixture(params=FEEDS)
def make(request):
  return FEEDS[request.param]


def assert_same(batch, other):
  assert batch.keys() == other.keys()
  for name in batch:
    assert batch[name].dtype == other[name].dtype
    assert_array_equal(batch[name], other[name])


def test_resumes_bit_equal_where_its_state_was_taken(make):
  """What has been handed out to be saved does not change any more."""
  feed = make()
  feed.start()
  for _ in range(4):
    next(feed)
  saved = feed.state()
  shapes = [
    jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    for tree in (feed.abstract(saved), saved)
  ]
  assert shapes[0] == shapes[1]
  expected = [next(feed) for _ in range(5)]
  other = make()
  other.restore(saved)
  for batch in expected:
    assert_same(next(other), batch)
  new = make()
  new.start()
  for name in {"image", "positives"} & set(expected[0]):
    assert not np.array_equal(next(new)[name], expected[0][name])
  for each in (feed, other, new):
    each.close()


def test_queue_draws_what_its_definition_draws():
  """Rings as lists, draws by JAX alone: the keys and their use are fixed."""
  loader, feed = make_loader(), make_queue()
  feed.start()
  rings = {label: [None] * 5 for label in range(3)}
  pushed, everything = collections.Counter(), [None] * 12

  def push(batch):
    for value, label in zip(
      values(batch["image"]), batch["label"], strict=True
    ):
      rings[int(label)][pushed[int(label)] % 5] = value
      everything[pushed["any"] % 12] = value
      pushed[int(label)] += 1
      pushed["any"] += 1

  for _ in range(4):
    push(next(loader))
  for step in range(5):
    newest = next(loader)
    push(newest)
    key = jax.random.fold_in(streams.stream(0, "queue"), step)
    label_key, sample_key = jax.random.split(key)
    labels = jax.random.choice(label_key, newest["label"], (4,), replace=False)
    a, b = jax.random.split(sample_key)
    slots = jnp.argsort(jax.random.uniform(a, (4, 5)), axis=1)[:, :3]
    any_slots = jnp.argsort(jax.random.uniform(b, (4, 12)), axis=1)[:, :5]
    batch = next(feed)
    assert_array_equal(batch["labels"], labels)
    for row, label in enumerate(np.asarray(labels)):
      assert_array_equal(
        values(batch["positives"][row]),
        [rings[int(label)][slot] for slot in slots[row]],
      )
      assert_array_equal(
        values(batch["unconditional"][row]),
        [everything[slot] for slot in any_slots[row]],
      )


def test_queue_names_a_class_that_would_repeat_for_ever():
  """Before the first step; a class without any image is never drawn."""
  few = Numbers(labels=[0] * 8 + [1, 1] + [2] * 5, classes=4)
  changes = {"num_positives": 3, "num_labels": 2}
  with pytest.raises(
    ValueError, match=r"1 \(class1\) has 2 im.*=3.*1 of the 4"
  ):
    make_queue(few, **changes)
  feed = make_queue(few, **changes, with_replacement=True)
  feed.start()
  for _ in range(5):
    batch = next(feed)
    assert_array_equal(
      few.labels[values(batch["positives"]).astype(int)],
      np.repeat(batch["labels"][:, None], 3, 1),
    )
  make_queue(few, **changes | {"num_positives": 2, "num_unconditional": 15})
  with pytest.raises(ValueError, match="hold 15 images.*unconditional=16"):
    make_queue(few, **changes | {"num_positives": 2, "num_unconditional": 16})


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: make_queue(num_labels=9), "labels=9 over 1 .*takes 9.*step=6"),
    (lambda: make_grouped(process_count=3), "labels=4 must be .* of the 3"),
  ],
)
def test_sizes_must_fit(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_queues_of_two_processes_draw_on_their_own():
  """Equal queues, one label: only the processes' own keys tell them apart."""
  rows = []
  for process in range(2):
    reader = Numbers(1, classes=1)
    loader = make_loader(reader, process_index=process, process_count=2)
    feed = make_queue(loader=loader, class_size=30, with_replacement=True)
    feed.start()
    feed._bank.samples[0, :, 0, 0, 0] = np.arange(30)
    rows.append(values(next(feed)["positives"]))
    assert rows[-1].shape == (2, 3)
  assert not np.array_equal(*rows)


@pytest.mark.parametrize("num_unconditional", [0, 5])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_grouped_reads_what_its_order_says(count, num_unconditional):
  """Of all processes together, each of which holds successive labels."""
  sizes = {"num_positives": 3, "num_unconditional": num_unconditional}
  reader = Numbers(classes=3, chunk=4)
  order = ClassGrouped(
    reader.labels, reader.class_names, seed=3, num_labels=4, **sizes
  )
  feeds = [
    make_grouped(reader, **sizes, process_index=p, process_count=count)
    for p in range(count)
  ]
  for step in range(9):
    parts = [next(feed) for feed in feeds]
    batch = {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}
    assert_array_equal(batch["labels"], order.labels(step))
    records = order.records(step, 0, order.size)
    for name, want in zip(
      ("positives", "unconditional"), np.split(records, [12]), strict=True
    ):
      assert_array_equal(values(batch[name]), want.reshape(4, len(want) // 4))
  for feed in feeds:
    feed.close()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """The same pictures as a folder and as a tar; others in TFDS; latents."""
  data = tmp_path_factory.mktemp("data")
  for index in range(18):
    write(data / f"pictures/{'abc'[index % 3]}/{index}.png", index)
  with tarfile.open(data / "pictures.tar", "w") as archive:
    archive.add(data / "pictures", "pictures")
  tfds_test.TinyPictures(
    data_dir=data, file_format="array_record"
  ).download_and_prepare()
  latents_test.make(
    data / "latents", latents_test.SETTINGS, latents_test.random_moments(11)
  )
  return data


@pytest.fixture(scope="module")
def one_queue(tmp_path_factory):
  """A folder with the checkpoint of one process' queue; its next batches."""
  directory = tmp_path_factory.mktemp("processes")
  feed = processes.queue_feed(0, 1)
  feed.start()
  next(feed)
  with contextlib.closing(
    checkpoint.Checkpointer(directory / "one_process")
  ) as saver:
    saver.save(1, {"step": np.asarray(1)}, feed.state())
  arrays = {name: x.copy() for name, x in feed._bank.arrays().items()}
  feed.close()
  return directory, arrays


@pytest.fixture(scope="module")
def two_processes(one_queue, stored):
  """What two real processes of two devices each held and saw."""
  directory, port = one_queue[0], free_port()
  (directory / "data").symlink_to(stored)
  call_together(
    *([processes.__file__, p, 2, port, directory] for p in range(2)),
    devices=2,
    XDG_CACHE_HOME=str(directory / "cache"),
  )
  return [
    {
      kind: dict(np.load(directory / f"{kind}{p}.npz").items())
      for kind in ("local", "whole")
    }
    for p in range(2)
  ]


@pytest.fixture(scope="module")
def one_process(stored):
  """{name: {key: array}} of the same feeds in one process, with no workers."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(stored / "cache"))
    feeds = processes.feeds(stored)
    return {
      n: processes.flat(n, processes.batches(f)) for n, f in feeds.items()
    }


@pytest.mark.system
@pytest.mark.parametrize(
  "name", ["image", "grouped", "workers", "folder", "tar", "tfds", "latents"]
)
def test_two_processes_see_the_batches_of_one(one_process, two_processes, name):
  """Disjoint, complete shards; the same global arrays on both, bit for bit."""
  assert len({a.tobytes() for a in one_process[name].values()}) > 3
  for key, array in one_process[name].items():
    shards = [process["local"][key] for process in two_processes]
    assert_array_equal(np.concatenate(shards), array)
    for process in two_processes:
      assert_array_equal(process["whole"][key], array)


@pytest.mark.system
def test_two_processes_keep_a_queue_each(two_processes):
  """Each draws half of the labels from its own half of the data.

  That a checkpoint resumes both queues bit-equal is asserted over there.
  """
  loader = Loader(processes.reader(), batch_size=12, seed=1)
  halves = [set(), set()]
  for _ in range(4):
    image = next(loader)["image"]
    for half in range(2):
      halves[half] |= {row.tobytes() for row in image[6 * half : 6 * half + 6]}
  for step in range(processes.BATCHES):
    new = next(loader)["image"]
    for half, process in enumerate(two_processes):
      halves[half] |= {row.tobytes() for row in new[6 * half : 6 * half + 6]}
      key = f"queue/{step}/"
      positives = process["local"][key + "positives"]
      assert positives.shape == (2, 2, 4, 4, 3)
      assert {x.tobytes() for row in positives for x in row} <= halves[half]
      assert_array_equal(
        np.floor(values(positives)) % 4,
        np.repeat(process["local"][key + "labels"][:, None], 2, 1),
      )


@pytest.mark.system
def test_two_processes_go_on_from_one_queue(one_queue, two_processes):
  """Copies of it, and the records behind those that one process has had.

  One process had 24 records, which are two batches of two processes.
  """
  loader = Loader(processes.reader(), batch_size=12, seed=1)
  loader.seek(2)
  for process in two_processes:
    for name, array in one_queue[1].items():
      assert_array_equal(process["local"][f"copy/{name}"], array)
  for step in range(2):
    new = next(loader)
    for half, process in enumerate(two_processes):
      labels = process["local"][f"from_one/{step}/labels"]
      mine = new["label"][6 * half : 6 * half + 6].tolist()
      assert collections.Counter(labels.tolist()) <= collections.Counter(mine)


@pytest.mark.system
def test_one_process_goes_on_from_two_queues(one_queue, two_processes):
  """The newest samples of both, and no record twice or left out.

  Two processes had 48 records when they saved.
  """
  feed = processes.queue_feed(0, 1)
  with contextlib.closing(
    checkpoint.Checkpointer(one_queue[0] / "checkpoints", read_only=True)
  ) as saver:
    restored = saver.restore({"step": np.asarray(0)}, feed.abstract)
  assert restored is not None
  feed.restore(restored[1])
  saved = {
    name: np.stack([p["local"][f"saved/{name}"] for p in two_processes])
    for name in feed._bank.arrays()
  }
  for label in range(4):
    size = feed._bank.samples.shape[1]
    expected = []
    for age in range(size):
      for ring in range(2):
        if age < saved["count"][ring, label]:
          slot = (saved["pointer"][ring, label] - 1 - age) % size
          expected.append(saved["samples"][ring, label, slot])
    expected = expected[:size][::-1]
    assert feed._bank.count[label] == len(expected)
    assert_array_equal(
      feed._bank.samples[label, : len(expected)], np.stack(expected)
    )
  loader = Loader(processes.reader(), batch_size=6, seed=1)
  loader.seek(8)
  for _ in range(3):
    assert feed._loader.records == loader.records
    batch, new = next(feed), next(loader)
    assert collections.Counter(batch["labels"].tolist()) <= (
      collections.Counter(new["label"].tolist())
    )
  feed.close()


def test_records_that_do_not_divide_the_new_batch_are_not_lost():
  """30 records are two and a half steps of two processes."""
  feed = make_queue()
  feed.start()
  next(feed)
  saved = feed.state()
  halves = []
  for process in range(2):
    loader = make_loader(process_index=process, process_count=2)
    other = make_queue(loader=loader)
    other.restore(saved)
    halves.append(loader)
  expected = make_loader()
  expected.seek(5)
  for _ in range(3):
    both = np.concatenate([next(half)["image"] for half in halves])
    one = np.concatenate([next(expected)["image"] for _ in range(2)])
    assert_array_equal(both, one)


def test_labels_alone_are_as_frequent_as_the_datas():
  """In an epoch each image's label once; two processes share a batch."""
  labels = np.repeat(np.arange(3), (1, 5, 6))
  one = LabelFeed(labels, seed=0, num_labels=4)
  batches = [next(one)["labels"] for _ in range(6)]
  for epoch in np.split(np.concatenate(batches), 2):
    assert_array_equal(np.bincount(epoch), (1, 5, 6))
  assert not np.array_equal(batches[:3], batches[3:])
  parts = [
    LabelFeed(
      labels, seed=0, num_labels=4, process_index=index, process_count=2
    )
    for index in range(2)
  ]
  for feed in parts:
    feed.restore({"position": np.asarray(2)})
  joined = np.concatenate([next(feed)["labels"] for feed in parts])
  assert_array_equal(joined, batches[2])
  with pytest.raises(ValueError, match="batch.labels=3"):
    LabelFeed(labels, seed=0, num_labels=3, process_count=2)
